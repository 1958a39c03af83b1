"""The folder layout and the labels of BraTS 2018-2021.

A case is a folder `ID` that holds `ID_{t1,t1ce,t2,flair,seg}.nii.gz` (or `.nii`), anywhere below a root: 2018 and
2019 sort their cases into `HGG/` and `LGG/`. Labels are 1 necrosis, 2 edema, 4 enhancing; scores are taken on three
nested regions instead:

    WT (whole tumour) = {necrosis, edema, enhancing}    TC (tumour core) = {necrosis, enhancing}    ET = {enhancing}

A label scheme that does not fit the files would give an empty region and no error, so the scheme is explicit and
every label file is checked against it. nibabel is imported when a file is read.
"""

import gzip
import itertools
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from memsave.data.errors import DataError

MODALITIES = ("t1", "t1ce", "t2", "flair")
REGIONS = ("wt", "tc", "et")
_SUFFIXES = (".nii.gz", ".nii")


@dataclass(frozen=True)
class LabelScheme:
    """The integers that stand for the three tumour tissues; 0 is always everything else."""

    name: str
    necrosis: int
    edema: int
    enhancing: int

    @property
    def values(self) -> tuple[int, ...]:
        """Every integer that a label file may hold."""
        return (0, *sorted((self.necrosis, self.edema, self.enhancing)))

    @property
    def regions(self) -> dict[str, tuple[int, ...]]:
        """The labels that make up each of REGIONS, in that order."""
        core = (self.necrosis, self.enhancing)
        return {"wt": (*core, self.edema), "tc": core, "et": (self.enhancing,)}


BRATS_2021 = LabelScheme("BraTS 2018-2021", necrosis=1, edema=2, enhancing=4)


@dataclass(frozen=True)
class Case:
    """The files of one patient: the images in the order of MODALITIES, and the label where there is one."""

    id: str
    images: tuple[Path, ...]
    label: Path | None


@dataclass(frozen=True)
class Scan:
    """One case in memory, as stored on disk: nothing is cropped or normalised."""

    image: np.ndarray  # (4, X, Y, Z) float32, in the order of MODALITIES
    label: np.ndarray | None  # (X, Y, Z) uint8
    affine: np.ndarray  # (4, 4) float64, voxel index to millimetres


def find_cases(root: str | Path, *, labelled: bool = True) -> list[Case]:
    """Every case below `root`, sorted by id; with `labelled=False` a case without segmentation has label None.

    A folder that directly holds a NIfTI file is a case and has to be a complete one: nothing is skipped silently.
    """
    root = Path(root).expanduser()
    if not root.is_dir():
        raise DataError(f"The data folder {root} does not exist: give the folder that holds the BraTS case folders.")
    # os.walk, since data sets are often assembled from symbolic links, which Path.rglob does not follow
    walk = sorted(os.walk(root, followlinks=True))
    folders = [Path(folder) for folder, _, names in walk if any(_is_nifti(name) for name in names)]
    if not folders:
        raise DataError(f"No NIfTI file lies below {root}: expected folders like ID/ID_t1.nii.gz, one per case.")
    cases = sorted((_case(folder, labelled=labelled) for folder in folders), key=lambda case: case.id)
    for first, second in itertools.pairwise(cases):
        if first.id == second.id:
            where = f"{first.images[0].parent} and {second.images[0].parent}"
            raise DataError(f"Case {first.id} occurs twice, in {where}: remove or rename one of the two folders.")
    return cases


def read_case(case: Case, *, scheme: LabelScheme = BRATS_2021) -> Scan:
    """Read and check one case: readable files, one shape and affine, finite non-empty images, labels of `scheme`."""
    volumes: list[np.ndarray] = []
    affine = None
    for path in case.images:
        image = _load(path)
        affine = image.affine if affine is None else affine
        _check_grid(path, image, reference=case.images[0], affine=affine, shape=volumes[0].shape if volumes else None)
        volume = _voxels(path, image)
        if not np.isfinite(volume).all() or not volume.any():
            fault = "is zero everywhere" if np.isfinite(volume).all() else "holds NaN or infinite voxels"
            raise DataError(f"{path} {fault}: export it again or leave case {case.id} out.")
        volumes.append(volume)
    label = None
    if case.label is not None:
        image = _load(case.label)
        _check_grid(case.label, image, reference=case.images[0], affine=affine, shape=volumes[0].shape)
        label = _checked_label(case.label, _voxels(case.label, image), scheme=scheme)
    return Scan(image=np.stack(volumes), label=label, affine=np.asarray(affine, dtype=np.float64))


