"""Reading and checking the files of a case, and conversion between labels and regions.

`layouts.py` finds the files, `nifti.py` reads one file, and `schemes.py` defines the labels. Every label file is
checked against its scheme when it is read.
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
from memsave.data.volumes.schemes import BRATS_2021, LabelScheme, schemes_with

MOST_VOXELS_MOVED = 0.1
"""Largest accepted difference of two affines of one case, in voxels. Rounding of an affine causes less."""


@dataclass(frozen=True)
class Scan:
    """One case as stored on disk, without cropping and normalisation."""

    image: np.ndarray  # (C, X, Y, Z) float32, in the order of the case's modalities
    label: np.ndarray | None  # (X, Y, Z) uint8, of the case's scheme
    affine: np.ndarray  # (4, 4) float64, voxel index to millimetres


@dataclass
class Inspection:
    """The valid volumes of a case, and one sentence for each fault."""

    volumes: dict[str, np.ndarray] = field(default_factory=dict)  # by modality, (X, Y, Z) float32
    label: np.ndarray | None = None  # (X, Y, Z) uint8
    shape: tuple[int, ...] = ()  # (X, Y, Z) of the grid
    affine: np.ndarray | None = None  # (4, 4) float64
    grid: Path | None = None  # the first readable file; the others are compared with it
    faults: list[str] = field(default_factory=list)


def read_case(case: Case, *, scheme: LabelScheme | None = None) -> Scan:
    """Read and check one case; DataError with the first fault of `inspect_case`."""
    found = inspect_case(case, scheme=scheme)
    if found.faults:
        raise DataError(found.faults[0])
    image = np.stack([found.volumes[name] for name in case.modalities])
    return Scan(image=image, label=found.label, affine=np.asarray(found.affine, dtype=np.float64))


def inspect_case(case: Case, *, scheme: LabelScheme | None = None, images: bool = True) -> Inspection:
    """Read one case and collect its faults.

    Faults are unreadable files, different shapes or affines, images that are not finite or zero everywhere, and labels
    outside `scheme` (None: the case's own). `images=False` reads the label but only the headers of the images, and
    `volumes` stays empty.
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
            source = str(path) if case.channels is None else f"{path}, modality {name},"
            finite = np.isfinite(volume).all()
            if finite and volume.any():
                found.volumes[name] = volume
            else:
                fault = "is zero everywhere" if finite else "holds NaN or infinite voxels"
                found.faults.append(f"{source} {fault}: export it again or leave case {case.id} out.")
    if case.label is not None:
        try:
            image = read_nifti(case.label)
            _check_grid(case.label, image, found)
            found.label = _checked_label(case.label, image, scheme=scheme or case.scheme)
        except DataError as error:
            found.faults.append(str(error))
    return found


def read_label(case: Case, *, scheme: LabelScheme | None = None) -> np.ndarray:
    """The label (X, Y, Z) uint8 of a case on its original grid, checked against `scheme` (None: the case's own)."""
    if case.label is None:
        raise DataError(f"Case {case.id} has no segmentation: add its file or leave the case out.")
    image = read_nifti(case.label)
    _check_grid(case.label, image, Inspection())
    return _checked_label(case.label, image, scheme=scheme or case.scheme)


def regions(label: torch.Tensor, *, scheme: LabelScheme = BRATS_2021) -> torch.Tensor:
    """Boolean masks of the R regions: (X, Y, Z) -> (R, X, Y, Z), and (..., 1, X, Y, Z) -> (..., R, X, Y, Z).

    Raises DataError for labels outside the scheme instead of treating them as background.
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
    """`regions` of a checked label (..., 1, X, Y, Z). Never calls `.item()`: it must run under FakeTensorMode."""
    if scheme.any_value:
        return label != 0
    masks = {value: label == value for value in scheme.labels}
    return torch.cat([_union([masks[value] for value in values]) for values in scheme.regions.values()], dim=-4)


def labels_of(masks: torch.Tensor, scheme: LabelScheme = BRATS_2021) -> torch.Tensor:
    """Labels of boolean masks: (R, X, Y, Z) -> (X, Y, Z) uint8, and (..., R, X, Y, Z) -> (..., 1, X, Y, Z).

    The inverse of `regions`. Each region is written with the label that none of its inner regions has, and inner
    regions overwrite outer ones. A voxel predicted as ET is therefore enhancing, also outside TC and WT.
    """
    if masks.dtype != torch.bool or masks.dim() < 4 or masks.shape[-4] != len(scheme.regions):
        raise DataError(
            f"labels_of() got {masks.dtype} of shape {tuple(masks.shape)}: pass boolean masks "
            f"(..., {len(scheme.regions)}, X, Y, Z) of {', '.join(scheme.names)}."
        )
    label_sets = [set(values) for values in scheme.regions.values()]
    depths = [sum(region < other for other in label_sets) for region in label_sets]
    label = torch.zeros_like(masks.select(-4, 0), dtype=torch.uint8)
    for number in sorted(range(len(label_sets)), key=depths.__getitem__):
        own = label_sets[number].difference(*(other for other in label_sets if other < label_sets[number]))
        if len(own) != 1:
            raise DataError(
                f"Region {scheme.names[number]} of scheme {scheme.name} has the labels {sorted(own)} that no inner "
                f"region has: exactly one is needed to write it."
            )
        label[masks.select(-4, number)] = own.pop()
    return label if masks.dim() == 4 else label.unsqueeze(-4)


def _union(masks: Sequence[torch.Tensor]) -> torch.Tensor:
    union = masks[0]
    for mask in masks[1:]:
        union = union | mask
    return union


def _by_modality(case: Case, path: Path, voxels: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (modality, its volume) for each modality in a file."""
    if case.channels is None:
        yield case.modalities[case.images.index(path)], voxels
        return
    for name, channel in zip(case.modalities, case.channels, strict=True):
        yield name, voxels[..., channel]


def _check_grid(path: Path, image: Any, found: Inspection, *, channels: Sequence[int] | None = None) -> None:
    """Compare the grid of a file with that of the case, which the first readable file sets."""
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
    """The largest distance between the positions of one voxel under two affines: (in mm, in voxels of `other`)."""
    corners = np.array(list(itertools.product(*((0, length - 1) for length in shape))))  # (8, 3): the maximum is there
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
    # counting bytes is many times faster than sorting the voxels
    values = np.flatnonzero(np.bincount(small.ravel())) if same else np.unique(label)
    found = values.tolist()
    if not scheme.fits(found):
        raise DataError(f"{path} holds {_misfit(found, scheme=scheme)}.")
    return (label != 0).astype(np.uint8) if scheme.any_value else small


def _rounded(label: np.ndarray, *, step: float) -> np.ndarray:
    """Round labels that differ from an integer only by rounding errors; interpolated labels differ by more.

    A program that saves labels as scaled integers stores multiples of `step` (4/255 for labels 0 to 4 in bytes), which
    differ from integers by up to half a step. Labels saved as floats differ by float rounding. The tolerance is
    smallest at 0: a mask that stores 1/255 or 1/65535 for 1 must not become empty.
    """
    whole = np.rint(label)
    near = np.abs(label - whole) <= np.clip(1e-3 * np.abs(whole) + step / 2, 1e-5, 0.01)
    return np.where(near, whole, label)


def _misfit(found: Sequence[float], *, scheme: LabelScheme) -> str:
    """The end of an error message: the labels found, those of the scheme, and the schemes that would fit."""
    listed = ", ".join(map(_format_label, found[:8])) + (", ..." if len(found) > 8 else "")
    expected = "one lesion label" if scheme.any_value else ", ".join(map(str, scheme.values))
    others = schemes_with(found)
    remedy = f"give the scheme that they follow, perhaps {' or '.join(others)}" if others else "map them to that scheme"
    return f"the labels {listed}, and scheme {scheme.name} has {expected}: {remedy}"


def _format_label(value: float) -> str:
    """The number with six digits, or with all digits if six would make it look like an integer."""
    short = f"{value:g}"
    return short if float(short) == value or not float(short).is_integer() else repr(value)
