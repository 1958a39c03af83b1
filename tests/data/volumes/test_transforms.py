import math

import pytest
import torch
from torch.nn import functional as F

from memsave.data import DataError
from memsave.data.volumes.transforms import (
    END,
    START,
    RandRotateZoomd,
    augment,
    grid_size,
    preprocess,
    resample,
    rotation,
)


def test_preprocess_crops_to_the_brain_and_normalises_each_modality():
    generator = torch.Generator().manual_seed(0)
    image = torch.zeros(4, 12, 10, 8)
    gain = torch.tensor([1.0, 10.0, 100.0, 1000.0])[:, None, None, None]
    image[:, 2:9, 3:7, 1:8] = gain * (5 + torch.rand(4, 7, 4, 7, generator=generator))
    image[1, 4, 4, 4] = 0  # a hole inside the brain stays background
    label = torch.zeros(1, 12, 10, 8, dtype=torch.uint8)
    label[0, 2, 3, 1] = 4
    item = preprocess()({"image": image, "label": label})
    assert item["image"].shape == (4, 7, 4, 7) and item["label"].shape == (1, 7, 4, 7)
    assert item["label"].dtype == torch.uint8 and item["label"][0, 0, 0, 0] == 4
    assert list(item[START]) == [2, 3, 1] and list(item[END]) == [9, 7, 8]
    assert item["image"][1, 2, 1, 3] == 0
    for modality in item["image"]:
        values = modality[modality != 0]
        assert values.mean() == pytest.approx(0, abs=1e-5)
        assert values.std(correction=0) == pytest.approx(1, abs=1e-5)


def drawn(count, **settings):
    """Crops of a volume with one tumour voxel in the middle, whose image is the index of each voxel."""
    image = torch.arange(16.0**3).reshape(1, 16, 16, 16).repeat(4, 1, 1, 1)
    label = torch.zeros(1, 16, 16, 16, dtype=torch.uint8)
    label[0, 8, 8, 8] = 2
    for seed in range(count):
        yield augment((4, 4, 4), **settings).set_random_state(seed)({"image": image, "label": label})[0]


@pytest.mark.parametrize(("foreground", "low", "high"), [(0.0, 0.0, 0.15), (1 / 3, 0.2, 0.5), (1.0, 1.0, 1.0)])
def test_foreground_is_the_fraction_of_crops_with_tumour(foreground, low, high):
    hits = [bool(item["label"].any()) for item in drawn(60, foreground=foreground)]
    assert low <= sum(hits) / len(hits) <= high


def test_crops_are_flipped_on_every_axis():
    steps = {16**2: set(), 16: set(), 1: set()}
    for item in drawn(30, intensity=0.0):
        image = item["image"][0]
        for axis, (step, seen) in enumerate(steps.items()):
            difference = int(image.select(axis, 1)[0, 0] - image.select(axis, 0)[0, 0])
            assert abs(difference) == step
            seen.add(difference > 0)
    assert all(seen == {False, True} for seen in steps.values())


def test_intensities_are_scaled_and_shifted_by_at_most_a_tenth():
    scales, shifts = [], []
    image, label = torch.zeros(4, 4, 4, 4), torch.ones(1, 4, 4, 4, dtype=torch.uint8)
    image[:, 0, 0, 0] = 1.0
    for seed in range(40):
        item = augment((4, 4, 4)).set_random_state(seed)({"image": image, "label": label})[0]
        scales.append((item["image"].max() - item["image"].min()).item())
        shifts.append(item["image"].min().item())
    assert 0.9 <= min(scales) < 0.95 and 1.05 < max(scales) <= 1.1
    assert -0.1 <= min(shifts) < -0.05 and 0.05 < max(shifts) <= 0.1


def test_a_volume_smaller_than_the_crop_is_padded():
    item = {"image": torch.ones(4, 5, 9, 3), "label": torch.ones(1, 5, 9, 3, dtype=torch.uint8)}
    crop = augment((8, 8, 8), intensity=0.0).set_random_state(0)(item)[0]
    assert crop["image"].shape == (4, 8, 8, 8) and crop["label"].shape == (1, 8, 8, 8)
    assert crop["image"][0].sum() == 5 * 8 * 3


def test_several_crops_come_from_one_draw():
    settings = {"foreground": 0.5, "intensity": 0.0}
    image = torch.arange(16.0**3).reshape(1, 16, 16, 16)
    item = {"image": image, "label": torch.zeros(1, 16, 16, 16, dtype=torch.uint8)}
    item["label"][0, 8, 8, 8] = 1
    crops = augment((4, 4, 4), count=40, **settings).set_random_state(0)(item)
    assert len({crop["image"].min().item() for crop in crops}) > 10
    assert 10 <= sum(bool(crop["label"].any()) for crop in crops) <= 30
    (first,) = augment((4, 4, 4), count=1, **settings).set_random_state(0)(item)
    assert torch.equal(first["image"], crops[0]["image"])


