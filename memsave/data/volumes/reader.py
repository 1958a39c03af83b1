"""Cases in memory: reading and checking their files, and regions from labels and back.

Which files they are is a matter of `layouts.py`, how a file is read of `nifti.py`, and what its labels mean of
`schemes.py`. Every label file is checked against its scheme when it is read.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from memsave.data.errors import DataError
from memsave.data.volumes.layouts import Case
from memsave.data.volumes.nifti import read_header, read_intensities, read_nifti, read_values, step_of
from memsave.data.volumes.schemes import BRATS_2021, LabelScheme, fitting

MOST_VOXELS_MOVED = 0.1
"""By how much the affines of two files of one case may differ: rounding an affine moves its voxels by less."""


@dataclass(frozen=True)
class Scan:
    """One case in memory, as stored on disk: nothing is cropped or normalised."""

    image: np.ndarray  # (C, X, Y, Z) float32, in the order of the case's modalities
    label: np.ndarray | None  # (X, Y, Z) uint8, of the case's scheme
    affine: np.ndarray  # (4, 4) float64, voxel index to millimetres


@dataclass
class Inspection:
    """What of a case is in order, and one sentence for each thing that is not."""

    volumes: dict[str, np.ndarray] = field(default_factory=dict)  # by modality, (X, Y, Z) float32
    label: np.ndarray | None = None  # (X, Y, Z) uint8
    shape: tuple[int, ...] = ()  # (X, Y, Z) of the grid
    affine: np.ndarray | None = None  # (4, 4) float64
    grid: Path | None = None  # the first readable file, which the others are compared with
    faults: list[str] = field(default_factory=list)


def read_case(case: Case, *, scheme: LabelScheme | None = None) -> Scan:
    """Read and check one case; DataError with the first of the faults that `inspect_case` finds."""
    found = inspect_case(case, scheme=scheme)
    if found.faults:
        raise DataError(found.faults[0])
    image = np.stack([found.volumes[name] for name in case.modalities])
    return Scan(image=image, label=found.label, affine=np.asarray(found.affine, dtype=np.float64))


def inspect_case(case: Case, *, scheme: LabelScheme | None = None, images: bool = True) -> Inspection:
    """Read one case: readable files, one shape and affine, finite nonzero images, labels of `scheme` (None: its own).

    With `images=False` only the headers of the images are read, and the label: `volumes` stays empty.
    """
    found = Inspection()
    for path in case.images:
        try:
            image = read_nifti(path) if images else read_header(path)
            _check_grid(path, image, found, channels=case.channels)
            if not images:
                continue
            voxels = read_intensities(path, image)
        except DataError as error:
            found.faults.append(str(error))
            continue
        for name, volume in _by_modality(case, path, voxels):
            what = str(path) if case.channels is None else f"{path}, modality {name},"
            finite = np.isfinite(volume).all()
            if finite and volume.any():
                found.volumes[name] = volume
            else:
                fault = "is zero everywhere" if finite else "holds NaN or infinite voxels"
                found.faults.append(f"{what} {fault}: export it again or leave case {case.id} out.")
    if case.label is not None:
        try:
            image = read_nifti(case.label)
            _check_grid(case.label, image, found)
            found.label = _checked_label(case.label, image, scheme=scheme or case.scheme)
        except DataError as error:
            found.faults.append(str(error))
    return found


def read_label(case: Case, *, scheme: LabelScheme | None = None) -> np.ndarray:
    """The label of a case on its original grid, (X, Y, Z) uint8, checked against `scheme` (None: the case's own)."""
    if case.label is None:
        raise DataError(f"Case {case.id} has no segmentation: add its file or leave the case out.")
    image = read_nifti(case.label)
    _check_grid(case.label, image, Inspection())
    return _checked_label(case.label, image, scheme=scheme or case.scheme)


def regions(label: torch.Tensor, *, scheme: LabelScheme = BRATS_2021) -> torch.Tensor:
    """The boolean masks of the R regions: (X, Y, Z) -> (R, X, Y, Z), and (..., 1, X, Y, Z) -> (..., R, X, Y, Z).

    A label that the scheme does not have is an error and no background.
    """
    if label.dim() == 3:
        label = label[None]  # (1, X, Y, Z)
    if label.dim() < 4 or label.shape[-4] != 1:
        shape = tuple(label.shape)
        raise DataError(f"regions() got a label of shape {shape}: pass (X, Y, Z) or (..., 1, X, Y, Z).")
    found = label.unique().tolist()
    if not scheme.fits(found):
        raise DataError(f"regions() got {_misfit(found, scheme=scheme)}.")
    return masks_of(label, scheme=scheme)


def masks_of(label: torch.Tensor, *, scheme: LabelScheme) -> torch.Tensor:
    """`regions` of a label (..., 1, X, Y, Z) that was checked when it was read; asks for no value, as no step may."""
    if scheme.any_value:
        return label != 0
    of = {value: label == value for value in scheme.labels}
    return torch.cat([_union([of[value] for value in values]) for values in scheme.regions.values()], dim=-4)


def labels_of(masks: torch.Tensor, scheme: LabelScheme = BRATS_2021) -> torch.Tensor:
    """The labels of boolean masks: (R, X, Y, Z) -> (X, Y, Z) uint8, and (..., R, X, Y, Z) -> (..., 1, X, Y, Z).

    The inverse of `regions`: each region is written in the label that it has and the regions within it have not, inner
    regions over outer ones. So ET is enhancing wherever it is predicted, also outside of TC and WT.
    """
    if masks.dtype != torch.bool or masks.dim() < 4 or masks.shape[-4] != len(scheme.regions):
        raise DataError(
            f"labels_of() got {masks.dtype} of shape {tuple(masks.shape)}: pass boolean masks "
            f"(..., {len(scheme.regions)}, X, Y, Z) of {', '.join(scheme.names)}."
        )
    within = [set(values) for values in scheme.regions.values()]
    depths = [sum(region < other for other in within) for region in within]
    label = torch.zeros_like(masks.select(-4, 0), dtype=torch.uint8)
    for number in sorted(range(len(within)), key=depths.__getitem__):
        own = within[number].difference(*(other for other in within if other < within[number]))
        if len(own) != 1:
            raise DataError(
                f"Region {scheme.names[number]} of scheme {scheme.name} has the labels {sorted(own)} to itself: "
                f"it can be written with exactly one."
            )
        label[masks.select(-4, number)] = own.pop()
    return label if masks.dim() == 4 else label.unsqueeze(-4)


def _union(masks: Sequence[torch.Tensor]) -> torch.Tensor:
    union = masks[0]
    for mask in masks[1:]:
        union = union | mask
    return union


def _by_modality(case: Case, path: Path, voxels: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """(modality, its volume) of each modality in a file."""
    if case.channels is None:
        yield case.modalities[case.images.index(path)], voxels
        return
    for name, channel in zip(case.modalities, case.channels, strict=True):
        yield name, voxels[..., channel]


def _check_grid(path: Path, image, found: Inspection, *, channels: Sequence[int] | None = None) -> None:
    """Compare a file with the grid of the case; the first file that has one sets it."""
    shape = tuple(image.shape)
    if channels is None and len(shape) != 3:
        raise DataError(f"{path} has shape {shape} and should be one 3D volume: split it into one file each.")
    if channels is not None and (len(shape) != 4 or shape[3] <= max(channels)):
        raise DataError(f"{path} has shape {shape} and should hold {max(channels) + 1} channels: give another layout.")
    affine = np.asarray(image.affine, dtype=np.float64)
    if not np.isfinite(affine).all() or np.linalg.matrix_rank(affine[:3, :3]) < 3:
        raise DataError(f"{path} has an affine that gives its voxels no size: export it again with its geometry.")
    if found.grid is None or found.affine is None:
        found.shape, found.affine, found.grid = shape[:3], affine, path
    if shape[:3] != found.shape:
        raise DataError(
            f"{path} has shape {shape[:3]} but {found.grid.name} has {found.shape}: resample it to that grid."
        )
    moved, voxels = _displacement(affine, found.affine, shape=found.shape)
    if voxels > MOST_VOXELS_MOVED:
        raise DataError(
            f"{path} has an affine that moves voxels by up to {moved:.3g} mm against that of {found.grid.name}, which "
            f"is {voxels:.2g} times their width and may be {MOST_VOXELS_MOVED:g}: register it to that image."
        )


def _displacement(affine: np.ndarray, other: np.ndarray, *, shape: Sequence[int]) -> tuple[float, float]:
    """How far apart two affines put the voxel for which this is most: (in mm, in voxels of `other`)."""
    corners = np.array(list(itertools.product(*((0, length - 1) for length in shape))))  # (8, 3): the most is at one
    difference = affine - other
    moved = corners @ difference[:3, :3].T + difference[:3, 3]  # (8, 3), mm
    voxels = moved @ np.linalg.inv(other[:3, :3]).T
    return float(np.linalg.norm(moved, axis=1).max()), float(np.abs(voxels).max())


def _checked_label(path: Path, image: Any, *, scheme: LabelScheme) -> np.ndarray:
    label = read_values(path, image)
    with np.errstate(invalid="ignore"):
        small = label.astype(np.uint8)
        same = np.array_equal(small, label)
        if not same and label.dtype.kind == "f":
            label = _rounded(label, step=step_of(image))
            small = label.astype(np.uint8)
            same = np.array_equal(small, label)
    # counting bytes is many times as fast as sorting the voxels
    values = np.flatnonzero(np.bincount(small.ravel())) if same else np.unique(label)
    found = values.tolist()
    if not scheme.fits(found):
        raise DataError(f"{path} holds {_misfit(found, scheme=scheme)}.")
    return (label != 0).astype(np.uint8) if scheme.any_value else small


def _rounded(label: np.ndarray, *, step: float) -> np.ndarray:
    """The labels with integers where they differ from one by rounding alone; interpolated labels differ by more.

    A program that saves labels as scaled integers puts `step` between neighbouring values (4/255 where it spreads 0 to
    4 over bytes), and an integer comes back off by up to half of it. A file of floats is off by float arithmetic. At 0
    the tolerance is smallest: a mask that holds 1/255 or 1/65535 for 1 must not become an empty one.
    """
    whole = np.rint(label)
    near = np.abs(label - whole) <= np.clip(1e-3 * np.abs(whole) + step / 2, 1e-5, 0.01)
    return np.where(near, whole, label)


def _misfit(found: Sequence[float], *, scheme: LabelScheme) -> str:
    """The end of a sentence: which labels were found, what the scheme has, and what would fit."""
    listed = ", ".join(map(_told, found[:8])) + (", ..." if len(found) > 8 else "")
    takes = "one lesion label" if scheme.any_value else ", ".join(map(str, scheme.values))
    others = fitting(found)
    remedy = f"give the scheme that they follow, perhaps {' or '.join(others)}" if others else "map them to that scheme"
    return f"the labels {listed}, and scheme {scheme.name} has {takes}: {remedy}"


def _told(value: float) -> str:
    """The number in six digits, or in all of them where it would look like an integer that it is not."""
    short = f"{value:g}"
    return short if float(short) == value or not float(short).is_integer() else repr(value)
