from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch

from memsave.data import DataError
from memsave.data.loader import shuffled
from memsave.data.volumes.dataset import TrainingCrops, Volumes, _item_seed, restore, uncrop
from memsave.data.volumes.layouts import MODALITIES, find_cases
from memsave.data.volumes.metrics import dice
from memsave.data.volumes.reader import labels_of, read_case, regions
from memsave.data.volumes.schemes import SCHEMES
from memsave.data.volumes.transforms import augment

CROP = (12, 10, 8)
REAL = Path(__file__).parents[4] / "shared" / "data" / "brain-mri"


def crops(cases, *, seed=0, **settings):
    return TrainingCrops(cases, **{"crop_size": CROP, "seed": seed, **settings})


def crop_number(dataset, number):
    """Item `number` of a run of shuffled epochs."""
    ((case, draw),) = next(shuffled(len(dataset), batch_size=1, seed=dataset.seed, start=number))
    return dataset.example(case, draw=draw)


def same(first, second):
    tensors = all(torch.equal(first[key], second[key]) for key in ("image", "label"))
    return tensors and first["id"] == second["id"]


def test_an_item_is_a_plain_crop(phantoms):
    item = crop_number(crops(phantoms), 0)
    assert set(item) == {"image", "label", "id"}
    assert type(item["image"]) is type(item["label"]) is torch.Tensor
    assert item["image"].shape == (4, *CROP) and item["image"].dtype == torch.float32
    assert item["label"].shape == (1, *CROP) and item["label"].dtype == torch.uint8
    assert item["image"].is_contiguous() and item["label"].is_contiguous()


def test_an_item_depends_only_on_seed_and_index(phantoms):
    forwards, backwards = crops(phantoms), crops(phantoms, cache_bytes=0)
    torch.manual_seed(0)
    first = [crop_number(forwards, index) for index in range(10)]
    torch.manual_seed(1)
    second = [crop_number(backwards, index) for index in reversed(range(10))][::-1]
    assert all(same(*pair) for pair in zip(first, second))
    assert not same(first[0], crop_number(crops(phantoms, seed=1), 0))
    images = {tuple(item["image"].flatten().tolist()) for item in first}
    assert len(images) == 10


def test_crops_do_not_change_the_global_random_state(phantoms):
    state = torch.get_rng_state()
    crop_number(crops(phantoms), 3)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_volume_smaller_than_the_crop_is_padded(phantoms):
    item = crop_number(crops(phantoms, crop_size=(40, 8, 40)), 0)
    assert item["image"].shape == (4, 40, 8, 40) and item["label"].shape == (1, 40, 8, 40)


def test_a_crop_never_shares_memory_with_the_cache(phantoms):
    whole = Volumes(phantoms)[0]["image"].shape[1:]
    dataset = crops(phantoms[:1], crop_size=whole)
    before = dataset.volumes[0]["label"].clone()
    for index in range(10):
        crop_number(dataset, index)["label"].fill_(9)
    assert torch.equal(dataset.volumes[0]["label"], before)


def test_the_cache_keeps_the_most_recent_volumes_within_its_bound(phantoms):
    sizes = [sum(Volumes(phantoms)[index][key].nbytes for key in ("image", "label")) for index in range(4)]
    volumes = Volumes(phantoms, cache_bytes=sizes[0] + max(sizes[1:3]))
    first, second = volumes[0]["image"], volumes[1]["image"]
    assert volumes[0]["image"] is first
    volumes[2]  # drops number 1, the least recently used
    assert volumes.cached_bytes() == sizes[0] + sizes[2]
    assert volumes[0]["image"] is first
    assert volumes[1]["image"] is not second
    assert volumes.cached_bytes() <= volumes.cache_bytes


def test_without_cache_bytes_nothing_is_cached(phantoms):
    volumes = Volumes(phantoms)
    assert volumes[0]["image"] is not volumes[0]["image"] and volumes.cached_bytes() == 0


def test_uncrop_restores_the_original_grid(phantoms):
    item, scan = Volumes(phantoms)[1], read_case(phantoms[1])
    assert item["image"].shape[1:] < item["shape"] == scan.label.shape
    assert type(item["image"]) is torch.Tensor
    restored = uncrop(item["label"], start=item["start"], shape=item["shape"])
    assert torch.equal(restored[0], torch.from_numpy(scan.label))
    assert torch.equal(item["affine"], torch.from_numpy(scan.affine))
    assert item["spacing"] == (1.0, 1.0, 1.0)


