import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memsave.data.volumes.lesion_metrics import LesionScores, lesion_region_scores, lesion_scores

SHAPE = (40, 16, 12)


def mask(*cuboids):
    """The union of cuboids, each a corner and its sizes; a corner alone is a cube of 4 x 4 x 4 = 64 voxels."""
    result = torch.zeros(SHAPE, dtype=torch.bool)
    for x, y, z, *sizes in cuboids:
        a, b, c = sizes or (4, 4, 4)
        result[x : x + a, y : y + b, z : z + c] = True
    return result


EMPTY, ONE, FAR = mask(), mask((2, 3, 4)), mask((30, 3, 4))


def expect(prediction, target, scores, counts, **options):
    result = lesion_scores(prediction, target, **options)
    assert (result.dice, result.hd95) == pytest.approx(scores)
    assert (result.true_positives, result.false_negatives, result.false_positives) == counts


@pytest.mark.parametrize(
    ("prediction", "target", "scores", "counts"),
    [
        (EMPTY, EMPTY, (1, 0), (0, 0, 0)),
        (ONE, ONE, (1, 0), (1, 0, 0)),
        (ONE | FAR, ONE | FAR, (1, 0), (2, 0, 0)),
        (EMPTY, ONE, (0, 374), (0, 1, 0)),
        (ONE, EMPTY, (0, 374), (0, 0, 1)),
        (ONE | FAR, EMPTY, (0, 374), (0, 0, 2)),
        (FAR, ONE, (0, 374), (0, 1, 1)),
        (ONE, ONE | FAR, (1 / 2, 374 / 2), (1, 1, 0)),
        (ONE | FAR, ONE, (1 / 2, 374 / 2), (1, 0, 1)),
        (ONE | FAR | mask((16, 3, 4, 1, 1, 1)), ONE, (1 / 3, 2 * 374 / 3), (1, 0, 2)),
    ],
)
def test_counts_of_found_missed_and_false_lesions(prediction, target, scores, counts):
    expect(prediction, target, scores, counts)


def test_scores_are_the_mean_over_lesions_and_not_over_voxels():
    # 64 of 64 voxels of one lesion, and 64 of the 128 of the other: Dice 2 * 64 / (64 + 128); the last slice of that
    # has 16 of its 88 surface voxels, all 4 away
    expect(ONE | FAR, ONE | mask((30, 3, 4, 8, 4, 4)), ((1 + 2 / 3) / 2, (0 + 4) / 2), (2, 0, 0))


def test_lesions_merge_where_their_dilations_touch():
    # a gap of 6 voxels is filled from both sides, 3 and 3: one lesion of 128 voxels, whose 16 farthest of 112 surface
    # voxels are 10 from the 64 that are predicted
    near, beyond = mask((12, 3, 4)), mask((13, 3, 4))
    expect(ONE, ONE | near, (2 / 3, 10), (1, 0, 0))
    expect(ONE, ONE | beyond, (1 / 2, 374 / 2), (1, 1, 0))


def test_a_lesion_in_the_bounding_box_of_another_is_separate():
    angle, inner = mask((0, 0, 0, 30, 4, 4), (0, 0, 0, 4, 16, 4)), mask((20, 11, 0))
    expect(inner, angle | inner, (1 / 2, 374 / 2), (1, 1, 0))
    expect(angle, angle | inner, (1 / 2, 374 / 2), (1, 1, 0))


@pytest.mark.parametrize(("second", "lesions"), [((5, 5, 5), 1), ((5, 5, 6), 2)])
def test_dilated_lesions_are_connected_by_26_neighbours(second, lesions):
    # three steps to 18 neighbours reach (2, 2, 2) from one end and (3, 3, 3) from the other
    target = mask((0, 0, 0, 1, 1, 1), (*second, 1, 1, 1))
    expect(EMPTY, target, (0, 374), (0, lesions, 0), smallest=0)


@pytest.mark.parametrize(
    ("offset", "reached"),
    [((3, 0, 0), True), ((4, 0, 0), False), ((3, 3, 0), True), ((2, 2, 2), True), ((3, 2, 2), False)],
)
def test_a_prediction_within_the_dilation_finds_the_lesion(offset, reached):
    voxel = mask((0, 0, 0, 1, 1, 1))
    if reached:
        expect(mask((*offset, 1, 1, 1)), voxel, (0, math.hypot(*offset)), (1, 0, 0), smallest=0)
    else:
        expect(mask((*offset, 1, 1, 1)), voxel, (0, 374), (0, 1, 1), smallest=0)