def test_full_augmentation_keeps_shapes_and_dtypes_and_changes_more():
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(2, 12, 12, 12, generator=generator)
    label = torch.randint(0, 5, (1, 12, 12, 12), generator=generator, dtype=torch.uint8)
    changed = 0
    for seed in range(40):
        item = {"image": image, "label": label}
        (crop,) = augment((12, 12, 12), intensity=0.0, augmentation="full").set_random_state(seed)(item)
        (again,) = augment((12, 12, 12), intensity=0.0, augmentation="full").set_random_state(seed)(item)
        assert torch.equal(crop["image"], again["image"]) and torch.equal(crop["label"], again["label"])
        assert crop["image"].shape == (2, 12, 12, 12) and crop["image"].dtype == torch.float32
        assert crop["label"].shape == (1, 12, 12, 12) and crop["label"].dtype == torch.uint8
        assert set(crop["label"].unique().tolist()) <= set(range(5))
        # flips alone keep the values
        changed += not torch.equal(crop["image"].flatten().sort()[0], image.flatten().sort()[0])
    assert 20 <= changed < 40
    (light,) = augment((12, 12, 12), intensity=0.0).set_random_state(0)(item)
    assert torch.equal(light["image"].flatten().sort()[0], image.flatten().sort()[0])
    with pytest.raises(DataError, match="augmentation is 'heavy': choose one of light, full"):
        augment((12, 12, 12), augmentation="heavy")


def test_each_part_of_full_augmentation_stays_in_its_range():
    image = torch.zeros(1, 24, 24, 24)
    image[:, 12, 12, 12] = 1.0
    (noise, blur), gamma = (
        [t for t in augment((24, 24, 24), augmentation="full").transforms if type(t).__name__ in names]
        for names in (("RandGaussianNoised", "RandGaussianSmoothd"), ("RandAdjustContrastd",))
    )
    for transform in (noise, blur, *gamma):
        transform.prob = 1.0
        transform.set_random_state(0)
    stds = [noise({"image": torch.zeros(1, 24, 24, 24)})["image"].std().item() for _ in range(20)]
    assert min(stds) > 0 and 0.06 < max(stds) < 0.101
    peaks = [blur({"image": image})["image"].max().item() for _ in range(20)]
    narrow, broad = (math.erf(0.5 / sigma / math.sqrt(2)) ** 3 for sigma in (0.5, 1.0))  # of a voxel's Gaussian
    assert broad * 0.98 <= min(peaks) < max(peaks) <= narrow * 1.02
    ramp = torch.linspace(-1, 1, 1000).reshape(1, 10, 10, 10)
    for _ in range(10):
        after = gamma[0]({"image": ramp})["image"]
        assert after.mean().item() == pytest.approx(0, abs=1e-5)
        assert after.std().item() == pytest.approx(ramp.std().item(), rel=1e-4)
        assert not torch.allclose(after, ramp, atol=1e-4) and (after.flatten().diff() > 0).all()


def ball(size, spacing, *, centre=(0.0, 0.0, 0.0), radius):
    """(1, *size): whether a voxel is within `radius` mm of `centre`, given in mm from the middle of the volume."""
    axes = [(torch.arange(n) - (n - 1) / 2) * mm - at for n, mm, at in zip(size, spacing, centre)]
    return (sum(axis**2 for axis in torch.meshgrid(*axes, indexing="ij")) < radius**2)[None]


def turned(item, *, spacing, seed=0, **settings):
    transform = RandRotateZoomd({"image": "bilinear", "label": "nearest"}, spacing=spacing, prob=1.0, **settings)
    return transform.set_random_state(seed)(item)


def wrong_after(sphere, *, spacing, seed):
    """The fraction of a ball's voxels that a rotation of up to 60 degrees changes."""
    item = {"image": sphere.float(), "label": sphere.to(torch.uint8)}
    after = turned(item, spacing=spacing, seed=seed, degrees=60, zoom=0.0)
    assert after["label"].dtype == torch.uint8
    return ((after["label"].bool() != sphere).sum() / sphere.sum()).item()


def test_a_ball_stays_a_ball_under_rotation_for_any_spacing():
    spacing = (0.5, 1.0, 2.0)
    sphere = ball((80, 40, 20), spacing, radius=17.0)
    assert all(wrong_after(sphere, spacing=spacing, seed=seed) < 0.08 for seed in range(5))
    # this fails if voxels are treated as cubes
    assert all(wrong_after(sphere, spacing=(1, 1, 1), seed=seed) > 0.2 for seed in range(5))


def test_rotations_move_image_and_label_by_the_rotation_matrix():
    spacing, size, centre = (1.0, 1.0, 2.0), (48, 48, 24), (9.0, -6.0, 4.0)
    small = ball(size, spacing, centre=centre, radius=8.0)
    item = {"image": small.float(), "label": small.to(torch.uint8)}
    transform = RandRotateZoomd({"image": "bilinear", "label": "nearest"}, spacing=spacing, prob=1.0, zoom=0.15)
    middle = (torch.tensor(size) - 1) / 2
    for seed in range(5):
        after = transform.set_random_state(seed)(item)
        transform.set_random_state(seed).randomize(None)
        angles = [math.radians(angle) for angle in transform.R.uniform(-15, 15, 3)]
        zoom = transform.R.uniform(0.85, 1.15)
        # an output voxel p comes from R p / zoom
        expected = zoom * torch.linalg.solve(rotation(angles), torch.tensor(centre, dtype=torch.float64)).float()
        for found in (after["label"].bool(), after["image"] > 0.5):
            at = (found[0].nonzero().float().mean(0) - middle) * torch.tensor(spacing)
            assert torch.allclose(at, expected, atol=0.25)  # mm
            assert found.sum().item() == pytest.approx(small.sum().item() * zoom**3, rel=0.06)


