"""How data sets name their files: layouts, the cases they find, and the label scheme of each (`schemes.py`).

A layout is chosen by name, never guessed.

    layout            a case                                               labels
    brats2018 - 2021  ID/ID_{t1,t1ce,t2,flair,seg}.nii[.gz], at any depth  1 necrosis, 2 edema, 4 enhancing
    brats2023         ID/ID-{t1n,t1c,t2w,t2f,seg}.nii[.gz], at any depth   1 necrosis, 2 edema, 3 enhancing
    brats2024         the same names; after treatment                      as 2023, and 4 resection cavity
    msd               {imagesTr,labelsTr}/ID.nii[.gz], four channels:      1 edema, 2 necrosis, 3 enhancing
                      FLAIR, T1w, T1gd, T2w
    folder            ID_{MODALITY,MASK}.nii[.gz], in one folder or many   one lesion, one nonzero value

`msd` is Task01_BrainTumour of the Medical Segmentation Decathlon (Antonelli et al., Nature Communications 2022); its
`imagesTs` have no labels. Whatever a file calls them, the modalities of a challenge come as t1, t1ce, t2, flair.
Files whose names start with a dot are no data. Only folders are listed here; no file is opened.
"""

import itertools
import os
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from memsave.data.errors import DataError
from memsave.data.volumes.schemes import BINARY, BRATS_2021, MSD, SCHEMES, LabelScheme

MODALITIES = ("t1", "t1ce", "t2", "flair")
MASKS = ("seg", "label", "mask")
"""What the mask of the layout `folder` may be called."""
_SUFFIXES = (".nii.gz", ".nii")


@dataclass(frozen=True)
class Case:
    """The files of one scan of a patient, and what is in them."""

    id: str
    images: tuple[Path, ...]  # one 3D file per modality; with `channels`, one 4D file
    label: Path | None
    modalities: tuple[str, ...] = MODALITIES
    scheme: LabelScheme = BRATS_2021
    channels: tuple[int, ...] | None = None  # where in the 4D file the modalities are
    patient: str | None = None  # where ids number the scans of a patient

    @property
    def files(self) -> tuple[Path, ...]:
        """Images and mask."""
        return self.images if self.label is None else (*self.images, self.label)


@dataclass(frozen=True)
class Found:
    """What lies below a root: complete cases, what there is of the others, and one sentence per fault."""

    cases: list[Case]
    incomplete: list[Case]
    faults: list[str]


@dataclass(frozen=True)
class _Files:
    """The candidates for the files of a case, by modality; more than one is ambiguous."""

    id: str
    where: Path
    images: dict[str, list[Path]]
    masks: list[Path]
    missing: dict[str, str] = field(default_factory=dict)  # what the file of a modality, or "mask", should be called
    others: tuple[str, ...] = ()  # NIfTI files in the case's folder that are none of its own
    test: bool = False  # of a part of the data set that has no labels


@dataclass(frozen=True)
class Layout:
    """Where the files of a data set lie, what it calls its modalities, and the scheme its labels usually follow."""

    name: str
    scheme: LabelScheme
    modalities: Mapping[str, str]  # our name: theirs
    find: Callable[..., tuple[list[_Files], list[str]]]
    expected: str  # for people
    separator: str = "_"
    patient: str = ""  # a pattern of ids that number the scans of the patient in its first group
    channels: tuple[str, ...] = ()  # of the 4D file, where there is one


