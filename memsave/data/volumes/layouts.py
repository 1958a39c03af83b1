"""Layouts: the naming conventions of data sets, the search for cases, and the label scheme of each (`schemes.py`).

The user names the layout; it is never guessed.

    layout            a case                                               labels
    brats2018 - 2021  ID/ID_{t1,t1ce,t2,flair,seg}.nii[.gz], at any depth  1 necrosis, 2 edema, 4 enhancing
    brats2023         ID/ID-{t1n,t1c,t2w,t2f,seg}.nii[.gz], at any depth   1 necrosis, 2 edema, 3 enhancing
    brats2024         the same names; after treatment                      as 2023, and 4 resection cavity
    msd               {imagesTr,labelsTr}/ID.nii[.gz], four channels:      1 edema, 2 necrosis, 3 enhancing
                      FLAIR, T1w, T1gd, T2w
    folder            ID_{MODALITY,MASK}.nii[.gz], in one folder or many   one lesion, one nonzero value

`msd` is Task01_BrainTumour of the Medical Segmentation Decathlon (Antonelli et al., Nature Communications 2022); its
`imagesTs` have no labels. The modalities of all challenges are returned as t1, t1ce, t2, flair. Files whose names
start with a dot are ignored. This module lists folders and opens no file.
"""

import itertools
import os
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from memsave.data.errors import DataError, raise_first
from memsave.data.volumes.schemes import BINARY, BRATS_2021, MSD, SCHEMES, LabelScheme

MODALITIES = ("t1", "t1ce", "t2", "flair")
MASKS = ("seg", "label", "mask")
"""The default ends of mask names in the layout `folder`."""
_SUFFIXES = (".nii.gz", ".nii")


@dataclass(frozen=True)
class Case:
    """The files of one scan of a patient, and their content."""

    id: str
    images: tuple[Path, ...]  # one 3D file per modality; with `channels`, one 4D file
    label: Path | None
    modalities: tuple[str, ...] = MODALITIES
    scheme: LabelScheme = BRATS_2021
    channels: tuple[int, ...] | None = None  # positions of the modalities in the 4D file
    patient: str | None = None  # set if ids number the scans of a patient

    @property
    def files(self) -> tuple[Path, ...]:
        """The images and the mask."""
        return self.images if self.label is None else (*self.images, self.label)


@dataclass(frozen=True)
class ScanResult:
    """The result of `scan`: complete cases, the existing files of incomplete ones, and one sentence per fault."""

    cases: list[Case]
    incomplete: list[Case]
    faults: list[str]


@dataclass(frozen=True)
class _Files:
    """The candidate files of a case, by modality; more than one candidate is ambiguous."""

    id: str
    folder: Path
    images: dict[str, list[Path]]
    masks: list[Path]
    missing: dict[str, str] = field(default_factory=dict)  # expected file name, by modality or "mask"
    others: tuple[str, ...] = ()  # other NIfTI files in the case's folder
    test: bool = False  # in a part of the data set without labels


@dataclass(frozen=True)
class Layout:
    """The positions of the files of a data set, its names of the modalities, and its usual label scheme."""

    name: str
    scheme: LabelScheme
    modalities: Mapping[str, str]  # canonical name: name in the files
    find: Callable[..., tuple[list[_Files], list[str]]]
    expected: str  # description for error messages
    separator: str = "_"
    patient: str = ""  # pattern of ids that number the scans of a patient; its first group is the patient
    channels: tuple[str, ...] = ()  # of the 4D file, if the layout has one


def find_cases(
    root: str | Path,
    layout: str = "brats2021",
    *,
    scheme: str | None = None,
    modalities: Sequence[str] | None = None,
    mask: str | None = None,
    labelled: bool = True,
) -> list[Case]:
    """All cases below `root`, sorted by id; with `labelled=False` a case without segmentation has label None.

    `scheme` is a key of SCHEMES (None: that of the layout). `modalities` selects and orders the modalities of the
    layout. For the layout `folder` it gives the ends of the files' names, and `mask` that of the mask (None: one of
    MASKS). Raises DataError with the first fault, such as an incomplete case.
    """
    found = scan(root, layout, scheme=scheme, modalities=modalities, mask=mask, labelled=labelled)
    options = {"modalities": modalities, "mask": mask, "labelled": None if labelled else "false"}
    raise_first(found.faults + duplicates(found.cases), root=root, layout=layout, **options)
    return found.cases