def test_an_unlabelled_case_can_be_predicted_but_not_trained_on(write_case):
    case = write_case(seg=None)
    assert "label" not in Volumes([case])[0]
    with pytest.raises(DataError, match="Case A has no segmentation"):
        crops([case])


def test_bad_settings_are_reported(phantoms):
    with pytest.raises(DataError, match="no case to train on"):
        crops([])
    with pytest.raises(DataError, match=r"crop_size is \(8, 8\)"):
        crops(phantoms, crop_size=(8, 8))


def test_several_crops_of_one_case_differ(phantoms):
    dataset = crops(phantoms)
    stack = dataset.crops(2, draw=5, count=6)
    assert stack["id"] == phantoms[2].id
    assert stack["image"].shape == (6, 4, *CROP) and stack["image"].dtype == torch.float32
    assert stack["label"].shape == (6, 1, *CROP) and stack["label"].dtype == torch.uint8
    assert type(stack["image"]) is torch.Tensor and stack["image"].is_contiguous()
    assert len({tuple(image.flatten().tolist()) for image in stack["image"]}) == 6
    first = dataset.crop(2, draw=5)
    assert torch.equal(first["image"], stack["image"][0]) and torch.equal(first["label"], stack["label"][0])
    again, other = (crops(phantoms).crops(2, draw=draw, count=6) for draw in (5, 6))
    assert torch.equal(again["image"], stack["image"]) and not torch.equal(other["image"], stack["image"])
    with pytest.raises(DataError, match="number of crops of a case is 0"):
        dataset.crops(0, draw=0, count=0)


def test_the_fraction_of_crops_on_the_tumour_can_be_chosen(phantoms):
    small = {"crop_size": (1, 1, 1)}
    on, off = (
        sum(
            bool(crop_number(crops(phantoms, foreground=share, **small), number)["label"].any()) for number in range(40)
        )
        for share in (1.0, 0.0)
    )
    assert on == 40 and off <= 2  # a centre at the edge is moved inwards by one voxel


def test_augmentation_can_be_chosen(phantoms):
    light, full = (crops(phantoms[:1], augmentation=name) for name in ("light", "full"))
    assert all(same(crop_number(light, index), crop_number(crops(phantoms[:1]), index)) for index in range(3))
    pairs = ([crop_number(each, index)["image"] for each in (light, full)] for index in range(20))
    differ = sum(not torch.equal(*pair) for pair in pairs)
    assert differ > 5
    assert all(crop_number(full, index)["label"].dtype == torch.uint8 for index in range(20))


def test_crops_are_rotated_in_millimetres(thick):
    dataset = crops(thick, augmentation="full", seed=3)
    item = dataset.volumes[0]
    cubes = 0  # crops that equal those for cubic voxels
    for draw in range(20):
        found = dataset.crop(0, draw=draw)
        for spacing in ((1, 2, 4), (1, 1, 1)):
            transform = augment(CROP, augmentation="full", spacing=spacing).set_random_state(
                _item_seed(3, draw, item["id"])
            )
            (crop,) = transform({key: item[key] for key in ("image", "label")})
            cubes += spacing == (1, 1, 1) and torch.equal(crop["image"], found["image"])
            assert spacing == (1, 1, 1) or torch.equal(crop["image"], found["image"])
    assert 5 < cubes < 20


@pytest.fixture
def thick(tmp_path):
    """A case of two modalities with voxels of 1 x 2 x 4 mm, and a lesion in a brain that is not centred."""
    x, y, z = np.meshgrid(np.arange(40), np.arange(24), np.arange(12), indexing="ij")
    brain = ((x - 22) ** 2 + (2 * (y - 10)) ** 2 + (4 * (z - 6)) ** 2) < 17**2
    lesion = ((x - 25) ** 2 + (2 * (y - 11)) ** 2 + (4 * (z - 6)) ** 2) < 8**2
    image = (brain * (100 + x + 10 * lesion)).astype(np.float32)
    affine = np.diag([-1.0, 2.0, 4.0, 1.0])
    for part, volume in (("t1ce", image), ("flair", 2 * image), ("mask", lesion.astype(np.uint8) * 255)):
        nibabel.save(nibabel.Nifti1Image(volume, affine), tmp_path / f"A_{part}.nii.gz")
    return find_cases(tmp_path, "folder", modalities=["t1ce", "flair"])