def test_no_rotation_and_no_zoom_change_nothing():
    generator = torch.Generator().manual_seed(0)
    item = {"image": torch.randn(2, 7, 6, 5, generator=generator)}
    item["label"] = torch.randint(0, 5, (1, 7, 6, 5), generator=generator, dtype=torch.uint8)
    after = turned(item, spacing=(1, 2, 3), degrees=0, zoom=0)
    assert torch.allclose(after["image"], item["image"], atol=1e-5)
    assert torch.equal(after["label"], item["label"])


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_rotation_about_one_axis_by_hand(axis):
    angles = [0.0, 0.0, 0.0]
    angles[axis] = math.pi / 2
    matrix = rotation(angles)
    kept = torch.eye(3, dtype=torch.float64)[axis]
    assert torch.allclose(matrix @ kept, kept)
    assert torch.allclose(matrix @ matrix.T, torch.eye(3, dtype=torch.float64)) and torch.linalg.det(matrix) > 0
    assert (matrix.abs().round() - torch.eye(3)).abs().sum() == 4  # the other two axes are exchanged


def test_rotations_compose_in_the_order_of_the_axes():
    each = [rotation([0.3 if axis == other else 0.0 for other in range(3)]) for axis in range(3)]
    assert torch.allclose(rotation([0.3, 0.3, 0.3]), each[2] @ each[1] @ each[0])


@pytest.mark.parametrize(
    ("size", "spacing", "target", "expected"),
    [
        ((240, 240, 155), (1, 1, 1), None, (240, 240, 155)),
        ((256, 256, 25), (0.78125, 0.78125, 6.5), (1, 1, 1), (200, 200, 162)),
        ((10, 10, 10), (1, 1, 1), (2, 4, 100), (5, 2, 1)),
    ],
)
def test_grid_size_keeps_the_extent_in_millimetres(size, spacing, target, expected):
    assert grid_size(size, spacing=spacing, target=target) == expected


@pytest.mark.parametrize("factors", [(2, 2, 2), (0.5, 0.5, 0.5), (1, 2, 0.5), (3, 1, 1)])
def test_resampling_agrees_with_interpolate_of_pytorch(factors):
    generator = torch.Generator().manual_seed(0)
    volume = torch.randn(2, 12, 12, 12, generator=generator)
    size = [int(12 / factor) for factor in factors]
    expected = F.interpolate(volume[None], size=size, mode="trilinear", align_corners=False)[0]
    assert torch.allclose(resample(volume, size=size, step=factors), expected, atol=1e-5)


def test_resampling_keeps_a_linear_ramp():
    spacing, target, size = (0.8, 1.5, 6.0), (1.0, 1.0, 1.0), (40, 30, 9)
    axes = [(torch.arange(n, dtype=torch.float64) - (n - 1) / 2) * mm for n, mm in zip(size, spacing)]
    ramp = sum(weight * axis for weight, axis in zip((1, 10, 100), torch.meshgrid(*axes, indexing="ij")))
    new = grid_size(size, spacing=spacing, target=target)
    step = [mm / old for mm, old in zip(target, spacing)]
    axes = [
        (torch.arange(n, dtype=torch.float64) - (n - 1) / 2).clamp(-(m - 1) / 2 * s, (m - 1) / 2 * s)
        for n, m, s in zip(new, size, spacing)
    ]
    expected = sum(weight * axis for weight, axis in zip((1, 10, 100), torch.meshgrid(*axes, indexing="ij")))
    assert torch.allclose(resample(ramp, size=new, step=step), expected)


def test_resampled_labels_have_only_original_values():
    label = torch.zeros(1, 6, 6, 6, dtype=torch.uint8)
    label[:, :3], label[:, 3:] = 1, 4
    finer = resample(label, size=(12, 12, 12), step=(0.5, 0.5, 0.5), nearest=True)
    assert finer.dtype == torch.uint8 and finer.unique().tolist() == [1, 4]
    assert torch.equal(finer[:, ::2, ::2, ::2], label) and torch.equal(finer[:, 1::2, 1::2, 1::2], label)


def test_resampling_to_the_same_grid_returns_the_same_tensor():
    volume = torch.randn(1, 4, 5, 6)
    assert resample(volume, size=(4, 5, 6), step=(1, 1.00001, 1)) is volume
    wider = resample(torch.arange(10.0).reshape(1, 10, 1, 1), size=(10, 1, 1), step=(1.04, 1, 1)).flatten()
    assert wider[1:9].tolist() == pytest.approx([4.5 + 1.04 * (number - 4.5) for number in range(1, 9)])