def scan(
    root: str | Path,
    layout: str = "brats2021",
    *,
    scheme: str | None = None,
    modalities: Sequence[str] | None = None,
    mask: str | None = None,
    labelled: bool = True,
) -> ScanResult:
    """As `find_cases`, but collects all faults; DataError if no case is found."""
    root = Path(root).expanduser()
    if layout not in LAYOUTS:
        raise DataError(f"layout is {layout!r}: choose one of {', '.join(LAYOUTS)}.")
    if scheme is not None and scheme not in SCHEMES:
        raise DataError(f"scheme is {scheme!r}: choose one of {', '.join(SCHEMES)}.")
    if not root.is_dir():
        raise DataError(f"The data folder {root} does not exist: give the folder that holds the cases.")
    chosen = LAYOUTS[layout]
    names = _modalities(chosen, modalities)
    masks = [name for name in MASKS if name not in names] if mask is None else [mask]
    if mask is not None and (chosen.modalities or mask in names):
        raise DataError(
            f"mask={mask} is only for layout=folder, and must not be one of its modalities: remove or change it."
        )
    found = _found(root, chosen, names, masks, scheme=scheme, labelled=labelled)
    if not found.cases:
        partial = any(2 * len(case.images) > len(names) for case in found.incomplete)
        hint = "" if layout == "folder" else _other_layout(root, labelled=labelled, partial=partial)
        if hint:
            raise DataError(f"No case below {root} has the files of layout {layout}, {chosen.expected}: {hint}.")
        if not found.faults:
            raise DataError(f"No NIfTI file of layout {layout} lies below {root}: expected {chosen.expected}.")
    return found


def _other_layout(root: Path, *, labelled: bool, partial: bool) -> str:
    """A hint at the layout that the files below the root follow; empty if they follow none.

    `partial`: some case has most of the files of the given layout, so `folder` would be a wrong guess.
    """
    challenges = [each for each in LAYOUTS.values() if each.modalities]
    fits = [each.name for each in challenges if _found(root, each, each.modalities, [], labelled=labelled).cases]
    remedy = "give the layout that they follow, perhaps"
    if fits:
        return f"{remedy} {' or '.join(fits)} (in a run, data.layout={fits[0]})"
    if partial:
        return ""
    parts = ",".join(_parts_of_named_files(root))
    if parts:
        overrides = shlex.join(["data.layout=folder", f"data.modalities=[{parts}]"])
        return f"{remedy} folder with modalities=[{parts}] (in a run, {overrides})"
    if any(folder == root for folder, _ in _walk(root)):
        expected = LAYOUTS["folder"].expected
        return f"give each case a folder, or give layout=folder (in a run, data.layout=folder) for {expected}"
    return ""


def _parts_of_named_files(root: Path) -> list[str]:
    """The ends of image names that exist for every mask of the layout `folder`, if masks end with one of MASKS."""
    common: set[str] | None = None
    for _, names in _walk(root):
        stems = [_stem(name) or "" for name in names]
        for id in {stem.removesuffix(f"_{mask}") for stem in stems for mask in MASKS if stem.endswith(f"_{mask}")}:
            parts = {stem.removeprefix(f"{id}_") for stem in stems if stem.startswith(f"{id}_")}.difference(MASKS)
            common = parts if common is None else common & parts
    return sorted(common or (), key=lambda part: (part not in MODALITIES, (*MODALITIES, part).index(part), part))


def _found(
    root: Path,
    layout: Layout,
    modalities: Mapping[str, str],
    masks: Sequence[str],
    *,
    scheme: str | None = None,
    labelled: bool,
) -> ScanResult:
    files, faults = layout.find(root, layout, modalities, masks)
    found = ScanResult(cases=[], incomplete=[], faults=faults)
    for each in sorted(files, key=lambda each: each.id):
        if each.test and labelled:
            continue
        problems = _problems(each, labelled=labelled)
        case = _case(each, layout, scheme=layout.scheme if scheme is None else SCHEMES[scheme])
        (found.incomplete if problems else found.cases).append(case)
        found.faults.extend(problems)
    return found


