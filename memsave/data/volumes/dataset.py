"""Datasets of cases: random crops to train on, and whole volumes to evaluate on.

An example of `TrainingCrops` depends on (seed, draw), its case and the settings alone: its crop and augmentation come
from a generator that is seeded with (seed, draw, id of the case). Other cases change nothing: in a private run, one
case more or less must not change the gradients of all others.
"""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from memsave.data.errors import DataError
from memsave.data.volumes.layouts import MODALITIES, Case
from memsave.data.volumes.orientation import Orientation
from memsave.data.volumes.reader import read_case, read_label
from memsave.data.volumes.schemes import BRATS_2021, LabelScheme
from memsave.data.volumes.transforms import AUGMENTATIONS, KEYS, START, augment, grid_size, preprocess, resample

Item = dict[str, Any]


class Volumes(Dataset):
    """Whole preprocessed volumes, one per case, with the geometry that `restore` needs to map predictions back.

    An item is a dictionary:

    - `id`, `image` (C, x, y, z) float32 and, if the case has one, `label` (1, x, y, z) uint8, in the orientation of
      BraTS;
    - the original grid: `affine` (4, 4), `spacing` in mm, `shape` and `orientation`;
    - the crop in the reoriented grid: its first voxel `start` and its size `cropped`;
    - `image_spacing`, the size of a voxel of `image` in mm.

    After cropping and normalisation, images (trilinear) and labels (nearest) are resampled to `spacing` (None: the
    file's own). `scheme` is the label scheme (None: that of the cases); all cases must have the same modalities and
    scheme. Up to `cache_bytes` of volumes are cached, and the least recently used are dropped first. Cached tensors
    must not be modified.
    """

    def __init__(
        self,
        cases: Sequence[Case],
        *,
        scheme: LabelScheme | None = None,
        spacing: Sequence[float] | None = None,
        cache_bytes: int = 0,
    ):
        _check_alike(cases, scheme=scheme)
        if spacing is not None and not (len(spacing) == 3 and all(0 < mm < float("inf") for mm in spacing)):
            raise DataError(f"spacing is {list(spacing)}: give three voxel sizes in mm, such as [1, 1, 1].")
        self.cases = list(cases)
        self.scheme = scheme or (cases[0].scheme if cases else BRATS_2021)
        self.modalities = cases[0].modalities if cases else MODALITIES
        self.spacing = None if spacing is None else tuple(float(mm) for mm in spacing)
        self.cache_bytes = cache_bytes
        self._cache: OrderedDict[int, Item] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, index: int) -> Item:
        if not 0 <= index < len(self):
            raise IndexError(f"volume index {index} is out of range for {len(self)} volumes: count from 0.")
        with self._lock:
            if index in self._cache:
                self._cache.move_to_end(index)
                return dict(self._cache[index])
        item = _prepare(self.cases[index], scheme=self.scheme, spacing=self.spacing)
        with self._lock:
            self._cache[index] = item
            while self.cached_bytes() > self.cache_bytes:
                self._cache.popitem(last=False)
        return dict(item)

    def truth(self, index: int) -> torch.Tensor:
        """The label (1, X, Y, Z) uint8 of a case on its original grid, the reference for a restored prediction."""
        return torch.from_numpy(read_label(self.cases[index], scheme=self.scheme))[None]

    def cached_bytes(self) -> int:
        """The bytes of all cached volumes."""
        return sum(item[key].nbytes for item in self._cache.values() for key in KEYS if key in item)


class TrainingCrops:
    """Augmented crops of cases: `image` (C, *crop_size) float32, `label` (1, *crop_size) uint8, and the case's `id`.

    A fraction `foreground` of them is centred on a labelled voxel, `augmentation` is "light" or "full" (`augment`), and
    `spacing` resamples the volumes first, as in `Volumes`; `crop_size` is then in voxels of that spacing. With `count`
    above one an example is so many crops of one case, (count, C, *crop_size).
    """

    def __init__(
        self,
        cases: Sequence[Case],
        *,
        crop_size: Sequence[int],
        seed: int,
        scheme: LabelScheme | None = None,
        spacing: Sequence[float] | None = None,
        foreground: float = 1 / 3,
        augmentation: str = "light",
        count: int = 1,
        cache_bytes: int = 4 * 2**30,
    ):
        if not cases:
            raise DataError("There is no case to train on: add cases or lower validation_fraction.")
        unlabelled = [case.id for case in cases if case.label is None]
        if unlabelled:
            raise DataError(f"Case {unlabelled[0]} has no segmentation to train on: add its seg file or leave it out.")
        if len(crop_size) != 3 or min(crop_size) < 1:
            raise DataError(f"crop_size is {tuple(crop_size)}: choose three positive numbers, such as (96, 96, 96).")
        if not 0 <= foreground <= 1:
            raise DataError(f"foreground is {foreground}: choose a fraction between 0 and 1.")
        if augmentation not in AUGMENTATIONS:
            raise DataError(f"augmentation is {augmentation!r}: choose one of {', '.join(AUGMENTATIONS)}.")
        self.volumes = Volumes(cases, scheme=scheme, spacing=spacing, cache_bytes=cache_bytes)
        self.crop_size = tuple(crop_size)
        self.seed = seed
        self.foreground = foreground
        self.augmentation = augmentation
        self.count = count

    def __len__(self) -> int:
        return len(self.volumes)

    def example(self, case: int, *, draw: int) -> Item:
        """One training example of a case: `crop`, or `crops` if `count` is more than one."""
        return self.crop(case, draw=draw) if self.count == 1 else self.crops(case, draw=draw, count=self.count)

    def crop(self, case: int, *, draw: int) -> Item:
        """An augmented crop of case number `case`; another `draw` gives another crop."""
        crops = self.crops(case, draw=draw, count=1)
        return {**crops, **{key: crops[key][0] for key in KEYS}}

    def crops(self, case: int, *, draw: int, count: int) -> Item:
        """`count` different crops of one case: `image` (count, C, *crop_size), `label` (count, 1, *crop_size), `id`."""
        if count < 1:
            raise DataError(f"the number of crops of a case is {count}: give at least 1.")
        volume = self.volumes[case]
        # built per item, because a MONAI transform holds its random state and workers are threads
        transform = augment(
            self.crop_size,
            foreground=self.foreground,
            augmentation=self.augmentation,
            spacing=volume["image_spacing"],
            count=count,
        ).set_random_state(_item_seed(self.seed, draw, volume["id"]))
        crops = transform({key: volume[key] for key in KEYS})
        # stacking copies; an unchanged crop would otherwise be a view of the cached volume
        return {**{key: torch.stack([_plain(crop[key]) for crop in crops]) for key in KEYS}, "id": volume["id"]}


