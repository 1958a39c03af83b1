"""Phantoms: synthetic BraTS cases on disk, for running everything without patient data.

Heads are drawn from ellipsoids ("drawn") or sampled from the MNI152 template ("mni152", which needs nilearn).
`write_phantoms` writes cases in the layout of BraTS 2021, one NIfTI file per modality. `ensure_phantoms` keeps them in
a cache folder named after their settings. A folder appears there complete or not at all, so killed and concurrent
processes leave no partial folder. Case i depends only on (seed, i) and the settings.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from memsave.data.cache import cached_folder
from memsave.data.errors import DataError
from memsave.data.volumes.layouts import MODALITIES, Case, find_cases
from memsave.progress import Throttle

VERSION = 1  # increase it when the phantoms change: the cache then generates them again
ANATOMIES = ("drawn", "mni152")
SMALLEST, LARGEST = (16, 16, 16), (240, 240, 155)

Size = tuple[int, int, int]


def write_phantoms(
    root: str | Path,
    *,
    cases: int = 16,
    size: Size = (96, 96, 80),
    seed: int = 0,
    without_enhancing: float = 0.125,
    anatomy: str = "drawn",
    progress: Callable[[str], None] | None = None,
) -> list[Case]:
    """Write `cases` phantoms of `size` voxels below `root` and return them.

    The fraction `without_enhancing` of the cases, evenly distributed, has no enhancing tissue, like low-grade tumours.
    Voxels always have 1 mm, so a small phantom is a small head. `progress(line)` is called every few seconds. Raises
    ModuleNotFoundError for the anatomy "mni152" if nilearn is not installed.
    """
    _check_settings(cases=cases, size=size, without_enhancing=without_enhancing, anatomy=anatomy)
    throttle = Throttle()
    for index in range(cases):
        if progress and throttle.ready():
            progress(f"  made {index} of {cases} phantoms")
        spread = math.floor((index + 1) * without_enhancing) - math.floor(index * without_enhancing)
        _write_case(Path(root), index=index, size=size, seed=seed, enhancing=spread == 0, anatomy=anatomy)
    return find_cases(root)


def ensure_phantoms(
    root: str | Path | None = None,
    *,
    cases: int = 16,
    size: Size = (96, 96, 80),
    seed: int = 0,
    without_enhancing: float = 0.125,
    anatomy: str = "drawn",
    progress: Callable[[str], None] | None = None,
) -> list[Case]:
    """Return the phantoms of these settings from the cache `root` (see `cache_root`), or generate them."""
    settings: dict[str, Any] = {"cases": cases, "size": size, "seed": seed, "anatomy": anatomy}
    settings["without_enhancing"] = without_enhancing
    folder = cached_folder(
        root,
        name=f"{'mni-' if anatomy == 'mni152' else ''}phantom-{'x'.join(map(str, size))}-n{cases}-seed{seed}",
        settings={"version": VERSION, **settings, "size": list(size)},
        make=lambda path: write_phantoms(path, **settings, progress=progress),
    )
    found = find_cases(folder)
    if len(found) != cases:
        raise DataError(
            f"The cache {folder} holds {len(found)} of {cases} phantoms: delete it, and it is generated again."
        )
    return found


def _check_settings(*, cases: int, size: Size, without_enhancing: float, anatomy: str) -> None:
    if anatomy not in ANATOMIES:
        raise DataError(f"anatomy is {anatomy!r}: choose one of {', '.join(ANATOMIES)}.")
    if cases < 1:
        raise DataError(f"The number of phantoms is {cases}: give at least 1.")
    if len(size) != 3 or any(not low <= n <= high for low, n, high in zip(SMALLEST, size, LARGEST)):
        raise DataError(f"The phantom size is {tuple(size)}: choose three numbers from {SMALLEST} to {LARGEST}.")
    if not 0 <= without_enhancing <= 1:
        raise DataError(f"without_enhancing is {without_enhancing}: choose a fraction between 0 and 1.")


def _write_case(root: Path, *, index: int, size: Size, seed: int, enhancing: bool, anatomy: str) -> None:
    import nibabel

    from memsave.data.volumes.phantoms.anatomy import DRAWN
    from memsave.data.volumes.phantoms.mni import MNI152
    from memsave.data.volumes.phantoms.synthesis import synthesise

    chosen = MNI152 if anatomy == "mni152" else DRAWN
    image, label = synthesise(size, anatomy=chosen, rng=np.random.default_rng([seed, index]), enhancing=enhancing)
    name = f"Phantom_{index:05d}"
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    # in BraTS x and y point to the patient's left and back, against the axes of NIfTI
    affine = np.diag([-1.0, -1.0, 1.0, 1.0])
    affine[1, 3] = size[1] - 1
    for part, volume in zip((*MODALITIES, "seg"), (*image, label)):
        nifti = nibabel.Nifti1Image(volume, affine)
        nifti.header.set_xyzt_units("mm")
        nibabel.save(nifti, folder / f"{name}_{part}.nii.gz")
