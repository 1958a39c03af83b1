"""Splits into training and held-out cases: random, by folds, or from a file. Scans of a patient stay together."""

import csv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from memsave.data.errors import DataError
from memsave.data.volumes.layouts import Case
from memsave.files import parse_json

SPLITS = ("train", "validation", "test")


def split_cases(cases: Sequence[Case], *, validation_fraction: float = 0.2, seed: int) -> tuple[list[Case], list[Case]]:
    """Split into (train, validation), both sorted by id and not empty; it depends only on the ids and the seed.

    All scans of a patient (`Case.patient`) are on one side, and the fraction refers to patients.
    """
    patients = _patients(cases)
    if len(patients) < 2:
        raise DataError(f"A split needs at least 2 patients and got {len(patients)}: add cases to the data folder.")
    if not 0 < validation_fraction < 1:
        raise DataError(f"validation_fraction is {validation_fraction}: choose a number between 0 and 1, such as 0.2.")
    count = min(max(round(len(patients) * validation_fraction), 1), len(patients) - 1)
    return _divide(patients, np.random.default_rng(seed).permutation(len(patients))[:count].tolist())


def fold(cases: Sequence[Case], *, folds: int = 5, number: int = 0, seed: int) -> tuple[list[Case], list[Case]]:
    """Split into (train, validation), both sorted by id; validation is fold `number` (from 0) of `folds`.

    The folds are disjoint, cover all cases, and differ in size by at most one patient. A patient's scans stay
    together.
    """
    patients = _patients(cases)
    if not 2 <= folds <= len(patients):
        raise DataError(f"folds is {folds} for {len(patients)} patients: choose a number from 2 to {len(patients)}.")
    if not 0 <= number < folds:
        raise DataError(f"fold is {number} of {folds} folds: count from 0.")
    return _divide(patients, np.random.default_rng(seed).permutation(len(patients))[number::folds].tolist())


def split_from_file(cases: Sequence[Case], path: str | Path) -> tuple[list[Case], list[Case]]:
    """Split into (train, validation), both sorted by id, from a JSON or CSV file.

    JSON is {"train": [ids], "validation": [ids]}, CSV has the columns id and split. The file must list every case once;
    cases of the split "test" are not used.
    """
    path = Path(path).expanduser()
    side: dict[str, str] = {}
    for name, split in _listed(path):
        if split not in SPLITS:
            raise DataError(f"{path} names the split {split!r}: call it one of {', '.join(SPLITS)}.")
        if name in side:
            sides = f"in {side[name]} and in {split}" if side[name] != split else f"in {split}"
            raise DataError(f"{path} lists case {name} twice, {sides}: list it once.")
        side[name] = split
    ids = {case.id for case in cases}
    for name in side:
        if name not in ids:
            raise DataError(f"{path} lists case {name}, which the data folder does not have: remove or correct the id.")
    ordered = sorted(cases, key=lambda case: case.id)
    sides_of: dict[str, str] = {}
    for case in ordered:
        if case.id not in side:
            raise DataError(f"{path} does not list case {case.id}: add it to one of {', '.join(SPLITS)}.")
        patient = case.patient or case.id
        if sides_of.setdefault(patient, side[case.id]) != side[case.id]:
            raise DataError(
                f"{path} puts the scans of patient {patient} into {sides_of[patient]} and {side[case.id]}: "
                f"keep them together."
            )
    train, validation = ([case for case in ordered if side[case.id] == split] for split in SPLITS[:2])
    if not train or not validation:
        raise DataError(f"{path} leaves {'validation' if train else 'train'} empty: list at least one case there.")
    return train, validation


def _patients(cases: Sequence[Case]) -> list[list[Case]]:
    """The scans of each patient, sorted by id."""
    patients: dict[str, list[Case]] = {}
    for case in sorted(cases, key=lambda case: case.id):
        patients.setdefault(case.patient or case.id, []).append(case)
    return list(patients.values())


def _divide(patients: list[list[Case]], validation: Sequence[int]) -> tuple[list[Case], list[Case]]:
    held_out = set(validation)
    train = [case for number, scans in enumerate(patients) if number not in held_out for case in scans]
    return train, [case for number in sorted(held_out) for case in patients[number]]


def _listed(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (id, split) for each entry of a split file."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error}): give a JSON or CSV file as the split.") from error
    if path.suffix == ".json":
        try:
            splits = parse_json(text)
        except ValueError as error:
            raise DataError(f"{path} is not JSON ({error}): correct it.") from error
        if not isinstance(splits, Mapping) or not all(isinstance(ids, list) for ids in splits.values()):
            raise DataError(f'{path} does not have the form {{"train": [ids], "validation": [ids]}}: rewrite it.')
        yield from ((str(name), split) for split, ids in splits.items() for name in ids)
    elif path.suffix == ".csv":
        rows = csv.DictReader(text.splitlines())
        if not {"id", "split"} <= set(rows.fieldnames or ()):
            raise DataError(f"{path} has the columns {', '.join(rows.fieldnames or ())}: it needs id and split.")
        yield from ((row["id"].strip(), (row["split"] or "").strip()) for row in rows)
    else:
        raise DataError(f"{path} is neither .json nor .csv: give one of these formats.")
