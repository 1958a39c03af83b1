import pytest
import torch

from memsave.data.transforms import END, START, augment, preprocess


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
    """Crops of a volume whose only tumour voxel sits in the middle and whose image holds each voxel's index."""
    image = torch.arange(16.0**3).reshape(1, 16, 16, 16).repeat(4, 1, 1, 1)
    label = torch.zeros(1, 16, 16, 16, dtype=torch.uint8)
    label[0, 8, 8, 8] = 2
    for seed in range(count):
        yield augment((4, 4, 4), **settings).set_random_state(seed)({"image": image, "label": label})[0]


@pytest.mark.parametrize(("foreground", "low", "high"), [(0.0, 0.0, 0.15), (1 / 3, 0.2, 0.5), (1.0, 1.0, 1.0)])
def test_the_stated_fraction_of_crops_holds_tumour(foreground, low, high):
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
