"""Phantoms: synthetic BraTS cases on disk, so that everything runs before anyone has downloaded a patient.

Their heads are drawn from ellipsoids ("drawn") or sampled from the MNI152 template ("mni152", which needs nilearn).
`write_phantoms` writes cases in the layout that `memsave.data.volumes.reader` reads, one NIfTI file per modality.
`ensure_phantoms` keeps them in a cache folder named after their settings; a folder appears there complete or not at
all, so killed and concurrent generations do no harm. Case i depends on (seed, i) and the settings alone.
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

VERSION = 1  # raise it with every change of what is drawn: the cache then generates anew
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
    """Write `cases` phantoms of `size` voxels below `root` and return them; `progress` hears a line now and then.

    The fraction `without_enhancing` of the cases, evenly spread, has no enhancing tissue, as low-grade tumours have
    none. Voxels are 1 mm whatever the size: a small phantom is a small head. ModuleNotFoundError for the anatomy
    "mni152" without nilearn.
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
    """The phantoms of these settings from the cache `root` ($MEMSAVE_CACHE or ~/.cache/memsave), made if need be."""
    drawn: dict[str, Any] = {"cases": cases, "size": size, "seed": seed, "anatomy": anatomy}
    drawn["without_enhancing"] = without_enhancing
    folder = cached_folder(
        root,
        name=f"{'mni-' if anatomy == 'mni152' else ''}phantom-{'x'.join(map(str, size))}-n{cases}-seed{seed}",
        settings={"version": VERSION, **drawn, "size": list(size)},
        make=lambda path: write_phantoms(path, **drawn, progress=progress),
    )
    found = find_cases(folder)
    if len(found) != cases:
        raise DataError(f"The cache {folder} holds {len(found)} of {cases} phantoms: delete it to have it made again.")
    return found


def _check_settings(*, cases: int, size: Size, without_enhancing: float, anatomy: str) -> None:
    if anatomy not in ANATOMIES:
        raise DataError(f"anatomy is {anatomy!r}: choose one of {', '.join(ANATOMIES)}.")
    if cases < 1:
        raise DataError(f"The number of phantoms is {cases}: ask for at least 1.")
    if len(size) != 3 or any(not low <= n <= high for low, n, high in zip(SMALLEST, size, LARGEST)):
        raise DataError(f"The phantom size is {tuple(size)}: choose three numbers from {SMALLEST} to {LARGEST}.")
    if not 0 <= without_enhancing <= 1:
        raise DataError(f"without_enhancing is {without_enhancing}: choose a fraction between 0 and 1.")


def _write_case(root: Path, *, index: int, size: Size, seed: int, enhancing: bool, anatomy: str) -> None:
    import nibabel

    from memsave.data.volumes.phantoms.anatomy import DRAWN
    from memsave.data.volumes.phantoms.mni import MNI152
    from memsave.data.volumes.phantoms.synthesis import synthesise

    kind = MNI152 if anatomy == "mni152" else DRAWN
    image, label = synthesise(size, anatomy=kind, rng=np.random.default_rng([seed, index]), enhancing=enhancing)
    name = f"Phantom_{index:05d}"
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    # BraTS counts x and y towards the patient's left and back, against the axes of NIfTI
    affine = np.diag([-1.0, -1.0, 1.0, 1.0])
    affine[1, 3] = size[1] - 1
    for part, volume in zip((*MODALITIES, "seg"), (*image, label)):
        nifti = nibabel.Nifti1Image(volume, affine)
        nifti.header.set_xyzt_units("mm")
        nibabel.save(nifti, folder / f"{name}_{part}.nii.gz")
