"""Write texts, replies or labels with a trained language model.

    python -m memsave.generate model=outputs/gpt2_dp/2026-01-31_10-00-00 input=/my/prompts.jsonl output=/my/texts.jsonl

    model       a run's folder, or a copy of its model/
    input       .txt (a whole prompt, text or message per line), .csv, .tsv or .jsonl, with the columns of training
    output      .jsonl or .csv: the number of the line, the columns of the input, and the answer (generated, reply, or
                predicted and probability)
    batch_size  lines per batch (default 32)
    encoding    of the input (default utf-8)
    device      auto, cpu or cuda (default auto)

Several processes, each with a GPU of its own, share the batches:

    torchrun --nproc_per_node=4 -m memsave.generate model=... input=... output=...

A line that cannot be used is named and left out. The answers so far are kept in OUTPUT.partial.jsonl: after an
interruption, the same command continues there. Exit codes: 0 all lines were answered, 1 some were left out, 2 bad
input, 130 interrupted.
"""

import csv
import hashlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from memsave.arguments import parse_arguments
from memsave.command_line import run_command
from memsave.config import ConfigError
from memsave.data import DataError
from memsave.data.errors import collecting_faults, made
from memsave.data.text.tables import Row, check_encoding, read_rows
from memsave.files import parse_json, replacing
from memsave.process_group import own_device
from memsave.processes import map_in_rounds, on_main, together
from memsave.progress import Progress
from memsave.tasks.language.answering import Answerer, load_answerer
from memsave.training.signals import interrupt_at_signals

OUTPUTS = (".jsonl", ".csv")
LINE = "line"  # the output's column with the number of the input's line


@dataclass
class Arguments:
    """The command-line arguments, described at the top of this file."""

    model: str = MISSING
    input: str = field(default=MISSING, metadata={"expects": "a file, as in input=/my/prompts.jsonl"})
    output: str = field(default=MISSING, metadata={"expects": "a file, as in output=/my/texts.jsonl"})
    batch_size: int = field(default=32, metadata={"expects": "a number of lines, such as batch_size=32"})
    encoding: str = "utf-8"
    device: str = "auto"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""

    def body(given: list[str]) -> int:
        return generate_file(parse_arguments(given, Arguments, example="input=/my/prompts.jsonl"), progress=Progress())

    return run_command(
        body, arguments, help_text=__doc__ or "", extra="lm", interrupted="interrupted; the same command continues"
    )


def generate_file(arguments: Arguments, *, progress: Progress) -> int:
    """Answer every line of the input; returns the exit code."""
    from memsave.experiment import choose_device

    with together():
        source, output = _checked_files(arguments)
        device = own_device(choose_device(arguments.device, key="device"))
        answerer = load_answerer(Path(arguments.model).expanduser(), device=device)
        with collecting_faults() as faults:
            rows = read_rows(source, encoding=arguments.encoding, key="encoding", plain=answerer.column)
            inputs = list(made(rows, lambda row: (row, answerer.read(row))))
        for fault in faults:
            progress.say(f"left out: {fault}")
        if not inputs:
            raise DataError(f"{source} has no line that can be used: {faults[0]}")
        _check_columns([row for row, _ in inputs], answerer)

    def opened() -> Journal:
        output.parent.mkdir(parents=True, exist_ok=True)
        return Journal.of(output, settings=_settings(arguments, source, answerer), rows=[row for row, _ in inputs])

    def finish() -> None:
        write_table(output, journal.answers)
        journal.path.unlink()

    journal = on_main(opened)
    _answer_all(inputs, answerer, journal, size=arguments.batch_size, progress=progress)
    on_main(finish)
    count = len(inputs) + len(faults)
    progress.say(f"answered {len(inputs)} of {count} lines: {output}")
    return 1 if faults else 0