def duplicates(cases: Sequence[Case]) -> list[str]:
    """One sentence for each id that occurs more than once."""
    ordered = sorted(cases, key=lambda case: case.id)
    faults = []
    for first, second in itertools.pairwise(ordered):
        if first.id == second.id:
            files = [path for case in (first, second) for path in (*case.images, case.label)[:1] if path]
            folders = " and ".join(str(path.parent) for path in files)
            faults.append(f"Case {first.id} occurs twice, in {folders}: remove or rename one of the two.")
    return faults


def _modalities(layout: Layout, modalities: Sequence[str] | None) -> dict[str, str]:
    """The names of the chosen modalities in the files, by canonical name."""
    if not modalities:
        if layout.modalities:
            return dict(layout.modalities)
        raise DataError("layout=folder needs modalities, the ends of the names of its files, as in modalities=[t1ce].")
    unknown = [name for name in modalities if layout.modalities and name not in layout.modalities]
    if unknown:
        raise DataError(
            f"layout={layout.name} has no modality {unknown[0]!r}: choose from {', '.join(layout.modalities)}."
        )
    if len(set(modalities)) < len(modalities):
        raise DataError(f"modalities are {', '.join(modalities)}: give each of them once.")
    return {name: layout.modalities.get(name, name) for name in modalities}


def _problems(files: _Files, *, labelled: bool) -> list[str]:
    missing = [name for part, name in files.missing.items() if part != "mask" or labelled]
    problems = []
    if missing:
        others = f" (its folder also holds {', '.join(files.others[:3])})" if files.others else ""
        problems.append(
            f"Case {files.folder} misses {', '.join(missing)}{others}: "
            f"add or rename the files, or move the case out of the root."
        )
    for candidates in (*files.images.values(), files.masks):
        if len(candidates) > 1:
            names = " and ".join(path.name for path in candidates)
            problems.append(
                f"Case {files.folder} has several files for one modality or mask, {names}: keep one of them, or give "
                f"mask= for a mask."
            )
    return list(dict.fromkeys(problems))  # the modalities of a 4D file share one problem


def _case(files: _Files, layout: Layout, *, scheme: LabelScheme) -> Case:
    existing = {name: paths[0] for name, paths in files.images.items() if paths}
    images = tuple(dict.fromkeys(existing.values()))
    scan_of = re.fullmatch(layout.patient, files.id) if layout.patient else None
    return Case(
        id=files.id,
        images=images,
        label=files.masks[0] if files.masks else None,
        modalities=tuple(existing),
        scheme=scheme,
        channels=tuple(layout.channels.index(name) for name in existing) if layout.channels else None,
        patient=scan_of.group(1) if scan_of else None,
    )


def _stem(name: str) -> str | None:
    """The name of a NIfTI file without its suffix; None for other files."""
    suffix = next((suffix for suffix in _SUFFIXES if name.endswith(suffix)), None)
    return None if suffix is None or name.startswith(".") else name.removesuffix(suffix)


def _walk(root: Path) -> Iterator[tuple[Path, list[str]]]:
    """Yield every folder that directly contains NIfTI files, with their names."""
    # os.walk, because data sets are often assembled from symbolic links, which Path.rglob does not follow
    for folder, _, names in sorted(os.walk(root, followlinks=True)):
        images = sorted(name for name in names if _stem(name))
        if images:
            yield Path(folder), images


def _case_folders(
    root: Path, layout: Layout, modalities: Mapping[str, str], masks: Sequence[str]
) -> tuple[list[_Files], list[str]]:
    """Every folder that directly contains NIfTI files is a case with the folder's name."""
    found = []
    for folder, names in _walk(root):
        prefix = f"{folder.name}{layout.separator}"
        files: dict[str, list[Path]] = {}
        for name in names:
            files.setdefault(_stem(name) or "", []).append(folder / name)
        images = {name: files.get(prefix + part, []) for name, part in modalities.items()}
        mask = files.get(f"{prefix}seg", [])
        missing = {name: f"{prefix}{part}.nii.gz" for name, part in modalities.items() if not images[name]}
        if not mask:
            missing["mask"] = f"{prefix}seg.nii.gz"
        own = {f"{prefix}{part}" for part in ("seg", *layout.modalities.values())}
        others = tuple(path.name for stem, paths in files.items() if stem not in own for path in paths)
        found.append(_Files(folder.name, folder, images, mask, missing, others))
    return found, []


