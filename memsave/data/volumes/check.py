"""Checks a data set before anything is trained on it, and says everything that is wrong with it.

    python -m memsave.data.check root=/my/BraTS2021
    python -m memsave.data.check root=/my/BraTS2024 layout=brats2024 scheme=brats2024_rc
    python -m memsave.data.check root=/my/lesions layout=folder modalities=[t1ce] mask=label

    root        the folder of the cases
    layout      how its files are named (brats2021): brats2018 - brats2021, brats2023, brats2024, msd, folder
    scheme      what its labels mean (the layout's own): brats2021, brats2023, brats2024, brats2024_rc, msd, binary
    modalities  which ones, in which order (all of the layout's)
    mask        layout=folder: what the mask's file ends in (seg, label or mask)
    labelled    false: segmentations may be missing (true)
    workers     threads that read (2)

Every voxel is read. On standard output there is one sentence for each fault, then a summary; progress is on standard
error. Exit codes: 0 the data set is fine, 2 it is not or the arguments are not, 130 interrupted.
"""

import hashlib
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from memsave.data.errors import DataError
from memsave.data.volumes.layouts import Case, duplicates, scan
from memsave.data.volumes.reader import inspect_case
from memsave.data.volumes.schemes import BRATS_2021, SCHEMES, LabelScheme, fitting

SECONDS_BETWEEN_LINES = 5.0
KEYS = ("root", "layout", "scheme", "modalities", "mask", "labelled", "workers")


@dataclass(frozen=True)
class Known:
    """What is known of a case once it has been read."""

    id: str
    faults: list[str]
    shape: tuple[int, ...]  # () where no file could be read
    spacing: tuple[float, ...]  # mm
    labels: dict[int, int] | None  # voxels by label; None without a label or with one that could not be used
    digests: dict[str, str]  # of the voxels, by modality and of the label


@dataclass(frozen=True)
class Report:
    """What `examine` found: one sentence per fault, and what is known of each case."""

    faults: list[str]
    cases: list[Known]
    scheme: LabelScheme

    def table(self) -> str:
        """The data set in numbers: cases, shapes, voxel sizes, and the voxels of each region."""
        labelled = [known for known in self.cases if known.labels is not None]
        shapes = Counter(" x ".join(map(str, known.shape)) for known in self.cases if known.shape)
        spacings = Counter(" x ".join(f"{mm:.4g}" for mm in known.spacing) for known in self.cases if known.spacing)
        lines = [f"{'cases':<9} {len(self.cases)}, of which {len(labelled)} with a label of scheme {self.scheme.name}"]
        for title, counts in (("voxels", shapes), ("size, mm", spacings)):
            lines += [f"{title:<9} {what} ({count})" for what, count in counts.most_common()]
        lines.append(f"{'region':<9} {'cases':>6} {'smallest':>9} {'median':>9} {'largest':>9}  (voxels, where it is)")
        for name in self.scheme.names:
            sizes = [size for known in labelled if (size := _voxels_of(known, self.scheme)[name])]
            voxels = (f"{int(size):>9}" for size in (min(sizes), np.median(sizes), max(sizes))) if sizes else ()
            lines.append(" ".join([f"{name:<9} {len(sizes):>6}", *voxels]))
        return "\n".join(lines)


def check_cases(
    cases: Sequence[Case], *, scheme: LabelScheme | None = None, images: bool = True, workers: int = 1
) -> list[str]:
    """One sentence for every fault of every case, and of the data set as a whole; none where it is fine.

    `scheme` None is each case's own. With `images=False` the voxels of the labels and only the headers of the images
    are read, in a fraction of the time: truncated files are found, and copies of a case by their label; images that are
    damaged inside, empty or not finite are not.
    """
    return examine(cases, scheme=scheme, images=images, workers=workers).faults