def test_components_of_a_prediction_are_connected_by_26_neighbours():
    expect(mask((0, 0, 0, 1, 1, 1), (1, 1, 1, 1, 1, 1)), EMPTY, (0, 374), (0, 0, 1))


def test_one_component_over_two_lesions_counts_as_a_whole_for_both():
    # a bar of 15 x 4 x 4 = 240 voxels from the start of one lesion to the end of the other, 7 apart; the last slice
    # has 16 of its 188 surface voxels, 11 from the lesion at the other end
    expect(mask((2, 3, 4, 15, 4, 4)), ONE | mask((13, 3, 4)), (128 / 304, 11), (2, 0, 0))


def test_all_components_that_overlap_a_lesion_are_merged():
    # two slices of 16 voxels each, and a voxel that lies in the dilation only: Dice 2 * 32 / (64 + 33)
    prediction = mask((2, 3, 4, 1, 4, 4), (5, 3, 4, 1, 4, 4), (8, 3, 4, 1, 1, 1))
    result = lesion_scores(prediction, ONE)
    assert result.dice == 64 / 97
    assert (result.true_positives, result.false_negatives, result.false_positives) == (1, 0, 0)


SMALL = mask((30, 3, 4, 5, 5, 2))  # 50 voxels


@pytest.mark.parametrize("prediction", [EMPTY, SMALL, mask((30, 3, 8, 1, 1, 1))])
def test_a_lesion_of_50_voxels_is_ignored(prediction):
    expect(prediction, SMALL, (1, 0), (0, 0, 0))
    expect(prediction | ONE, SMALL | ONE, (1, 0), (1, 0, 0))
    expect(prediction, SMALL | ONE, (0, 374), (0, 1, 0))


def test_a_lesion_of_51_voxels_counts():
    expect(EMPTY, SMALL | mask((30, 3, 6, 1, 1, 1)), (0, 374), (0, 1, 0))


def test_the_smallest_lesion_is_defined_by_volume():
    expect(EMPTY, SMALL, (0, 374), (0, 1, 0), spacing=(1.0, 1.0, 1.1))  # 55 mm^3
    expect(EMPTY, ONE, (1, 0), (0, 0, 0), spacing=(0.9, 0.9, 0.9))  # 46.7 mm^3
    expect(EMPTY, SMALL, (0, 374), (0, 1, 0), smallest=49)


def test_a_component_of_one_voxel_is_a_false_positive():
    expect(mask((2, 3, 4, 1, 1, 1)), EMPTY, (0, 374), (0, 0, 1))


@pytest.mark.parametrize(("corner", "distance"), [((3, 3, 4), 1.0), ((2, 4, 4), 2.5), ((2, 3, 5), 6.0)])
def test_hd95_is_in_millimetres_on_every_axis(corner, distance):
    # one step to the side: 48 of the 64 voxels in common, and 16 of 56 surface voxels one step away
    expect(mask(corner), ONE, (0.75, distance), (1, 0, 0), spacing=(1.0, 2.5, 6.0))


def neighbours(voxel, *, steps):
    """The voxels that differ by 1 in at least one and at most `steps` coordinates."""
    for offset in itertools.product((-1, 0, 1), repeat=3):
        if 1 <= sum(map(abs, offset)) <= steps:
            yield tuple(a + b for a, b in zip(voxel, offset))


def connected(voxels):
    """The 26-connected components of a set of voxels."""
    left, parts = set(voxels), []
    while left:
        part, border = set(), [left.pop()]
        while border:
            voxel = border.pop()
            part.add(voxel)
            fresh = left.intersection(neighbours(voxel, steps=3))
            left -= fresh
            border.extend(fresh)
        parts.append(part)
    return parts


def hausdorff(first, second, *, spacing):
    surfaces = [[v for v in part if not part.issuperset(neighbours(v, steps=1))] for part in (first, second)]
    between = torch.cdist(*[torch.tensor(surface).double() * torch.tensor(spacing).double() for surface in surfaces])
    return max(np.percentile(between.amin(dim=axis).numpy(), 95) for axis in (0, 1))


