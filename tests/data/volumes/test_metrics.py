import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memsave.data.volumes.metrics import WORST_HD95, dice, hd95, region_scores


def mask(*voxels, shape=(12, 10, 8)):
    result = torch.zeros(shape, dtype=torch.bool)
    for voxel in voxels:
        result[voxel] = True
    return result


def surface(one):
    padded = torch.nn.functional.pad(one, (1,) * 6)
    shifted = [padded.roll(step, axis)[1:-1, 1:-1, 1:-1] for step in (1, -1) for axis in range(3)]
    return one & ~torch.stack(shifted).all(dim=0)


EMPTY, ONE = mask(), mask((1, 2, 3))


def test_dice_by_hand():
    assert dice(mask((0, 0, 0), (0, 0, 1), (0, 0, 2)), mask((0, 0, 1), (0, 0, 2), (0, 0, 3), (0, 0, 4))) == 4 / 7


@pytest.mark.parametrize(
    ("prediction", "target", "overlap", "distance"),
    [(EMPTY, EMPTY, 1.0, 0.0), (ONE, EMPTY, 0.0, 373.13), (EMPTY, ONE, 0.0, 373.13), (ONE, ONE, 1.0, 0.0)],
)
def test_empty_mask_rules(prediction, target, overlap, distance):
    assert dice(prediction, target) == overlap
    assert hd95(prediction, target) == pytest.approx(distance, abs=5e-3)


def test_hd95_by_hand():
    assert hd95(ONE, mask((4, 6, 3))) == 5.0
    # 19 of 21 target voxels are predicted; the other two, at distances 2 and 6, enclose the 95th percentile
    line = [(0, y, 0) for y in range(19)]
    target = mask(*line, (2, 0, 0), (6, 0, 0), shape=(8, 19, 2))
    assert hd95(mask(*line, shape=(8, 19, 2)), target) == pytest.approx(2.0)


@pytest.mark.parametrize(("voxel", "distance"), [((3, 2, 3), 2.0), ((1, 4, 3), 5.0), ((1, 2, 5), 12.0)])
def test_hd95_is_in_millimetres_on_every_axis(voxel, distance):
    assert hd95(ONE, mask(voxel), spacing=(1.0, 2.5, 6.0)) == distance


def test_hd95_is_the_larger_of_both_directions():
    ball, far = mask((1, 1, 1)), mask((1, 1, 1), (9, 1, 1))
    assert hd95(ball, far) == hd95(far, ball) == pytest.approx(0.95 * 8)


def test_the_border_of_the_volume_is_a_surface():
    full = torch.ones((5, 5, 5), dtype=torch.bool)
    inner = torch.zeros_like(full)
    inner[1:4, 1:4, 1:4] = True
    assert hd95(full, inner) == pytest.approx(math.sqrt(3), abs=0.05)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), spacing=st.tuples(*[st.floats(0.5, 3.0)] * 3))
def test_hd95_equals_a_brute_force_search(seed, spacing):
    rng = np.random.default_rng(seed)
    masks = [torch.from_numpy(rng.random((7, 6, 5)) < rng.uniform(0.05, 0.9)) for _ in range(2)]
    if not all(bool(one.any()) for one in masks):
        return
    first, second = (torch.nonzero(surface(one)) * torch.tensor(spacing) for one in masks)
    between = torch.cdist(first.double(), second.double())
    expected = max(np.percentile(between.amin(dim=axis).numpy(), 95) for axis in (0, 1))
    assert hd95(*masks, spacing=spacing) == pytest.approx(expected)


def test_hd95_agrees_with_monai():
    from monai.metrics import compute_hausdorff_distance

    grid = torch.stack(torch.meshgrid(*[torch.arange(24.0)] * 3, indexing="ij"))
    first = (grid - 11).square().sum(dim=0) < 64
    second = (grid - torch.tensor([13.0, 9.0, 12.0])[:, None, None, None]).square().sum(dim=0) < 36
    spacing = (1.0, 1.5, 2.0)
    expected = compute_hausdorff_distance(
        first[None, None], second[None, None], include_background=True, percentile=95, spacing=spacing
    )
    assert hd95(first, second, spacing=spacing) == pytest.approx(expected.item(), rel=1e-5)


def test_region_scores_name_every_region():
    prediction, target = torch.stack([ONE, ONE, EMPTY]), torch.stack([ONE, EMPTY, EMPTY])
    assert region_scores(prediction, target) == {
        "dice_wt": 1.0,
        "dice_tc": 0.0,
        "dice_et": 1.0,
        "hd95_wt": 0.0,
        "hd95_tc": WORST_HD95,
        "hd95_et": 0.0,
    }


def test_bad_masks_are_reported():
    with pytest.raises(ValueError, match=r"float32.*threshold"):
        dice(ONE.float(), ONE)
    with pytest.raises(ValueError, match=r"\(12, 10, 8\) and \(3, 12, 10, 8\)"):
        hd95(ONE, torch.stack([ONE] * 3))
    with pytest.raises(ValueError, match=r"\(2, 12, 10, 8\)"):
        region_scores(torch.stack([ONE] * 2), torch.stack([ONE] * 2))
