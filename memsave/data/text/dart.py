"""`data=dart`: the DART corpus, triples (subject, relation, object) and texts that express them.

DART (Nan et al. 2021, arXiv:2007.02871), version 1.1.1, consists of JSON files: a list of objects

    {"tripleset": [["Mars Hill College", "JOINED", "1973"], ...], "annotations": [{"source": ..., "text": ...}, ...]}

As in the experiments of Li et al. (2022), the prompt is `s : r : o | s : r : o` with relations in lower case, and each
text is a record of its own.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memsave.config import ConfigError, register
from memsave.data.errors import DataError, made, read_each
from memsave.data.text.config import RecordsData
from memsave.data.text.records import Record
from memsave.data.text.tables import read_text
from memsave.files import parse_json

TRAINING, HELD_OUT = "train", ("test", "dev")


@register("data", "dart")
@dataclass
class DartData(RecordsData):
    """The JSON files of DART: texts for triples."""

    kind: str = "dart"

    def validate(self) -> None:
        """Raise ConfigError without a folder."""
        if not self.root:
            raise ConfigError("data.root is not given; name the folder of the JSON files, as in data.root=/my/dart")

    def splits(self) -> tuple[list[Record], list[Record]]:
        """(training, held out) records: *train*.json, and *test*.json or else *dev*.json."""
        root = Path(str(self.root)).expanduser()
        if not root.is_dir():
            raise DataError(f"The data folder {root} does not exist: give the folder that holds the files of DART.")
        training = _only(root, TRAINING)
        held_out = next((path for name in HELD_OUT if (path := _only(root, name))), None)
        if training is None or held_out is None:
            lacking = "*train*.json" if training is None else "*test*.json or *dev*.json"
            raise DataError(f"{root} holds no {lacking}: put the file of DART there.")
        train, out = read_each([training, held_out], read_dart)
        return train, out


def _only(folder: Path, name: str) -> Path | None:
    """The JSON file with `name` in its name."""
    found = sorted(folder.glob(f"*{name}*.json"))
    if len(found) > 1:
        raise DataError(f"{folder} holds {found[0].name} and {found[1].name}: leave the file of one version there.")
    return found[0] if found else None


def read_dart(path: str | Path) -> list[Record]:
    """The records of one file, one for each text, in its order. Raises DataError; no entry is skipped."""
    path = Path(path).expanduser()
    try:
        entries = parse_json(read_text(path))
    except ValueError as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} is not JSON ({error}): download it again.") from error
    if not isinstance(entries, list) or not entries:
        raise DataError(f"{path} is not a JSON list of entries: give a file of DART, version 1.1.1.")
    found = made(enumerate(entries, 1), lambda each: _records(each[1], f"{path}, entry {each[0]},"))
    return [record for records in found for record in records]


def _records(entry: Any, where: str) -> list[Record]:
    triples = entry.get("tripleset") if isinstance(entry, dict) else None
    if not isinstance(triples, list) or not triples or not all(_is_triple(each) for each in triples):
        raise DataError(f"{where} has no tripleset of lists [subject, relation, object]: give a file of DART.")
    texts = entry.get("annotations")
    if not isinstance(texts, list) or not texts:
        raise DataError(f"{where} has no annotations: give it at least one text, or delete it.")
    prompt = " | ".join(f"{subject} : {relation.lower()} : {value}" for subject, relation, value in triples)
    found = []
    for each in texts:
        text = each.get("text") if isinstance(each, dict) else None
        if not isinstance(text, str) or not text.strip():
            raise DataError(f'{where} has an annotation without "text": fill it in, or delete the annotation.')
        found.append(Record(prompt, text.strip()))
    return found


def _is_triple(each: Any) -> bool:
    return isinstance(each, list) and len(each) == 3 and all(isinstance(part, str) for part in each)