def find_cases(
    root: str | Path,
    layout: str = "brats2021",
    *,
    scheme: str | None = None,
    modalities: Sequence[str] | None = None,
    mask: str | None = None,
    labelled: bool = True,
) -> list[Case]:
    """Every case below `root`, sorted by id; with `labelled=False` a case without segmentation has label None.

    `scheme` is one of SCHEMES (None: the layout's own). `modalities` chooses some of the layout's, in that order; for
    the layout `folder` it says what the files end in, and `mask` what the mask's file does (None: one of MASKS).
    A case has to be a complete one: DataError says what is wrong with the first that is not.
    """
    found = scan(root, layout, scheme=scheme, modalities=modalities, mask=mask, labelled=labelled)
    faults = found.faults + duplicates(found.cases)
    if len(faults) > 1:
        rest = "1 more fault is" if len(faults) == 2 else f"{len(faults) - 1} more faults are"
        given = {
            "modalities": f"[{','.join(modalities or ())}]" if modalities else None,
            "mask": mask,
            "labelled": None if labelled else "false",
        }
        more = [f"{key}={value}" for key, value in given.items() if value is not None]
        command = shlex.join(["python", "-m", "memsave.data.check", f"root={root}", f"layout={layout}", *more])
        raise DataError(f"{faults[0].removesuffix('.')}; {rest} listed by {command}.")
    if faults:
        raise DataError(faults[0])
    return found.cases


def scan(
    root: str | Path,
    layout: str = "brats2021",
    *,
    scheme: str | None = None,
    modalities: Sequence[str] | None = None,
    mask: str | None = None,
    labelled: bool = True,
) -> Found:
    """As `find_cases`, but with every fault; DataError where there is nothing to look at."""
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
        raise DataError(f"mask={mask} is for layout=folder, and for none of its modalities: leave it out or change it.")
    found = _found(root, chosen, names, masks, scheme=scheme, labelled=labelled)
    if not found.cases:
        partly = any(2 * len(case.images) > len(names) for case in found.incomplete)
        hint = "" if layout == "folder" else _other_layout(root, labelled=labelled, partly=partly)
        if hint:
            raise DataError(f"No case below {root} has the files of layout {layout}, {chosen.expected}: {hint}.")
        if not found.faults:
            raise DataError(f"No NIfTI file of layout {layout} lies below {root}: expected {chosen.expected}.")
    return found


def _other_layout(root: Path, *, labelled: bool, partly: bool) -> str:
    """What to say of the layout that the files below the root follow; empty where they follow none.

    `partly`: cases have most of the files of the layout that was given; `folder` would then be a wrong guess.
    """
    known = [each for each in LAYOUTS.values() if each.modalities]
    fits = [each.name for each in known if _found(root, each, each.modalities, [], labelled=labelled).cases]
    follow = "give the layout that they follow, which may be"
    if fits:
        return f"{follow} {' or '.join(fits)} (in a run, data.layout={fits[0]})"
    if partly:
        return ""
    parts = ",".join(_parts_of_named_files(root))
    if parts:
        given = shlex.join(["data.layout=folder", f"data.modalities=[{parts}]"])
        return f"{follow} folder with modalities=[{parts}] (in a run, {given})"
    if any(folder == root for folder, _ in _walk(root)):
        expected = LAYOUTS["folder"].expected
        return f"give each case a folder, or give layout=folder (in a run, data.layout=folder), which is for {expected}"
    return ""


def _parts_of_named_files(root: Path) -> list[str]:
    """What the images end in that every mask of the layout `folder` has beside it, where masks are called MASKS."""
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
) -> Found:
    files, faults = layout.find(root, layout, modalities, masks)
    found = Found(cases=[], incomplete=[], faults=faults)
    for each in sorted(files, key=lambda each: each.id):
        if each.test and labelled:
            continue
        problems = _problems(each, labelled=labelled)
        case = _case(each, layout, scheme=layout.scheme if scheme is None else SCHEMES[scheme])
        (found.incomplete if problems else found.cases).append(case)
        found.faults.extend(problems)
    return found


def duplicates(cases: Sequence[Case]) -> list[str]:
    """One sentence for every id that occurs more than once."""
    ordered = sorted(cases, key=lambda case: case.id)
    faults = []
    for first, second in itertools.pairwise(ordered):
        if first.id == second.id:
            files = [path for case in (first, second) for path in (*case.images, case.label)[:1] if path]
            where = " and ".join(str(path.parent) for path in files)
            faults.append(f"Case {first.id} occurs twice, in {where}: remove or rename one of the two.")
    return faults