def test_crops_work_for_any_number_of_modalities(thick):
    volumes = Volumes(thick)
    assert volumes.modalities == ("t1ce", "flair") and volumes.scheme.name == "binary"
    item = volumes[0]
    assert item["image"].shape[0] == 2 and item["label"].unique().tolist() == [0, 1]
    assert item["spacing"] == item["image_spacing"] == (1.0, 2.0, 4.0)
    assert crop_number(crops(thick), 0)["image"].shape == (2, *CROP)


def test_volumes_are_resampled_to_a_spacing(thick):
    plain, item = Volumes(thick)[0], Volumes(thick, spacing=(2, 2, 2))[0]
    assert item["cropped"] == tuple(plain["image"].shape[1:])
    assert item["image_spacing"] == (2.0, 2.0, 2.0) and item["spacing"] == (1.0, 2.0, 4.0)
    x, y, z = item["cropped"]
    assert item["image"].shape == (2, round(x / 2), y, z * 2) and item["label"].shape == (1, round(x / 2), y, z * 2)
    assert item["label"].dtype == torch.uint8 and item["label"].unique().tolist() == [0, 1]
    assert type(item["image"]) is torch.Tensor and item["image"].is_contiguous()
    millilitres = [each["label"].sum().item() * np.prod(each["image_spacing"]) / 1000 for each in (plain, item)]
    assert millilitres[1] == pytest.approx(millilitres[0], rel=0.1)
    # the lesion is brighter before and after resampling
    for each in (plain, item):
        brain = each["image"][0] != 0
        inside = each["label"][0] == 1
        assert each["image"][0][inside].mean() > each["image"][0][brain & ~inside].mean()


def test_crops_are_cut_from_resampled_volumes(thick):
    dataset = crops(thick, spacing=[1, 1, 1], crop_size=(8, 8, 8), augmentation="full")
    assert dataset.volumes[0]["image"].shape[3] == 4 * dataset.volumes[0]["cropped"][2]
    assert crop_number(dataset, 0)["image"].shape == (2, 8, 8, 8)


def test_without_resampling_a_prediction_is_restored_exactly(phantoms):
    for number in range(4):
        volumes = Volumes(phantoms)
        item, label = volumes[number], torch.from_numpy(read_case(phantoms[number]).label)
        for prediction in (regions(item["label"]), regions(item["label"]).float()):
            restored = restore(prediction, item)
            assert restored.dtype == torch.bool
            assert torch.equal(restored, regions(label))
        assert torch.equal(labels_of(restored), label)
        assert torch.equal(volumes.truth(number), label[None])


def test_the_volumes_own_spacing_changes_nothing(phantoms):
    plain, item = Volumes(phantoms)[0], Volumes(phantoms, spacing=(1, 1, 1))[0]
    assert torch.equal(plain["image"], item["image"]) and torch.equal(plain["label"], item["label"])


@pytest.mark.parametrize("spacing", [(2, 2, 2), (1, 1, 1), (0.7, 3.1, 1.9), (1, 2, 2)])
@pytest.mark.parametrize("kind", [torch.bool, torch.float32, torch.bfloat16])
def test_a_prediction_is_restored_to_the_original_grid(thick, spacing, kind):
    volumes = Volumes(thick, spacing=spacing)
    item = volumes[0]
    restored = restore(regions(item["label"], scheme=volumes.scheme).to(kind), item)
    truth = volumes.truth(0).bool()
    assert restored.shape == truth.shape and restored.dtype == torch.bool
    assert dice(restored, truth) > 0.9
    # the centre moves by less than half a voxel
    shift = restored[0].nonzero().float().mean(0) - truth[0].nonzero().float().mean(0)
    assert shift.abs().max() < 0.5


