"""The patients of cases, by data.unit: from the ids as the layout reads them, a pattern of ids, or a table.

data.unit=patient               the layout numbers the scans of a patient, as BraTS 2023 does: BraTS-GLI-00005-101
data.unit='site(\\d+)_scan\\d'     a regular expression for the whole id; its only group is the patient
data.unit=/my/patients.csv      a CSV, TSV or JSONL file with the columns case and patient
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from memsave.config import ConfigError
from memsave.data.errors import DataError
from memsave.data.text.tables import SUFFIXES, read_rows
from memsave.data.volumes.layouts import Case

BY_LAYOUT = "patient"
FORMS = (
    f"give {BY_LAYOUT}, a regular expression with one group such as '(.+)_scan\\d+', or a table with the columns case "
    f"and patient"
)


def check_unit(unit: str) -> None:
    """Raise ConfigError for a value of data.unit of no valid form."""
    if unit == BY_LAYOUT or _is_table(unit):
        return
    try:
        groups = re.compile(unit).groups
    except re.error as error:
        raise ConfigError(f"data.unit is {unit!r}, which is no regular expression ({error}); {FORMS}") from error
    if groups != 1:
        raise ConfigError(f"data.unit is {unit!r}, which has {groups} groups; {FORMS}")


def with_patients(cases: Sequence[Case], unit: str) -> list[Case]:
    """The cases with `Case.patient` by data.unit. Raises DataError for a case whose patient it does not give."""
    if unit == BY_LAYOUT:
        if cases and all(case.patient is None for case in cases):
            raise DataError(
                f"data.unit=patient needs ids that number the scans of a patient, and {cases[0].id} does not in this "
                f"data.layout: give a regular expression or a table as data.unit."
            )
        return [replace(case, patient=case.patient or case.id) for case in cases]
    if _is_table(unit):
        patients = _read_table(Path(unit).expanduser())
        missing = next((case.id for case in cases if case.id not in patients), None)
        if missing is not None:
            raise DataError(f"{unit} lists no patient of case {missing} (data.unit): add a line for it.")
        return [replace(case, patient=patients[case.id]) for case in cases]
    found = []
    for case in cases:
        match = re.fullmatch(unit, case.id)
        if match is None or not match[1]:
            raise DataError(
                f"data.unit={unit} finds no patient in the id of case {case.id}: change it, or give a table."
            )
        found.append(replace(case, patient=match[1]))
    return found


def _is_table(unit: str) -> bool:
    return unit.lower().endswith(SUFFIXES)


def _read_table(path: Path) -> dict[str, str]:
    """The patient of each case."""
    found: dict[str, str] = {}
    for row in read_rows(path):
        case, patient = row.text("case", key="data.unit"), row.text("patient", key="data.unit")
        for name, value in (("case", case), ("patient", patient)):
            if not value:
                raise DataError(f"{row.where} has an empty {name}: fill it in or delete the line.")
        if found.setdefault(case, patient) != patient:
            raise DataError(f"{row.where} gives case {case} the patient {patient}, and an earlier line {found[case]}.")
    return found
