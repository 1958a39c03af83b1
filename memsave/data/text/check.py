"""Checks a data set of texts before training and reports every fault.

    python -m memsave.data.check data=records root=/my/faq.csv prompt='{question}' completion='{answer}'
    python -m memsave.data.check data=sst2 root=/my/sst2 model=FacebookAI/roberta-base
    python -m memsave.data.check data=personachat root=/my/personachat model=small_gpt2 max_length=128

    data    the source, as in memsave.run
    model   the model by its option, name or folder; its tokenizer counts tokens (default: none, tokens are not counted)
    show    number of faults that are printed (default 100)

All other keys are those of the source, data.root, data.max_length and so on, with or without "data.". Values are
written as they are, without quotes for Hydra.

The command reads all training and held-out examples. It prints one sentence for each fault, notes and a table to
standard output, and progress to standard error. Examples that are both in the training and in the held-out data are a
fault; copies within the training data and examples that are cut are notes. Exit codes: 0 no fault, 2 faults or bad
arguments, 130 interrupted.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from memsave.arguments import ArgumentError, names_in
from memsave.config import ConfigError
from memsave.config.compose import compose_option
from memsave.config.fields import check_fields, closest
from memsave.config.registry import component, names
from memsave.data.errors import DataError, collecting_faults
from memsave.data.text.config import TextData
from memsave.data.text.facts import Facts, Lengths
from memsave.progress import Progress

PART = 1000  # examples between two lines of progress
OWN = ("data", "model", "show")
"""The keys of the command that are not those of the source."""
SPLITS = ("training", "held-out")
KINDS = {int: "a whole number", float: "a number", bool: "true or false"}


@dataclass
class Arguments:
    """The command-line arguments, described at the top of this file."""

    data: TextData
    model: str | None = None
    show: int = 100


@dataclass
class Report:
    """The result of `examine`: sentences, and rows of a table with a cell for training and held-out data."""

    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    rows: list[tuple[str, str, str]] = field(default_factory=list)

    def table(self) -> str:
        """The table as text."""
        width = max(len(title) for title, *_ in self.rows)
        lines = [("", *SPLITS), *self.rows]
        return "\n".join(f"{title:<{width}}  {train:>12}  {out:>12}".rstrip() for title, train, out in lines)


def main(arguments: Sequence[str]) -> int:
    """Run the command line; returns the exit code."""
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0
    try:
        options = read_arguments(arguments)
        report = examine(options.data, model=options.model, progress=Progress())
    except (ArgumentError, ConfigError, DataError) as error:
        print(f"memsave: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(f"memsave: {error.name} is not installed: pip install 'memsave[lm]'", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    for fault in report.faults[: options.show]:
        print(fault)
    if len(report.faults) > options.show:
        print(f"{len(report.faults) - options.show} more faults are printed with show={len(report.faults)}")
    for note in report.notes:
        print(f"note: {note}")
    if report.rows:
        print(report.table())
    print("1 fault" if len(report.faults) == 1 else f"{len(report.faults)} faults")
    return 2 if report.faults else 0


def read_arguments(arguments: Sequence[str]) -> Arguments:
    """The arguments. Raises ArgumentError or ConfigError."""
    given: dict[str, str] = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        key = key.removeprefix("data.")
        if not equals or not value:
            raise ArgumentError(
                f"{argument!r} cannot be read: arguments have the form key=value, as in root=/my/faq.csv, and values "
                f"with spaces need quotes"
            )
        if key in given:
            raise ArgumentError(f"{key} is given twice: give it once.")
        given[key] = value
    name = given.pop("data")
    model, show = given.pop("model", None), given.pop("show", "100")
    if not show.isdecimal():
        raise ArgumentError(f"show is {show!r}: give a number of faults, such as show=100")
    return Arguments(source(name, given), model, int(show))


def source(name: str, values: Mapping[str, str]) -> TextData:
    """The source of texts with these values of its keys, checked. Raises ArgumentError or ConfigError."""
    config = compose_option("data", name)
    schema: Any = OmegaConf.get_type(config)
    if not issubclass(schema, TextData):
        raise ConfigError(f"data={name} is no source of text; for volumes, leave data= out and give root= and layout=")
    types = {each.name: each.type for each in fields(schema) if each.name != "kind"}
    texts: dict[str, Any] = {}  # set on the object, because OmegaConf would resolve ${...}
    for key, value in values.items():
        if key not in types:
            known = [*OWN, *types]
            hint = closest(key, known)
            raise ArgumentError(f"{key} is not known: the keys of data={name} are {', '.join(known)}{hint}")
        if types[key] in (str, str | None):
            texts[key] = None if value == "null" and types[key] is not str else value
            config[key] = ""  # a key without a default needs a value
        else:
            _set(config, key, value, types[key])
    data = cast(TextData, OmegaConf.to_object(config))
    for key, text in texts.items():
        setattr(data, key, text)
    check_fields(data)
    getattr(data, "validate", lambda: None)()
    return data


def _set(config: DictConfig, key: str, value: str, kind: Any) -> None:
    """Set a key that is no text. Names in a list are kept as typed."""
    try:
        if kind in (list[str], list[str] | None) and value != "null":
            config[key] = names_in(value)
        else:
            config.merge_with(OmegaConf.from_dotlist([f"{key}={value}"]))
            config[key]  # resolves an interpolation
    except (OmegaConfBaseException, YAMLError) as error:
        example = f", as in {key}={config[key]}" if config[key] is not None else ""
        words = next((each for known, each in KINDS.items() if kind in (known, known | None)), "another value")
        raise ArgumentError(f"{key} is {value!r}: give {words}{example}") from error


def examine(data: TextData, *, model: str | None = None, progress: Progress | None = None) -> Report:
    """Read all examples of a source.

    Args:
        data: the source.
        model: the model whose tokenizer counts tokens: an option of model=, a name on the hub or a folder.
        progress: gets a line every few seconds.
    """
    report, splits = Report(), None
    with collecting_faults() as faults:
        try:
            splits = data.splits()
            train, held_out = (data.facts(examples) for examples in splits)
            skipped = getattr(data, "skipped", 0)
        except DataError as fault:
            faults.append(fault)
    report.faults = list(dict.fromkeys(map(str, faults)))  # a missing column is a fault of every line
    if splits is None:
        return report
    if skipped:
        report.notes.append(f"{skipped} invalid lines are left out (skip_invalid).")
    _compare(report, train, held_out)
    _count(report, train, held_out)
    _count_units(report, splits)
    if model is not None:
        _measure(report, data, splits, model=model, progress=progress or Progress())
    return report


def _compare(report: Report, train: Sequence[Facts], held_out: Sequence[Facts]) -> None:
    """Report copies across the splits and within the training data."""
    known, texts = Counter(map(_key, train)), {_words(each.text) for each in train}
    copied = [each for each in held_out if _key(each) in known]
    if copied:
        report.faults.append(
            f"{_examples(len(copied), 'held-out')} also in the training data, such as {_shown(copied[0])}: remove them "
            f"from one of the two, because scores on them measure memory."
        )
    other = [each for each in held_out if each.target and _key(each) not in known and _words(each.text) in texts]
    if other:
        report.notes.append(
            f"{_examples(len(other), 'held-out')} in the training data with another target, such as {_shown(other[0])}."
        )
    again = {key: count for key, count in known.items() if count > 1}
    if again:
        most = max(again, key=lambda key: again[key])
        example = next(each for each in train if _key(each) == most)
        report.notes.append(
            f"{_examples(sum(again.values()), 'training')} not unique: {_different(len(again))} up to "
            f"{again[most]} times, such as {_shown(example)}; privacy protects one example, and for a person "
            f"with k of them epsilon is up to k times as large."
        )
    labels: dict[str, set[str]] = {}
    for each in train:
        if each.label is not None:
            labels.setdefault(_words(each.text), set()).add(each.label)
    several = [text for text, found in labels.items() if len(found) > 1]
    if several:
        report.notes.append(
            f"{_count_of(len(several), 'training text')} with different labels, such as {_quoted(several[0])}."
        )


def _count(report: Report, train: Sequence[Facts], held_out: Sequence[Facts]) -> None:
    """Add numbers of examples, labels and turns to the table."""
    both = (train, held_out)
    report.rows.append(_row("examples", (str(len(each)) for each in both)))
    report.rows.append(_row("different texts", (str(len({_words(each.text) for each in part})) for part in both)))
    labels = [Counter(each.label for each in part if each.label is not None) for part in both]
    for name in dict.fromkeys(each for counts in labels for each in sorted(counts)):
        cells = (f"{counts[name]} ({counts[name] / max(1, len(part)):.0%})" for counts, part in zip(labels, both))
        report.rows.append(_row(f"label {name}", cells))
    report.rows += _sizes("turns", [[each.turns for each in part if each.turns is not None] for part in both])


def _count_units(report: Report, splits: Sequence[Sequence[Any]]) -> None:
    """Add the numbers of persons (data.unit) and of their records to the table."""
    units = [Counter(each.unit for each in part if getattr(each, "unit", None) is not None) for part in splits]
    if units[0]:
        report.rows.append(_row("units", (str(len(each)) for each in units)))
        report.rows += _sizes("records of a unit", [list(each.values()) for each in units])


def _measure(
    report: Report, data: TextData, splits: Sequence[Sequence[Any]], *, model: str, progress: Progress
) -> None:
    """Add the tokens of the examples to the table, and note those that are cut."""
    config = component("model", model)() if model in names("model") else component("model", "language")(name=model)
    if not hasattr(config, "load_tokenizer"):
        raise ConfigError(f"model={model} is no language model; give one by name or folder, as in model=gpt2")
    tokenizer = config.load_tokenizer(progress=progress)
    tokenizer.model_max_length = 10**9  # without a warning for each long text
    is_pair = bool(getattr(config.architecture(), "is_encoder_decoder", False))
    bar = progress.lines(sum(-(-len(each) // PART) for each in splits), unit="part")
    found: list[Lengths] = []
    for examples in splits:
        total = Lengths()
        for first in range(0, len(examples), PART):
            part = data.lengths(examples[first : first + PART], tokenizer, is_pair=is_pair)
            if part is None:
                return
            total.add(part)
            bar.advance("tokens of the texts")
        found.append(total)
    report.rows += _sizes("tokens", [each.tokens for each in found])
    report.rows.append(_row("cut examples", (str(each.cut_examples) for each in found)))
    report.rows.append(_row("cut tokens", (str(each.cut_tokens) for each in found)))
    for name, each in zip(SPLITS, found, strict=True):
        if each.cut_examples:
            report.notes.append(
                f"{each.cut_examples} of {len(each.tokens)} {name} examples do not fit (max_length={data.max_length}), "
                f"which cuts {each.cut_tokens} of {each.total} tokens ({each.cut_tokens / each.total:.1%})."
            )


def _row(title: str, cells: Iterator[str]) -> tuple[str, str, str]:
    train, held_out = cells
    return title, train, held_out


def _sizes(title: str, sizes: Sequence[Sequence[int]]) -> list[tuple[str, str, str]]:
    """The median, the 95% quantile and the maximum; nothing without sizes."""
    if not sizes[0]:
        return []
    quantiles: dict[str, Callable[[Sequence[int]], int]] = {
        "median": lambda ordered: ordered[(len(ordered) - 1) // 2],
        "95%": lambda ordered: ordered[-(-95 * len(ordered) // 100) - 1],
        "longest": lambda ordered: ordered[-1],
    }
    ordered = [sorted(each) for each in sizes]
    return [
        _row(f"{title}, {name}", (str(of(each)) if each else "" for each in ordered)) for name, of in quantiles.items()
    ]


def _words(text: str) -> str:
    """The text with single spaces, by which copies are found."""
    return " ".join(text.split())


def _key(each: Facts) -> tuple[str, str]:
    return _words(each.text), _words(each.target)


def _examples(count: int, split: str) -> str:
    return f"1 {split} example is" if count == 1 else f"{count} {split} examples are"


def _count_of(count: int, noun: str) -> str:
    return f"1 {noun} occurs" if count == 1 else f"{count} {noun}s occur"


def _different(count: int) -> str:
    return "1 different one occurs" if count == 1 else f"{count} different ones occur"


def _shown(each: Facts) -> str:
    target = f" with {_quoted(each.target)}" if each.target else ""
    return f"{_quoted(each.text)}{target}"


def _quoted(text: str) -> str:
    words = _words(text)
    return repr(words if len(words) <= 60 else f"{words[:60]}...")