def brute_force(prediction, target, *, spacing, smallest):
    everywhere = set(itertools.product(*map(range, target.shape)))
    predicted, truth = (set(map(tuple, one.nonzero().tolist())) for one in (prediction, target))
    dilated = truth
    for _ in range(3):
        dilated = dilated.union(*(everywhere.intersection(neighbours(voxel, steps=2)) for voxel in dilated))
    components, lesions, scores, found = connected(predicted), connected(dilated), [], 0
    for lesion in lesions:
        own, union = lesion & truth, set().union(*(part for part in components if part & lesion))
        if len(own) * math.prod(spacing) <= smallest:
            continue
        if union:
            found += 1
            overlap = 2 * len(own & union) / (len(own) + len(union))
            scores.append((overlap, hausdorff(own, union, spacing=spacing)))
        else:
            scores.append((0, 374))
    missed = len(scores) - found
    false = sum(not any(part & lesion for lesion in lesions) for part in components)
    scores += [(0, 374)] * false
    overlap, distance = np.mean(scores, axis=0) if scores else (1, 0)
    return LesionScores(pytest.approx(overlap), pytest.approx(distance), found, missed, false)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    pieces=st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(0, 2)),
    spacing=st.sampled_from([(1.0, 1.0, 1.0), (0.7, 1.5, 2.0)]),
    smallest=st.sampled_from([0, 8, 50]),
)
def test_scores_equal_a_brute_force_search(seed, pieces, spacing, smallest):
    rng = np.random.default_rng(seed)
    shape = (20, 14, 8)
    masks = torch.zeros((2, *shape), dtype=torch.bool)
    in_target, in_prediction, in_both = pieces
    for chosen in [slice(0, 1)] * in_prediction + [slice(1, 2)] * in_target + [slice(0, 2)] * in_both:
        corner, sizes = rng.integers(shape), rng.integers(1, 6, size=3)
        masks[(chosen, *(slice(start, start + size) for start, size in zip(corner, sizes)))] = True
    masks &= torch.from_numpy(rng.random(masks.shape) < 0.9)
    expected = brute_force(*masks, spacing=spacing, smallest=smallest)
    assert lesion_scores(*masks, spacing=spacing, smallest=smallest) == expected


def test_region_scores_name_every_region():
    prediction, target = torch.stack([ONE, ONE, EMPTY]), torch.stack([ONE | FAR, EMPTY, EMPTY])
    assert lesion_region_scores(prediction, target) == {
        "lesion_dice_wt": 0.5,
        "lesion_dice_tc": 0.0,
        "lesion_dice_et": 1.0,
        "lesion_hd95_wt": 187.0,
        "lesion_hd95_tc": 374.0,
        "lesion_hd95_et": 0.0,
    }


def test_region_scores_of_other_regions_pass_their_options_on():
    scores = lesion_region_scores(mask((2, 3, 5))[None], ONE[None], spacing=(1.0, 1.0, 6.0), regions=["tumour"])
    assert scores == {"lesion_dice_tumour": 0.75, "lesion_hd95_tumour": 6.0}
    ignored = lesion_region_scores(EMPTY[None], ONE[None], smallest=64, regions=["tumour"])
    assert ignored == {"lesion_dice_tumour": 1.0, "lesion_hd95_tumour": 0.0}


def test_bad_masks_and_spacings_are_reported():
    with pytest.raises(ValueError, match=r"float32.*threshold"):
        lesion_scores(ONE.float(), ONE)
    with pytest.raises(ValueError, match=r"\(40, 16, 12\) and \(3, 40, 16, 12\)"):
        lesion_scores(ONE, torch.stack([ONE] * 3))
    with pytest.raises(ValueError, match=r"\(1, 40, 16, 12\)"):
        lesion_scores(ONE[None], ONE[None])
    with pytest.raises(ValueError, match=r"\(1.0, 1.0\).*three"):
        lesion_scores(ONE, ONE, spacing=(1.0, 1.0))
    with pytest.raises(ValueError, match=r"\(1.0, 0.0, 1.0\).*positive"):
        lesion_scores(ONE, ONE, spacing=(1.0, 0.0, 1.0))
    with pytest.raises(ValueError, match=r"\(2, 40, 16, 12\).*\(3, X, Y, Z\)"):
        lesion_region_scores(torch.stack([ONE] * 2), torch.stack([ONE] * 2))
    with pytest.raises(ValueError, match=r"lesion_region_scores.*\(3, 16, 12\)"):
        lesion_region_scores(ONE[:3], ONE[:3])
