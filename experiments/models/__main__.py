"""GhostClipper with the models of transformers: a tiny model of each class, against one backward per example.

    python -m experiments.models

`--only "Llama*"` checks the classes whose names match, and writes nothing.
"""

import argparse
import fnmatch
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from experiments.models.check import Row, check
from experiments.models.table import summary, tables
from experiments.models.tasks import TASKS
from experiments.record import insert, keep, machine

HERE = Path(__file__).parent
DOCUMENT = HERE.parent.parent / "docs" / "models.md"
SECONDS = 60  # time limit of a class


def classes() -> Iterator[tuple[str, str, str]]:
    """Yield (family, name of the class, task), each class once per task."""
    from transformers.models.auto import modeling_auto

    for task, (name, *_) in TASKS.items():
        seen = set()
        for family, found in getattr(modeling_auto, f"MODEL_FOR_{name}_MAPPING_NAMES").items():
            for each in (found,) if isinstance(found, str) else found:
                if each not in seen:
                    seen.add(each)
                    yield family, each, task


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raise TimeoutError in the main thread after `seconds`."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"took longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def tried(family: str, name: str, task: str) -> Row:
    """The verdict on a class within the time limit."""
    import transformers

    try:
        with time_limit(SECONDS):
            return check(getattr(transformers, name), family, task)
    except Exception as error:
        return Row(family, name, task, message=f"{type(error).__name__}: {error}"[:240])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="PATTERN", help="of class names, such as 'Llama*'")
    parser.add_argument("--task", choices=TASKS, help="check only this task; writes nothing")
    options = parser.parse_args()
    quiet()
    rows, begin = [], time.perf_counter()
    for family, name, task in classes():
        if not fnmatch.fnmatch(name, options.only or "*") or options.task not in (None, task):
            continue
        before = time.perf_counter()
        row = tried(family, name, task)
        rows.append(row)
        error = "" if row.error is None else f"{row.error:.1e} of {row.tolerance:.1e}"
        apart = "" if row.apart else f"mixes examples; eval: {row.eval or '-'}"
        seconds = f"{time.perf_counter() - before:.1f} s"
        print(name, task, row.mode, row.verdict, error, row.message, apart, seconds, sep=" | ", flush=True)
    print(dict(Counter(row.verdict for row in rows)), f"{time.perf_counter() - begin:.0f} s")
    if options.only is None and options.task is None:
        insert(DOCUMENT, name="machine", text=machine())
        insert(DOCUMENT, name="summary", text=summary(rows))
        insert(DOCUMENT, name="models", text=tables(rows))
        results = {"seconds": round(time.perf_counter() - begin), "models": [row.as_dict() for row in rows]}
        keep(HERE / "results.json", command="python -m experiments.models", results=results)


def quiet() -> None:
    """Silence the warnings of transformers about tiny configurations."""
    import transformers

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


if __name__ == "__main__":
    sys.exit(main())