def regions(label: torch.Tensor, *, scheme: LabelScheme = BRATS_2021) -> torch.Tensor:
    """The boolean masks of REGIONS: (X, Y, Z) -> (3, X, Y, Z), and (..., 1, X, Y, Z) -> (..., 3, X, Y, Z)."""
    if label.dim() == 3:
        label = label[None]  # (1, X, Y, Z)
    if label.dim() < 4 or label.shape[-4] != 1:
        shape = tuple(label.shape)
        raise DataError(f"regions() got a label of shape {shape}: pass (X, Y, Z) or (..., 1, X, Y, Z).")
    masks = []
    for values in scheme.regions.values():
        mask = label == values[0]
        for value in values[1:]:
            mask = mask | (label == value)
        masks.append(mask)
    return torch.cat(masks, dim=-4)


def split_cases(cases: Sequence[Case], *, validation_fraction: float = 0.2, seed: int) -> tuple[list[Case], list[Case]]:
    """Split by case into (train, validation), each sorted by id and never empty; the same for the same ids and seed."""
    if len(cases) < 2:
        raise DataError(f"A split needs at least 2 cases and got {len(cases)}: add cases to the data folder.")
    if not 0 < validation_fraction < 1:
        raise DataError(f"validation_fraction is {validation_fraction}: choose a number between 0 and 1, such as 0.2.")
    count = min(max(round(len(cases) * validation_fraction), 1), len(cases) - 1)
    ordered = sorted(cases, key=lambda case: case.id)
    chosen = set(np.random.default_rng(seed).permutation(len(ordered))[:count].tolist())
    train = [case for index, case in enumerate(ordered) if index not in chosen]
    return train, [ordered[index] for index in sorted(chosen)]


def _is_nifti(name: str) -> bool:
    return name.endswith(_SUFFIXES) and not name.startswith(".")


def _case(folder: Path, *, labelled: bool) -> Case:
    def find(part: str) -> Path | None:
        candidates = (folder / f"{folder.name}_{part}{suffix}" for suffix in _SUFFIXES)
        return next((path for path in candidates if path.is_file()), None)

    images, label = [find(part) for part in MODALITIES], find("seg")
    missing = [part for part, path in zip(MODALITIES, images) if path is None]
    if labelled and label is None:
        missing.append("seg")
    if missing:
        names = ", ".join(f"{folder.name}_{part}.nii.gz" for part in missing)
        raise DataError(f"Case {folder} misses {names}: add or rename the files, or move the folder out of the root.")
    return Case(id=folder.name, images=tuple(path for path in images if path is not None), label=label)


def _load(path: Path):
    """The NIfTI image at `path`, from its complete bytes: gzip then verifies the checksum of the whole file."""
    import nibabel
    from nibabel.filebasedimages import ImageFileError
    from nibabel.spatialimages import HeaderDataError
    from nibabel.wrapstruct import WrapStructError

    try:
        content = path.read_bytes()
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
        return nibabel.Nifti1Image.from_bytes(content)
    except (OSError, EOFError, ValueError, zlib.error, ImageFileError, HeaderDataError, WrapStructError) as error:
        raise _unreadable(path, error) from error


def _voxels(path: Path, image) -> np.ndarray:
    """The voxels as float32, which holds every label and every int16 intensity exactly."""
    try:
        return image.get_fdata(dtype=np.float32, caching="unchanged")
    except (OSError, ValueError) as error:  # fewer bytes than the header promises
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> DataError:
    cause = " ".join(str(error).split()) or type(error).__name__
    return DataError(f"{path} is not a readable NIfTI file ({cause}): download or copy it again.")


def _check_grid(path: Path, image, *, reference: Path, affine, shape: tuple[int, ...] | None) -> None:
    if len(image.shape) != 3:
        raise DataError(f"{path} has shape {image.shape} and should be one 3D volume: split it into one file each.")
    if shape is not None and image.shape != shape:
        raise DataError(f"{path} has shape {image.shape} but {reference.name} has {shape}: resample it to that grid.")
    if not np.allclose(image.affine, affine, atol=1e-3):
        difference = float(np.abs(image.affine - affine).max())
        raise DataError(
            f"{path} has an affine that differs from that of {reference.name} by up to {difference:g} mm: "
            f"register it to that image."
        )


def _checked_label(path: Path, label: np.ndarray, *, scheme: LabelScheme) -> np.ndarray:
    foreign = label[~np.isin(label, scheme.values)]
    if foreign.size:
        found = ", ".join(f"{value:g}" for value in np.unique(foreign)[:8])
        raise DataError(
            f"{path} holds the labels {found}, which {scheme.name} does not have (expected {scheme.values}): "
            f"map the labels to that scheme."
        )
    return label.astype(np.uint8)
