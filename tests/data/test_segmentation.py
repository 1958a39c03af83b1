import threading
import time

import pytest
import torch

from memsave.data import DataError
from memsave.data.brats import read_case
from memsave.data.segmentation import TrainingCrops, Volumes, train_loader, uncrop

CROP = (12, 10, 8)


def crops(cases, *, length=10, seed=0, **settings):
    return TrainingCrops(cases, **{"crop_size": CROP, "length": length, "seed": seed, **settings})


def same(first, second):
    tensors = all(torch.equal(first[key], second[key]) for key in ("image", "label"))
    return tensors and first["id"] == second["id"]


def loader_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("memsave-data")]


def test_an_item_is_a_plain_crop(phantoms):
    item = crops(phantoms)[0]
    assert set(item) == {"image", "label", "id"}
    assert type(item["image"]) is type(item["label"]) is torch.Tensor
    assert item["image"].shape == (4, *CROP) and item["image"].dtype == torch.float32
    assert item["label"].shape == (1, *CROP) and item["label"].dtype == torch.uint8
    assert item["image"].is_contiguous() and item["label"].is_contiguous()


def test_an_item_depends_on_seed_and_index_alone(phantoms):
    forwards, backwards = crops(phantoms), crops(phantoms, cache_bytes=0)
    torch.manual_seed(0)
    first = [forwards[index] for index in range(10)]
    torch.manual_seed(1)
    second = [backwards[index] for index in reversed(range(10))][::-1]
    assert all(same(*pair) for pair in zip(first, second))
    assert not same(first[0], crops(phantoms, seed=1)[0])
    images = {tuple(item["image"].flatten().tolist()) for item in first}
    assert len(images) == 10


def test_drawing_leaves_the_global_random_state_alone(phantoms):
    state = torch.get_rng_state()
    list(train_loader(crops(phantoms, length=4), batch_size=2, workers=1))
    assert torch.equal(torch.get_rng_state(), state)


def test_every_epoch_visits_every_case_in_another_order(phantoms):
    dataset = crops(phantoms, length=24)
    order = [dataset[index]["id"] for index in range(24)]
    epochs = [tuple(order[first : first + 4]) for first in range(0, 24, 4)]
    assert all(sorted(epoch) == [case.id for case in phantoms] for epoch in epochs)
    assert len(set(epochs)) > 1


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("start", [0, 2])
def test_batches_do_not_depend_on_workers_or_start(phantoms, workers, start):
    reference = crops(phantoms, length=7)
    batches = list(train_loader(crops(phantoms, length=7), batch_size=2, workers=workers, start=start))
    assert [len(batch["id"]) for batch in batches] == [2, 2, 2, 1][start:]
    index = 2 * start
    for batch in batches:
        for position, name in enumerate(batch["id"]):
            item = {"image": batch["image"][position], "label": batch["label"][position], "id": name}
            assert same(item, reference[index])
            index += 1


def test_the_loader_works_ahead_but_not_far(phantoms):
    class Counting(TrainingCrops):
        def __getitem__(self, index):
            requested.append(index)
            return super().__getitem__(index)

    requested: list[int] = []
    dataset = Counting(phantoms, crop_size=CROP, length=20, seed=0)
    batches = train_loader(dataset, batch_size=1, workers=1)
    next(batches)
    deadline = time.monotonic() + 10
    while len(requested) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)  # time enough for far more small crops
    assert requested == [0, 1]
    batches.close()


def test_threads_end_with_the_iterator(phantoms):
    batches = train_loader(crops(phantoms), batch_size=2, workers=2)
    next(batches)
    assert loader_threads()
    batches.close()
    assert not loader_threads()
    list(train_loader(crops(phantoms, length=4), batch_size=2, workers=2))
    assert not loader_threads()


def test_an_error_in_a_worker_arrives_as_it_is(write_case):
    case = write_case()
    case.images[0].write_text("damaged")
    with pytest.raises(DataError, match=r"A_t1\.nii\.gz is not a readable NIfTI file[^\n]*$"):
        next(train_loader(crops([case]), batch_size=1, workers=1))
    assert not loader_threads()


def test_a_volume_smaller_than_the_crop_is_padded(phantoms):
    item = crops(phantoms, crop_size=(40, 8, 40))[0]
    assert item["image"].shape == (4, 40, 8, 40) and item["label"].shape == (1, 40, 8, 40)


def test_a_crop_never_shares_memory_with_the_cache(phantoms):
    whole = Volumes(phantoms)[0]["image"].shape[1:]
    dataset = crops(phantoms[:1], crop_size=whole)
    before = dataset.volumes[0]["label"].clone()
    for index in range(10):
        dataset[index]["label"].fill_(9)
    assert torch.equal(dataset.volumes[0]["label"], before)


def test_the_cache_keeps_the_most_recent_volumes_within_its_bound(phantoms):
    sizes = [sum(Volumes(phantoms)[index][key].nbytes for key in ("image", "label")) for index in range(4)]
    volumes = Volumes(phantoms, cache_bytes=sizes[0] + max(sizes[1:3]))
    first, second = volumes[0]["image"], volumes[1]["image"]
    assert volumes[0]["image"] is first
    volumes[2]  # number 1, the least recently used, has to go
    assert volumes.cached_bytes() == sizes[0] + sizes[2]
    assert volumes[0]["image"] is first
    assert volumes[1]["image"] is not second
    assert volumes.cached_bytes() <= volumes.cache_bytes


def test_without_room_nothing_is_kept(phantoms):
    volumes = Volumes(phantoms)
    assert volumes[0]["image"] is not volumes[0]["image"] and volumes.cached_bytes() == 0


def test_a_volume_can_be_put_back_into_its_grid(phantoms):
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


def test_bad_settings_are_named(phantoms):
    with pytest.raises(DataError, match="no case to train on"):
        crops([])
    with pytest.raises(DataError, match=r"crop_size is \(8, 8\)"):
        crops(phantoms, crop_size=(8, 8))
    with pytest.raises(IndexError, match=r"Crop 10 .* draws 10"):
        crops(phantoms)[10]