def _named_files(
    root: Path, layout: Layout, modalities: Mapping[str, str], masks: Sequence[str]
) -> tuple[list[_Files], list[str]]:
    """Files of one folder with the same start of their names are a case with this name."""
    parts = sorted({*modalities, *masks}, key=len, reverse=True)
    found, faults = [], []
    for folder, names in _walk(root):
        cases: dict[str, dict[str, list[Path]]] = {}
        for name in names:
            stem = _stem(name) or ""
            part = next((part for part in parts if stem.endswith(f"_{part}") and stem != f"_{part}"), None)
            if part is not None:
                case = cases.setdefault(stem.removesuffix(f"_{part}"), {})
                case.setdefault(part, []).append(folder / name)
        for name in names:
            if not any(name.startswith(f"{case}_") for case in cases):
                faults.append(
                    f"{folder / name} belongs to no case: rename it to ID_{next(iter(modalities))}.nii.gz with the ID "
                    f"of its case, or move it out of the root."
                )
        for id, files in cases.items():
            images = {name: files.get(name, []) for name in modalities}
            mask = [path for name in masks for path in files.get(name, [])]
            missing = {name: f"{id}_{name}.nii.gz" for name in modalities if not images[name]}
            if not mask:
                missing["mask"] = " or ".join(f"{id}_{name}.nii.gz" for name in masks)
            found.append(_Files(id, folder if folder.name == id else folder / id, images, mask, missing))
    return found, faults


def _decathlon(
    root: Path, layout: Layout, modalities: Mapping[str, str], masks: Sequence[str]
) -> tuple[list[_Files], list[str]]:
    """A case is a 4D file of `imagesTr` with its label in `labelsTr`, or a file of `imagesTs` without a label."""

    def files_of(name: str) -> dict[str, list[Path]]:
        folder = root / name
        files: dict[str, list[Path]] = {}
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            stem = _stem(path.name)
            if stem is not None:
                files.setdefault(stem, []).append(path)
        return files

    found = []
    labels = files_of("labelsTr")
    for folder in ("imagesTr", "imagesTs"):
        images = files_of(folder)
        for case in sorted({*images, *labels} if folder == "imagesTr" else images):
            paths, mask = images.get(case, []), labels.get(case, []) if folder == "imagesTr" else []
            missing = {} if paths else {"image": f"{folder}/{case}.nii.gz"}
            if not mask:
                missing["mask"] = f"labelsTr/{case}.nii.gz"
            test = folder == "imagesTs"
            found.append(_Files(case, root / case, dict.fromkeys(modalities, paths), mask, missing, test=test))
    return found, []


def _years(years: Iterable[int], names: Sequence[str], *, separator: str, patient: str = "") -> dict[str, Layout]:
    expected = f"folders like ID/ID{separator}{names[0]}.nii.gz, one per case"
    files = dict(zip(MODALITIES, names, strict=True))
    return {
        name: Layout(name, SCHEMES[name], files, _case_folders, expected, separator=separator, patient=patient)
        for name in (f"brats{year}" for year in years)
    }


LAYOUTS: dict[str, Layout] = {
    **_years(range(2018, 2022), MODALITIES, separator="_"),
    # BraTS-GLI-00005-101 is another scan of the patient of BraTS-GLI-00005-100
    **_years((2023, 2024), ("t1n", "t1c", "t2w", "t2f"), separator="-", patient=r"(.+-\d+)-\d{3}"),
    "msd": Layout(
        "msd",
        MSD,
        {name: name for name in MODALITIES},
        _decathlon,
        "imagesTr/BRATS_001.nii.gz and labelsTr/BRATS_001.nii.gz directly below it",
        channels=("flair", "t1", "t1ce", "t2"),
    ),
    "folder": Layout("folder", BINARY, {}, _named_files, "files like ID_MODALITY.nii.gz and ID_MASK.nii.gz"),
}
_CANONICAL = {theirs: ours for layout in LAYOUTS.values() for ours, theirs in layout.modalities.items()}


def canonical_name(name: str) -> str:
    """The canonical name of a modality, such as t1 for t1n of BraTS 2023; unknown names are returned unchanged."""
    return _CANONICAL.get(name, name)


def in_order(names: Sequence[str], like: Sequence[str]) -> list[str] | None:
    """`names` in the order of `like`, matched literally or by canonical name; None if they are another set."""
    for key in (str, canonical_name):
        by_key, order = {key(name): name for name in names}, [key(name) for name in like]
        if len(by_key) == len(names) and sorted(by_key) == sorted(order):
            return [by_key[name] for name in order]
    return None