def examine(
    cases: Sequence[Case],
    *,
    incomplete: Sequence[Case] = (),
    scheme: LabelScheme | None = None,
    images: bool = True,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Read all cases by `workers` threads, and what there is of `incomplete` ones; `progress` hears (read, of all)."""
    known: list[Known] = []
    everything = [*cases, *incomplete]
    with ThreadPoolExecutor(workers, thread_name_prefix="memsave-check") as pool:
        for each in pool.map(lambda case: _know(case, scheme=scheme, images=images), everything):
            known.append(each)
            if progress:
                progress(len(known), len(everything))
    faults = [fault for each in known for fault in each.faults]
    faults += duplicates(everything) + _copies(known)
    schemes = {scheme or case.scheme for case in everything} or {scheme or BRATS_2021}
    if len(schemes) > 1:
        names = ", ".join(sorted(each.name for each in schemes))
        faults.append(f"The cases follow the schemes {names}: check the cases of each by themselves.")
    else:
        faults += _empty_regions(known, *schemes)
    return Report(faults, known[: len(cases)], min(schemes, key=lambda each: each.name))


def main(arguments: Sequence[str]) -> int:
    """Check what the arguments name; the exit code."""
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0
    try:
        settings = _settings(arguments)
        workers = settings.pop("workers")
        found = scan(**settings)
        report = examine(found.cases, incomplete=found.incomplete, workers=workers, progress=_Lines())
    except DataError as error:
        print(f"memsave: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(f"memsave: {error.name} is not installed: pip install 'memsave[brats]'", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    faults = found.faults + report.faults
    for fault in faults:
        print(fault)
    print(report.table())
    print(f"{len(faults)} faults" if len(faults) != 1 else "1 fault")
    return 2 if faults else 0


def _know(case: Case, *, scheme: LabelScheme | None, images: bool) -> Known:
    found = inspect_case(case, scheme=scheme, images=images)
    spacing = () if found.affine is None else tuple(np.linalg.norm(found.affine[:3, :3], axis=0).tolist())
    labels = None
    if found.label is not None:
        counts = np.bincount(found.label.ravel())
        labels = {int(value): int(counts[value]) for value in np.flatnonzero(counts)}
    # transposed, for nibabel's volumes lie in Fortran's order
    voxels = dict(found.volumes)
    if found.label is not None and found.label.any():
        voxels["segmentation"] = found.label
    digests = {name: hashlib.sha256(np.asfortranarray(it).T.data).hexdigest() for name, it in voxels.items()}
    return Known(case.id, found.faults, found.shape, spacing, labels, digests)


def _voxels_of(known: Known, scheme: LabelScheme) -> dict[str, int]:
    labels = known.labels or {}
    return {name: sum(labels.get(value, 0) for value in values) for name, values in scheme.regions.items()}


def _copies(known: Sequence[Known]) -> list[str]:
    """One sentence for each set of ids that share an image, voxel for voxel."""
    owners: dict[str, list[tuple[str, str]]] = {}
    for each in known:
        for modality, digest in each.digests.items():
            owners.setdefault(digest, []).append((each.id, modality))
    shared: dict[tuple[str, ...], dict[str, None]] = {}
    for images in owners.values():
        ids = tuple(sorted({id for id, _ in images}))
        if len(ids) > 1:
            shared.setdefault(ids, {}).update(dict.fromkeys(modality for _, modality in images))
    return [
        f"Cases {' and '.join(ids)} hold the same voxels ({', '.join(modalities)}): keep one of them, for a split may "
        f"train on one and score another."
        for ids, modalities in shared.items()
    ]


def _empty_regions(known: Sequence[Known], scheme: LabelScheme) -> list[str]:
    """One sentence for each region that no labelled case has."""
    labelled = [each for each in known if each.labels is not None]
    found = {value for each in labelled for value in each.labels or ()}
    others = [name for name in fitting(found) if all(found & set(of) for of in SCHEMES[name].regions.values())]
    remedy = f"give another scheme, perhaps {' or '.join(others)}" if others else "check the scheme"
    listed = ", ".join(map(str, sorted(found)))
    return [
        f"Region {name} of scheme {scheme.name} is empty in every labelled case ({len(labelled)}, with the labels "
        f"{listed}): {remedy}."
        for name, values in scheme.regions.items()
        if labelled and not found & set(values)
    ]


def _settings(arguments: Sequence[str]) -> dict[str, Any]:
    """The arguments of `scan`, and workers."""
    given: dict[str, str] = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or not value:
            raise DataError(
                f"{argument!r} cannot be read: arguments have the form key=value, as in root=/my/BraTS2021."
            )
        if key not in KEYS:
            raise DataError(f"{key} is not known: the keys are {', '.join(KEYS)}.")
        if key in given:
            raise DataError(f"{key} is given twice: give it once.")
        given[key] = value
    if "root" not in given:
        raise DataError("root is not given: name the folder of the cases, as in root=/my/BraTS2021.")
    settings: dict[str, Any] = {"workers": 2, **given}
    if "modalities" in given:
        settings["modalities"] = [name.strip() for name in given["modalities"].strip("[]").split(",") if name.strip()]
    if given.get("labelled", "true") not in ("true", "false"):
        raise DataError(f"labelled is {given['labelled']!r}: give true or false.")
    settings["labelled"] = given.get("labelled", "true") == "true"
    if not str(settings["workers"]).isdecimal() or int(settings["workers"]) < 1:
        raise DataError(f"workers is {settings['workers']!r}: give a number from 1 on.")
    settings["workers"] = int(settings["workers"])
    return settings


class _Lines:
    """A line on standard error now and then, and one at the end."""

    def __init__(self) -> None:
        self.last = time.monotonic()

    def __call__(self, read: int, total: int) -> None:
        now = time.monotonic()
        if read == total or now - self.last >= SECONDS_BETWEEN_LINES:
            self.last = now
            print(f"  read {read} of {total} cases", file=sys.stderr)