def _modalities(layout: Layout, modalities: Sequence[str] | None) -> dict[str, str]:
    """What the files call the chosen modalities, by our names."""
    if not modalities:
        if layout.modalities:
            return dict(layout.modalities)
        raise DataError("layout=folder needs the modalities that its files end in, as in modalities=[t1ce].")
    unknown = [name for name in modalities if layout.modalities and name not in layout.modalities]
    if unknown:
        raise DataError(
            f"layout={layout.name} has no modality {unknown[0]!r}: choose from {', '.join(layout.modalities)}."
        )
    if len(set(modalities)) < len(modalities):
        raise DataError(f"modalities are {', '.join(modalities)}: name each of them once.")
    return {name: layout.modalities.get(name, name) for name in modalities}


def _problems(files: _Files, *, labelled: bool) -> list[str]:
    missing = [name for part, name in files.missing.items() if part != "mask" or labelled]
    problems = []
    if missing:
        others = f" (its folder also holds {', '.join(files.others[:3])})" if files.others else ""
        problems.append(
            f"Case {files.where} misses {', '.join(missing)}{others}: "
            f"add or rename the files, or move the case out of the root."
        )
    for candidates in (*files.images.values(), files.masks):
        if len(candidates) > 1:
            names = " and ".join(path.name for path in candidates)
            problems.append(f"Case {files.where} has {names} for one thing: keep one, or give mask= for a mask.")
    return list(dict.fromkeys(problems))  # the modalities of a 4D file share theirs


def _case(files: _Files, layout: Layout, *, scheme: LabelScheme) -> Case:
    there = {name: paths[0] for name, paths in files.images.items() if paths}
    images = tuple(dict.fromkeys(there.values()))
    scan_of = re.fullmatch(layout.patient, files.id) if layout.patient else None
    return Case(
        id=files.id,
        images=images,
        label=files.masks[0] if files.masks else None,
        modalities=tuple(there),
        scheme=scheme,
        channels=tuple(layout.channels.index(name) for name in there) if layout.channels else None,
        patient=scan_of.group(1) if scan_of else None,
    )


def _stem(name: str) -> str | None:
    """The name of a NIfTI file without its suffix; None for any other file."""
    suffix = next((suffix for suffix in _SUFFIXES if name.endswith(suffix)), None)
    return None if suffix is None or name.startswith(".") else name.removesuffix(suffix)


def _walk(root: Path) -> Iterator[tuple[Path, list[str]]]:
    """Every folder that directly holds NIfTI files, with their names."""
    # os.walk, since data sets are often assembled from symbolic links, which Path.rglob does not follow
    for folder, _, names in sorted(os.walk(root, followlinks=True)):
        images = sorted(name for name in names if _stem(name))
        if images:
            yield Path(folder), images


def _case_folders(
    root: Path, layout: Layout, modalities: Mapping[str, str], masks: Sequence[str]
) -> tuple[list[_Files], list[str]]:
    """A folder that directly holds NIfTI files is a case of the folder's name."""
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
    """Files of one folder whose names have the same beginning are a case of that name."""
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
                    f"{folder / name} belongs to no case: name it ID_{next(iter(modalities))}.nii.gz with the ID of "
                    f"its case, or move it out of the root."
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
    """A 4D file of `imagesTr` with the label of its name in `labelsTr`, and those of `imagesTs` without one."""

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
_OURS = {theirs: ours for layout in LAYOUTS.values() for ours, theirs in layout.modalities.items()}


def canonical_name(name: str) -> str:
    """Our name for the modality that a challenge's files call so, as t1 for t1n; any other name stays as it is."""
    return _OURS.get(name, name)


def in_order(names: Sequence[str], like: Sequence[str]) -> list[str] | None:
    """`names` in the order of `like`, by what they mean where the names differ; None where they are another set."""
    for key in (str, canonical_name):
        by_key, wanted = {key(name): name for name in names}, [key(name) for name in like]
        if len(by_key) == len(names) and sorted(by_key) == sorted(wanted):
            return [by_key[name] for name in wanted]
    return None