def _checked_files(arguments: Arguments) -> tuple[Path, Path]:
    """(input, output). Raises ConfigError for arguments that cannot be used, before the model is loaded."""
    if arguments.batch_size < 1:
        raise ConfigError(f"batch_size is {arguments.batch_size}; it must be at least 1")
    check_encoding(arguments.encoding, key="encoding")
    source, output = Path(arguments.input).expanduser(), Path(arguments.output).expanduser()
    if output.suffix.lower() not in OUTPUTS:
        raise ConfigError(f"output is {output}; give a file that ends in {' or '.join(OUTPUTS)}")
    if output.is_dir():
        raise ConfigError(f"output is {output}, which is a folder; give a file")
    if output.resolve() == source.resolve():
        raise ConfigError(f"output is {output}, which is the input; give another file")
    return source, output


def _check_columns(rows: Sequence[Row], answerer: Answerer) -> None:
    """Raise ConfigError if the input has a column of the output."""
    found = next((name for name in (LINE, *answerer.gives) for row in rows if name in row.values), None)
    if found is not None:
        raise ConfigError(f"the input has a column {found}, which the output adds; rename it in the input")


def _answer_all(
    inputs: Sequence[tuple[Row, Any]], answerer: Answerer, journal: "Journal", *, size: int, progress: Progress
) -> None:
    """Answer the inputs that the journal lacks, in batches that do not depend on where it begins.

    In each round, every process answers one batch, and the first one adds the answers to its journal. If a batch fails,
    the answers to the batches before it are kept.
    """
    done = len(journal.answers)
    if done:
        progress.say(f"continuing after {done} of {len(inputs)} lines")
    starts = range(done - done % size, len(inputs), size) if done < len(inputs) else range(0)
    bar = progress.lines(len(starts), unit="batch")

    def answer(first: int) -> list[dict[str, Any]]:
        part = inputs[first : first + size]
        answers = answerer.answer([each for _, each in part])
        found = [{LINE: row.line, **row.values, **each} for (row, _), each in zip(part, answers, strict=True)]
        return found[max(0, done - first) :]

    for first, found in zip(starts, map_in_rounds(answer, starts)):
        on_main(partial(journal.add, found))
        bar.advance(f"{min(first + size, len(inputs))} of {len(inputs)} lines")


@dataclass
class Journal:
    """The answers so far, in a file that an interruption leaves behind: its first line says what they belong to."""

    path: Path
    answers: list[dict[str, Any]]

    @classmethod
    def of(cls, output: Path, *, settings: dict[str, Any], rows: Sequence[Row]) -> "Journal":
        """The journal beside the output, or a new one. Raises ConfigError if it belongs to another input or model."""
        path = output.with_name(f"{output.name}.partial.jsonl")
        content = path.read_bytes() if path.is_file() else b""
        complete = content.rfind(b"\n") + 1  # a line that was being written at the interruption has no end
        if not complete:
            path.write_text(json.dumps(settings) + "\n")
            return cls(path, [])
        try:
            first, *answers = map(parse_json, content[:complete].split(b"\n")[:-1])
            numbers = [each[LINE] for each in answers]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path} cannot be read; delete it, or give another output=") from error
        if first != settings or numbers != [row.line for row in rows][: len(numbers)]:
            raise ConfigError(
                f"{path} has the answers to another input, of another model or with another batch_size; delete it, or "
                f"give another output="
            )
        os.truncate(path, complete)
        return cls(path, answers)

    def add(self, answers: Sequence[dict[str, Any]]) -> None:
        """Append answers."""
        with self.path.open("a") as file:
            file.writelines(json.dumps(each) + "\n" for each in answers)
        self.answers += answers


def _settings(arguments: Arguments, source: Path, answerer: Answerer) -> dict[str, Any]:
    """What the answers depend on."""
    digest = hashlib.sha256(source.read_bytes()).hexdigest()[:16]
    return {
        "input": digest,
        "model": answerer.digest,
        "encoding": arguments.encoding,
        "batch_size": arguments.batch_size,
    }


def write_table(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows as .jsonl or .csv; the file appears complete or not at all."""
    with replacing(path) as draft, draft.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        if path.suffix.lower() == ".jsonl":
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            return
        columns = dict.fromkeys(name for row in rows for name in row)
        table = csv.DictWriter(file, list(columns))
        table.writeheader()
        table.writerows({key: _cell(value) for key, value in row.items()} for row in rows)


def _cell(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (list, dict)) else value


if __name__ == "__main__":
    interrupt_at_signals()
    sys.exit(main())