def test_probabilities_are_interpolated_before_the_threshold(thick):
    item = Volumes(thick, spacing=(4, 4, 4))[0]
    probability = torch.full((1, *item["image"].shape[1:]), 0.3)
    assert not restore(probability, item).any()
    x, y, z = (slice(first, first + length) for first, length in zip(item["start"], item["cropped"]))
    whole = item["orientation"].apply(restore(probability, item, threshold=0.2))
    assert whole[:, x, y, z].all() and whole.sum() == np.prod(item["cropped"])
    logits = regions(item["label"], scheme=SCHEMES["binary"]).float() * 8 - 4
    assert torch.equal(restore(logits, item, threshold=0.0), restore((logits + 4) / 8, item))
    # along x: the values 0, 0, 1, 1 at 4 mm cross the threshold half-way between voxels of 1 mm
    probability = torch.zeros(1, *item["image"].shape[1:])
    probability[:, probability.shape[1] // 2 :] = 1
    line = item["orientation"].apply(restore(probability, item))[0, x, y, z][:, 0, 0]
    assert line.int().diff().abs().sum() == 1 and abs(int(line.sum()) - len(line) / 2) <= 2


def test_half_precision_probabilities_are_interpolated_in_float32(thick):
    item = Volumes(thick, spacing=(0.9, 1.7, 3.1))[0]
    generator = torch.Generator().manual_seed(0)
    probability = torch.rand(1, *item["image"].shape[1:], generator=generator).bfloat16()
    assert torch.equal(restore(probability, item), restore(probability.float(), item))


def test_bad_predictions_are_reported(thick):
    item = Volumes(thick)[0]
    with pytest.raises(DataError, match=r"restore\(\) got a prediction \(1, 2, 2, 2\) for an image \(2, "):
        restore(torch.zeros(1, 2, 2, 2), item)
    with pytest.raises(DataError, match=r"restore\(\) got torch\.uint8"):
        restore(item["label"], item)


@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
@pytest.mark.parametrize(("spacing", "least"), [(None, 1.0), ((0.78125, 0.78125, 3.25), 0.99), ((1, 1, 3), 0.95)])
def test_a_real_scan_is_restored_to_its_grid(spacing, least, kind):
    if not REAL.is_dir():
        pytest.skip("the real volume is not here")
    volumes = Volumes(find_cases(REAL, "folder", modalities=["image"]), spacing=spacing)
    item, truth = volumes[0], volumes.truth(0).bool()
    assert truth.sum() == 4137 and item["spacing"] == (0.78125, 0.78125, 6.5)
    restored = restore(regions(item["label"], scheme=volumes.scheme).to(kind), item)
    assert restored.shape == (1, 256, 256, 25)
    assert dice(restored, truth) >= least


def test_volumes_keep_the_scheme_of_their_cases(write_case):
    seg = np.resize(np.uint8([0, 1, 2, 3]), (6, 5, 4))
    case = replace(write_case(seg=seg), scheme=SCHEMES["msd"])
    volumes = Volumes([case])
    assert volumes.scheme is SCHEMES["msd"] and volumes[0]["label"].max() == 3
    assert crops([case]).volumes.scheme is SCHEMES["msd"]
    with pytest.raises(DataError, match="scheme binary has one lesion label"):
        Volumes([case], scheme=SCHEMES["binary"])[0]


def test_mixed_cases_are_reported(phantoms):
    other = replace(phantoms[1], modalities=MODALITIES[::-1])
    with pytest.raises(DataError, match=rf"Cases {phantoms[0].id} and {other.id} have different modalities"):
        Volumes([phantoms[0], other])
    other = replace(phantoms[1], scheme=SCHEMES["msd"])
    with pytest.raises(DataError, match="have different label schemes"):
        Volumes([phantoms[0], other])
    assert Volumes([phantoms[0], other], scheme=SCHEMES["brats2021"]).scheme.name == "brats2021"


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"spacing": (1, 1)}, r"spacing is \[1, 1\]: give three voxel sizes in mm"),
        ({"spacing": (1, 0, 1)}, r"spacing is \[1, 0, 1\]"),
        ({"spacing": (1, float("nan"), 1)}, r"spacing is \[1, nan, 1\]"),
        ({"spacing": (1, float("inf"), 1)}, r"spacing is \[1, inf, 1\]"),
        ({"foreground": 1.1}, r"foreground is 1\.1: choose a fraction"),
        ({"augmentation": "heavy"}, r"augmentation is 'heavy': choose one of light, full"),
    ],
)
def test_more_bad_settings_are_reported(phantoms, settings, sentence):
    with pytest.raises(DataError, match=sentence):
        crops(phantoms, **settings)
