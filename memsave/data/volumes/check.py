"""Checks a data set before training and reports every fault.

    python -m memsave.data.check root=/my/BraTS2021
    python -m memsave.data.check root=/my/BraTS2024 layout=brats2024 scheme=brats2024_rc
    python -m memsave.data.check root=/my/lesions layout=folder modalities=[t1ce] mask=label

    root        folder of the cases
    layout      naming of the files (default brats2021): brats2018 - brats2021, brats2023, brats2024, msd, folder
    scheme      meaning of the labels (default: that of the layout): brats2021, brats2023, brats2024, brats2024_rc, msd,
                binary
    modalities  modalities and their order (default: all of the layout)
    mask        layout=folder: the end of the mask's file name (default: seg, label or mask)
    labelled    false: segmentations may be missing (default true)
    workers     number of threads that read (default 2)

The command reads every voxel. It prints one sentence for each fault and a summary to standard output, and progress to
standard error. Exit codes: 0 no fault, 2 faults or bad arguments, 130 interrupted.
"""

import hashlib
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from omegaconf import MISSING

from memsave.arguments import ArgumentError, names_in, parse_arguments
from memsave.data.errors import DataError
from memsave.data.volumes.layouts import Case, duplicates, scan
from memsave.data.volumes.reader import inspect_case
from memsave.data.volumes.schemes import BRATS_2021, SCHEMES, LabelScheme, schemes_with
from memsave.progress import Throttle

WORKERS = "a number from 1 on"


@dataclass
class Arguments:
    """The command-line arguments, described at the top of this file."""

    root: str = MISSING
    layout: str = "brats2021"
    scheme: str | None = None
    modalities: str | None = None
    mask: str | None = None
    labelled: bool = field(default=True, metadata={"expects": "true or false"})
    workers: int = field(default=2, metadata={"expects": WORKERS})


@dataclass(frozen=True)
class CaseSummary:
    """The facts about a case after it was read."""

    id: str
    faults: list[str]
    shape: tuple[int, ...]  # () if no file could be read
    spacing: tuple[float, ...]  # mm
    labels: dict[int, int] | None  # number of voxels by label; None without a usable label file
    digests: dict[str, str]  # hash of the voxels, by modality and for the label


@dataclass(frozen=True)
class Report:
    """The result of `examine`: one sentence per fault, and a summary of each case."""

    faults: list[str]
    cases: list[CaseSummary]
    scheme: LabelScheme

    def table(self) -> str:
        """A table of the number of cases, shapes, voxel sizes, and the number of voxels of each region."""
        labelled = [case for case in self.cases if case.labels is not None]
        shapes = Counter(" x ".join(map(str, case.shape)) for case in self.cases if case.shape)
        spacings = Counter(" x ".join(f"{mm:.4g}" for mm in case.spacing) for case in self.cases if case.spacing)
        lines = [f"{'cases':<9} {len(self.cases)}, of which {len(labelled)} with a label of scheme {self.scheme.name}"]
        for title, counts in (("voxels", shapes), ("size, mm", spacings)):
            lines += [f"{title:<9} {value} ({count})" for value, count in counts.most_common()]
        lines.append(f"{'region':<9} {'cases':>6} {'smallest':>9} {'median':>9} {'largest':>9}  (voxels, if present)")
        for name in self.scheme.names:
            sizes = [size for case in labelled if (size := _region_sizes(case, self.scheme)[name])]
            voxels = (f"{int(size):>9}" for size in (min(sizes), np.median(sizes), max(sizes))) if sizes else ()
            lines.append(" ".join([f"{name:<9} {len(sizes):>6}", *voxels]))
        return "\n".join(lines)