def uncrop(volume: torch.Tensor, *, start: Sequence[int], shape: Sequence[int]) -> torch.Tensor:
    """Undo the crop to the brain: place (..., x, y, z) at voxel `start` of zeros (..., *shape)."""
    whole = volume.new_zeros((*volume.shape[:-3], *shape))
    x, y, z = (slice(first, first + length) for first, length in zip(start, volume.shape[-3:]))
    whole[..., x, y, z] = volume
    return whole


def restore(prediction: torch.Tensor, item: Item, *, threshold: float = 0.5) -> torch.Tensor:
    """Map a prediction (R, x, y, z) for an item's image to the original grid of the case: boolean (R, X, Y, Z).

    Boolean masks are resampled to the nearest voxel. Probabilities are interpolated trilinearly and compared with
    `threshold`; for logits, pass threshold 0. Voxels outside the crop are False.
    """
    if prediction.dim() != 4 or prediction.shape[1:] != item["image"].shape[1:]:
        shapes = f"{tuple(prediction.shape)} for an image {tuple(item['image'].shape)}"
        raise DataError(f"restore() got a prediction {shapes}: pass (R, x, y, z) of that size.")
    if not (prediction.dtype == torch.bool or prediction.is_floating_point()):
        raise DataError(f"restore() got {prediction.dtype}: pass boolean masks or probabilities.")
    orientation = item["orientation"]
    step = [mm / new for mm, new in zip(orientation.reorder(item["spacing"]), item["image_spacing"])]
    masks = prediction.dtype == torch.bool
    cropped = resample(prediction if masks else prediction.float(), size=item["cropped"], step=step, nearest=masks)
    shape = orientation.reorder(item["shape"])
    return orientation.undo(uncrop(cropped if masks else cropped > threshold, start=item["start"], shape=shape))


def _check_alike(cases: Sequence[Case], *, scheme: LabelScheme | None) -> None:
    for case in cases[1:]:
        for name, one, other in (
            ("modalities", cases[0].modalities, case.modalities),
            ("label schemes", scheme or cases[0].scheme, scheme or case.scheme),
        ):
            if one != other:
                raise DataError(f"Cases {cases[0].id} and {case.id} have different {name}: train on one kind of case.")


def _prepare(case: Case, *, scheme: LabelScheme, spacing: Sequence[float] | None) -> Item:
    scan = read_case(case, scheme=scheme)
    arrays = {"image": torch.from_numpy(scan.image)}
    if scan.label is not None:
        arrays["label"] = torch.from_numpy(scan.label)[None]  # (1, X, Y, Z)
    orientation = Orientation.of(scan.affine)
    prepared = preprocess()({key: orientation.apply(volume) for key, volume in arrays.items()})
    stored = tuple(np.linalg.norm(scan.affine[:3, :3], axis=0).tolist())
    reoriented = orientation.reorder(stored)
    target = reoriented if spacing is None else tuple(spacing)
    cropped = tuple(prepared["image"].shape[1:])
    size = grid_size(cropped, spacing=reoriented, target=target)
    step = [new / mm for mm, new in zip(reoriented, target)]
    # cloned: a view of the crop would keep the whole volume alive in the cache
    tensors = {
        key: resample(_plain(prepared[key]), size=size, step=step, nearest=key == "label").clone(
            memory_format=torch.contiguous_format
        )
        for key in arrays
    }
    return {
        **tensors,
        "id": case.id,
        "affine": torch.from_numpy(scan.affine),
        "spacing": stored,
        "orientation": orientation,
        "image_spacing": target,
        "start": tuple(int(first) for first in prepared[START]),
        "cropped": cropped,
        "shape": tuple(scan.image.shape[1:]),
    }


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor without MONAI's metadata, which is slow to collate and lost in some operations."""
    return tensor.as_subclass(torch.Tensor)


def _item_seed(seed: int, draw: int, name: str) -> int:
    return int(np.random.SeedSequence([seed, draw, *name.encode("utf-8", "surrogatepass")]).generate_state(1)[0])
