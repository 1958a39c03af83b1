"""Datasets of BraTS cases: random crops to train on, whole volumes to evaluate on, and a loader that prefetches.

Item i of `TrainingCrops` depends on (seed, i) and the cases alone: its case comes from a permutation drawn per epoch,
its crop and augmentation from a generator seeded with (seed, i). A run therefore sees the same data whatever the
number of workers or the memory mode, and a resumed run continues with `start` instead of replaying.

Workers are threads. The work is done by zlib and torch, which release the interpreter lock, and a thread keeps one
cache for all workers, hands over tensors without shared memory (64 MiB in a container by default), never forks a
process that already uses CUDA or OpenMP, and passes a DataError on as it is.
"""

import threading
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, default_collate

from memsave.data.brats import BRATS_2021, Case, LabelScheme, read_case
from memsave.data.errors import DataError
from memsave.data.transforms import KEYS, START, augment, preprocess

Item = dict[str, Any]


class Volumes(Dataset):
    """Whole preprocessed volumes, one per case, with what it takes to put a prediction back where it belongs.

    An item holds `image` (4, x, y, z) float32, `label` (1, x, y, z) uint8 where the case has one, `id`, and of the
    original grid: `affine` (4, 4), `spacing` in mm, `shape`, and `start`, the first voxel that was not cropped. Up to
    `cache_bytes` of volumes are kept, the least recently used leave first; cached tensors are not to be written to.
    """

    def __init__(self, cases: Sequence[Case], *, scheme: LabelScheme = BRATS_2021, cache_bytes: int = 0):
        self.cases = list(cases)
        self.scheme = scheme
        self.cache_bytes = cache_bytes
        self._cache: OrderedDict[int, Item] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, index: int) -> Item:
        if not 0 <= index < len(self):
            raise IndexError(f"Volume {index} was asked for and there are {len(self)}: count from 0.")
        with self._lock:
            if index in self._cache:
                self._cache.move_to_end(index)
                return dict(self._cache[index])
        item = _prepare(self.cases[index], scheme=self.scheme)
        with self._lock:
            self._cache[index] = item
            while self.cached_bytes() > self.cache_bytes:
                self._cache.popitem(last=False)
        return dict(item)

    def cached_bytes(self) -> int:
        """The bytes of all volumes that are kept."""
        return sum(item[key].nbytes for item in self._cache.values() for key in KEYS if key in item)


class TrainingCrops(Dataset):
    """`length` augmented crops: `image` (4, *crop_size) float32, `label` (1, *crop_size) uint8, and the case's `id`."""

    def __init__(
        self,
        cases: Sequence[Case],
        *,
        crop_size: Sequence[int],
        length: int,
        seed: int,
        scheme: LabelScheme = BRATS_2021,
        cache_bytes: int = 4 * 2**30,
    ):
        if not cases:
            raise DataError("There is no case to train on: add cases or lower validation_fraction.")
        unlabelled = [case.id for case in cases if case.label is None]
        if unlabelled:
            raise DataError(f"Case {unlabelled[0]} has no segmentation to train on: add its seg file or leave it out.")
        if len(crop_size) != 3 or min(crop_size) < 1:
            raise DataError(f"crop_size is {tuple(crop_size)}: choose three positive numbers, such as (96, 96, 96).")
        self.volumes = Volumes(cases, scheme=scheme, cache_bytes=cache_bytes)
        self.crop_size = tuple(crop_size)
        self.length = length
        self.seed = seed

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Item:
        if not 0 <= index < self.length:
            raise IndexError(f"Crop {index} was asked for and the run draws {self.length}: count from 0.")
        epoch, position = divmod(index, len(self.volumes))
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.volumes))
        return self.crop(int(order[position]), draw=index)

    def crop(self, case: int, *, draw: int) -> Item:
        """An augmented crop of a case, by its number; another `draw` gives another crop."""
        volume = self.volumes[case]
        # built per item, for a MONAI transform holds its random state and workers are threads
        transform = augment(self.crop_size).set_random_state(_item_seed(self.seed, draw))
        (crop,) = transform({key: volume[key] for key in KEYS})  # a list of as many crops as `num_samples`
        # cloned, for a crop that nothing has changed is a view of the cached volume
        tensors = {key: _plain(crop[key]).clone(memory_format=torch.contiguous_format) for key in KEYS}
        return {**tensors, "id": volume["id"]}


def train_loader(dataset: TrainingCrops, *, batch_size: int, workers: int = 1, start: int = 0) -> Iterator[Item]:
    """Batches of consecutive items from item `start * batch_size` on; the last one may be smaller.

    `workers` threads load ahead, one batch more than there are threads; with 0 the caller's thread loads. They end
    with the iterator, when it is exhausted, closed or dropped.
    """

    def load(batch: int) -> Item:
        first = batch * batch_size
        return default_collate([dataset[item] for item in range(first, min(first + batch_size, len(dataset)))])

    batches = range(start, -(-len(dataset) // batch_size))
    if workers == 0:
        yield from map(load, batches)
        return
    loading: deque[Future[Item]] = deque()
    with ThreadPoolExecutor(workers, thread_name_prefix="memsave-data") as pool:
        try:
            for batch in batches:
                loading.append(pool.submit(load, batch))
                if len(loading) > workers:
                    yield loading.popleft().result()
            while loading:
                yield loading.popleft().result()
        finally:
            for future in loading:
                future.cancel()


def uncrop(volume: torch.Tensor, *, start: Sequence[int], shape: Sequence[int]) -> torch.Tensor:
    """Put (..., x, y, z) back into zeros of (..., *shape), from voxel `start` on: the crop to the brain undone."""
    whole = volume.new_zeros((*volume.shape[:-3], *shape))
    x, y, z = (slice(first, first + length) for first, length in zip(start, volume.shape[-3:]))
    whole[..., x, y, z] = volume
    return whole


def _prepare(case: Case, *, scheme: LabelScheme) -> Item:
    scan = read_case(case, scheme=scheme)
    arrays = {"image": torch.from_numpy(scan.image)}
    if scan.label is not None:
        arrays["label"] = torch.from_numpy(scan.label)[None]  # (1, X, Y, Z)
    prepared = preprocess()(arrays)
    # cloned, so that the cache does not keep a whole volume alive behind the view of its crop
    tensors = {key: _plain(prepared[key]).clone(memory_format=torch.contiguous_format) for key in arrays}
    return {
        **tensors,
        "id": case.id,
        "affine": torch.from_numpy(scan.affine),
        "spacing": tuple(np.linalg.norm(scan.affine[:3, :3], axis=0).tolist()),
        "start": tuple(int(first) for first in prepared[START]),
        "shape": tuple(scan.image.shape[1:]),
    }


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor without MONAI's metadata, which neither collates cheaply nor survives every operation."""
    return tensor.as_subclass(torch.Tensor)


def _item_seed(seed: int, index: int) -> int:
    return int(np.random.SeedSequence([seed, index]).generate_state(1)[0])
