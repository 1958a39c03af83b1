"""Say which parameters of a model of transformers are clipped exactly, without its weights.

    python -m memsave.coverage llama
    python -m memsave.coverage /my/model --task sequence-classification --adapter lora --json coverage.json

NAME is a folder with config.json, a name on the hub, or a model type of transformers, whose default configuration is
then used. The model is built from the configuration on tensors without memory, and one forward runs on them. Where that
is not possible, because the forward depends on values, the model runs with random values, or a tiny copy of the
configuration if the model is large; the bytes are then estimated for the sizes of the model.

The columns are those of `memsave.ghost.coverage`. Exit codes: 0 all parameters are exact, 1 some are refused, 2 bad
arguments, 130 interrupted.
"""

import argparse
import json
import logging
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from memsave.architectures import TASKS, batch_for, build, find_config, first_line, prepared, reallocate, task_of, tiny
from memsave.ghost import Coverage, ParameterCoverage, coverage
from memsave.ghost.coverage_report import REFUSED
from memsave.ghost.refusals import Refusal

SMALL = 2**27  # elements of the largest model that runs with values: 512 MiB
INSTALL = {"transformers": "'memsave[lm]'", "peft": "peft"}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"memsave: {message}; see python -m memsave.coverage --help\n")


@dataclass(frozen=True)
class Found:
    """The report on an architecture."""

    report: Coverage
    task: str
    source: str
    """Where the configuration is from."""
    note: str
    """How the report was found, if not by the model's own forward."""


def main(arguments: Sequence[str]) -> int:
    """Run the command line; returns the exit code."""
    options = _parse(arguments)
    try:
        _quiet()
        found = examine(
            options.name,
            task=options.task,
            batch_size=options.batch_size,
            positions=options.positions,
            adapter=options.adapter,
        )
        if options.json is not None:
            Path(options.json).write_text(json.dumps(_as_dict(options, found), indent=1) + "\n")
    except ModuleNotFoundError as error:
        install = INSTALL.get(error.name or "", error.name)
        print(f"memsave: {error.name} is not installed: pip install {install}", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        print(f"memsave: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    batch = f"task: {found.task}, batch of {options.batch_size}, {options.positions} positions"
    print("\n".join(filter(None, [found.source, batch, found.note, "", str(found.report)])))
    return 0 if found.report.ok else 1


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(
        "python -m memsave.coverage", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", metavar="NAME", help="a folder with config.json, or a model type such as llama")
    parser.add_argument("--task", choices=TASKS, help="default: that of the configuration")
    parser.add_argument("--batch-size", type=int, default=2, help="examples of the forward (default 2)")
    parser.add_argument("--positions", type=int, default=16, help="tokens of each example (default 16)")
    parser.add_argument("--adapter", choices=("lora",), help="LoRA on all linear layers is trained, not the model")
    parser.add_argument("--json", metavar="FILE", help="also write the report to this file")
    options = parser.parse_args(arguments)
    if options.batch_size < 2:
        parser.error(f"--batch-size is {options.batch_size}: give 2 or more, because examples are told apart")
    if options.positions < 1:
        parser.error(f"--positions is {options.positions}: give 1 or more")
    return options


def _quiet() -> None:
    """Silence what transformers and PyTorch print about models without values."""
    import transformers

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)


def examine(
    name: str, *, task: str | None = None, batch_size: int = 2, positions: int = 16, adapter: str | None = None
) -> Found:
    """The report on an architecture by folder or name. Raises ValueError if it cannot be built."""
    config, source = find_config(name)
    config = prepared(config)
    chosen = task_of(config, task)
    sizes = {"batch_size": batch_size, "positions": positions}
    try:
        with torch.device("meta"):
            model = build(config, chosen, adapter=adapter)
    except ModuleNotFoundError:
        raise
    except Exception as error:  # each architecture checks its configuration in its own way
        raise ValueError(f"{name} cannot be built for {chosen} ({first_line(error)})") from error
    with FakeTensorMode():  # transformers reads values of tensors on `meta`, but not of these
        reallocate(model)
        try:
            report = coverage(model, batch_for(model, config, chosen, **sizes))
        except Exception:  # whatever an architecture raises where values are missing
            report = coverage(model)
    if report.ok and report.forward_ran:
        return Found(report, chosen, source, "")
    is_small = sum(each.numel() for each in model.parameters()) <= SMALL
    report, note = _with_values(report, config, chosen, adapter, sizes, is_small=is_small)
    return Found(report, chosen, source, note)


def _with_values(
    report: Coverage, config: Any, task: str, adapter: str | None, sizes: dict[str, int], *, is_small: bool
) -> tuple[Coverage, str]:
    """The report with the verdicts of a forward with values, of a tiny copy if the model is large; and a sentence."""
    missing = "the forward refuses without values" if report.forward_ran else "the forward depends on values"
    subject = "the model with random values" if is_small else "a tiny copy of the configuration"
    try:
        other = config if is_small else prepared(tiny(config))
        model = build(other, task, adapter=adapter)
        seen = coverage(model, batch_for(model, other, task, **sizes))
    except Exception as error:  # whatever an architecture raises for sizes that do not fit together
        return report, f"{missing}, and {subject} does not run ({first_line(error)})"
    if not seen.forward_ran:
        return report, ""
    estimates = "" if is_small else ", and the bytes are estimates"
    return merged(report, seen, batch_size=sizes["batch_size"]), f"{missing}: the verdicts are of {subject}{estimates}"


def merged(report: Coverage, seen: Coverage, *, batch_size: int) -> Coverage:
    """The report with what was seen of the parameters of the same name in a smaller model."""
    by_name = {each.name: each for each in seen.parameters}
    by_pattern: dict[str, ParameterCoverage] = {}
    for each in seen.parameters:
        if each.pattern not in by_pattern or each.verdict == REFUSED:
            by_pattern[each.pattern] = each
    rows = []
    for row in report.parameters:
        like, same = by_pattern.get(row.pattern), by_name.get(row.name)
        if like is not None and same is not None and (same.verdict, same.used_by) != (like.verdict, like.used_by):
            like = same
        if like is not None:
            uses = tuple(use.with_shape(row.shape, row.dtype, batch_size=batch_size) for use in like.uses)
            row = replace(row, used_by=like.used_by, verdict=like.verdict, why=like.why, remedy=like.remedy, uses=uses)
        rows.append(row)
    refusals = [Refusal(row.name, "", row.why, row.remedy) for row in rows if row.verdict == REFUSED]
    listed = {each.reason for each in refusals}
    refusals += [each for each in seen.refusals if each.reason not in listed]
    return Coverage(tuple(rows), tuple(refusals), forward_ran=True)


def _as_dict(options: argparse.Namespace, found: Found) -> dict[str, Any]:
    given = {key: getattr(options, key) for key in ("name", "batch_size", "positions", "adapter")}
    return {**given, "task": found.task, "source": found.source, "note": found.note, **found.report.as_dict()}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