def check_cases(
    cases: Sequence[Case], *, scheme: LabelScheme | None = None, images: bool = True, workers: int = 1
) -> list[str]:
    """One sentence for every fault of every case and of the data set as a whole.

    `scheme=None` uses the scheme of each case. `images=False` reads the labels but only the headers of the images,
    which is much faster: it finds truncated files and cases with equal labels, but no images that are damaged inside,
    zero everywhere or not finite.
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
    """Read `cases`, and the existing files of `incomplete` cases, in `workers` threads.

    `progress(read, total)` is called after each case.
    """
    summaries: list[CaseSummary] = []
    everything = [*cases, *incomplete]
    with ThreadPoolExecutor(workers, thread_name_prefix="memsave-check") as pool:
        for each in pool.map(lambda case: _summarize(case, scheme=scheme, images=images), everything):
            summaries.append(each)
            if progress:
                progress(len(summaries), len(everything))
    faults = [fault for each in summaries for fault in each.faults]
    faults += duplicates(everything) + _copies(summaries)
    schemes = {scheme or case.scheme for case in everything} or {scheme or BRATS_2021}
    if len(schemes) > 1:
        names = ", ".join(sorted(each.name for each in schemes))
        faults.append(f"The cases follow the schemes {names}: check the cases of each scheme separately.")
    else:
        faults += _empty_regions(summaries, *schemes)
    return Report(faults, summaries[: len(cases)], min(schemes, key=lambda each: each.name))


def main(arguments: Sequence[str]) -> int:
    """Run the command line; returns the exit code."""
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0
    try:
        options = _parse(arguments)
        found = scan(
            options.root,
            options.layout,
            scheme=options.scheme,
            modalities=None if options.modalities is None else names_in(options.modalities),
            mask=options.mask,
            labelled=options.labelled,
        )
        progress = _progress_lines()
        report = examine(found.cases, incomplete=found.incomplete, workers=options.workers, progress=progress)
    except (ArgumentError, DataError) as error:
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


def _parse(arguments: Sequence[str]) -> Arguments:
    keys = Counter(argument.partition("=")[0] for argument in arguments)
    for key, count in keys.items():
        if count > 1:
            raise ArgumentError(f"{key} is given twice: give it once.")
    options = parse_arguments(arguments, Arguments, example="root=/my/BraTS2021")
    if options.workers < 1:
        raise ArgumentError(f"workers is {str(options.workers)!r}: give {WORKERS}")
    return options


def _progress_lines() -> Callable[[int, int], None]:
    """A function that prints its counts to standard error every few seconds and at the end."""
    throttle = Throttle(5.0)

    def show(read: int, total: int) -> None:
        if throttle.ready() or read == total:
            print(f"  read {read} of {total} cases", file=sys.stderr)

    return show


def _summarize(case: Case, *, scheme: LabelScheme | None, images: bool) -> CaseSummary:
    found = inspect_case(case, scheme=scheme, images=images)
    spacing = () if found.affine is None else tuple(np.linalg.norm(found.affine[:3, :3], axis=0).tolist())
    labels = None
    if found.label is not None:
        counts = np.bincount(found.label.ravel())
        labels = {int(value): int(counts[value]) for value in np.flatnonzero(counts)}
    volumes = dict(found.volumes)
    if found.label is not None and found.label.any():
        volumes["segmentation"] = found.label
    # transposed because nibabel's volumes are in Fortran order
    digests = {name: hashlib.sha256(np.asfortranarray(it).T.data).hexdigest() for name, it in volumes.items()}
    return CaseSummary(case.id, found.faults, found.shape, spacing, labels, digests)


def _region_sizes(case: CaseSummary, scheme: LabelScheme) -> dict[str, int]:
    """The number of voxels of each region."""
    labels = case.labels or {}
    return {name: sum(labels.get(value, 0) for value in values) for name, values in scheme.regions.items()}


def _copies(summaries: Sequence[CaseSummary]) -> list[str]:
    """One sentence for each set of cases that share an identical image."""
    owners: dict[str, list[tuple[str, str]]] = {}
    for each in summaries:
        for modality, digest in each.digests.items():
            owners.setdefault(digest, []).append((each.id, modality))
    shared: dict[tuple[str, ...], dict[str, None]] = {}
    for images in owners.values():
        ids = tuple(sorted({id for id, _ in images}))
        if len(ids) > 1:
            shared.setdefault(ids, {}).update(dict.fromkeys(modality for _, modality in images))
    return [
        f"Cases {' and '.join(ids)} hold the same voxels ({', '.join(modalities)}): keep one of them, because a split "
        f"may train on one and score another."
        for ids, modalities in shared.items()
    ]


def _empty_regions(summaries: Sequence[CaseSummary], scheme: LabelScheme) -> list[str]:
    """One sentence for each region that no labelled case has."""
    labelled = [each for each in summaries if each.labels is not None]
    found = {value for each in labelled for value in each.labels or ()}
    others = [name for name in schemes_with(found) if all(found & set(of) for of in SCHEMES[name].regions.values())]
    remedy = f"give another scheme, perhaps {' or '.join(others)}" if others else "check the scheme"
    listed = ", ".join(map(str, sorted(found)))
    return [
        f"Region {name} of scheme {scheme.name} is empty in every labelled case ({len(labelled)}, with the labels "
        f"{listed}): {remedy}."
        for name, values in scheme.regions.items()
        if labelled and not found & set(values)
    ]
