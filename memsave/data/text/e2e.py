"""The E2E challenge: tables about restaurants, and texts that people wrote about them.

The challenge (Novikova et al. 2017, arXiv:1706.09254) consists of CSV files with the columns `mr`, a table, and `ref`,
a text for it; a table has one line for each of its texts.

    trainset.csv          42,061 lines
    devset.csv             4,672 lines, used for training if trainset.csv is missing
    testset_w_refs.csv     4,693 lines, held out
"""

import csv
from pathlib import Path

from memsave.data.errors import DataError, made, read_each
from memsave.data.text.records import Record

TRAIN, DEV, TEST = "trainset.csv", "devset.csv", "testset_w_refs.csv"
COLUMNS = ("mr", "ref")


def read_e2e(path: str | Path) -> list[Record]:
    """All records of one file, in its order. Raises DataError for an invalid line; no line is skipped."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise DataError(f"The file {path} does not exist: give a CSV file of the E2E challenge.")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            missing = [column for column in COLUMNS if column not in (reader.fieldnames or ())]
            if missing:
                raise DataError(f"{path} has no column {' or '.join(missing)}: its first line must name mr and ref.")
            records = list(made(reader, lambda row: _record(row, where=f"{path}, line {reader.line_num},")))
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 (byte {error.object[error.start]:#04x}): save it as UTF-8.") from error
    except csv.Error as error:
        raise DataError(f"{path} is not a CSV file ({error}): export it again.") from error
    if not records:
        raise DataError(f"{path} has a header but no rows: download it again.")
    return records


def e2e_splits(root: str | Path) -> tuple[list[Record], list[Record]]:
    """(training, held-out) records: trainset.csv, or devset.csv; and testset_w_refs.csv, or an unused devset.csv."""
    root = Path(root).expanduser()
    if not root.is_dir():
        raise DataError(f"The data folder {root} does not exist: give the folder that holds {TRAIN} and {TEST}.")
    existing = [name for name in (TRAIN, DEV, TEST) if (root / name).is_file()]
    training = next((name for name in (TRAIN, DEV) if name in existing), None)
    if training is None:
        raise DataError(f"{root} holds neither {TRAIN} nor {DEV}: put one of them there to train on.")
    held_out = next((name for name in (TEST, DEV) if name in existing and name != training), None)
    if held_out is None:
        lacking = TEST if training == DEV else f"{TEST} or {DEV}"
        raise DataError(f"{root} holds {training} to train on and no held-out file: put {lacking} there.")
    train, out = read_each([root / training, root / held_out], read_e2e)
    return train, out


def _record(row: dict, *, where: str) -> Record:
    if None in row:  # the key of DictReader for fields beyond the header
        raise DataError(f"{where} has more fields than the header: put texts with commas in double quotes.")
    for column in COLUMNS:
        if not (row[column] or "").strip():
            raise DataError(f"{where} has an empty {column}: fill it in or delete the line.")
    return Record(prompt=row["mr"].strip(), completion=row["ref"].strip())
