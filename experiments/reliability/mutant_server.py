"""Runs tests on mutants in forked processes: `python -m experiments.reliability.mutant_server`.

A line of standard input is a job in JSON. {"tests", "seconds", "traced", "report"} runs test files and writes to the
file `report` which test executes which lines of the files `traced`. {"tests", "seconds", "module", "path", "source"}
runs single tests, in their order and until one fails, with another source in place of that of a module.

A line of standard output answers it: the exit code of pytest, or -9 after a timeout. Nothing of memsave is imported
before a fork, so that each process imports the mutant. No file is changed.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any


class Mutated(importlib.machinery.SourceFileLoader):
    """Loads another source in place of that of the file."""

    def __init__(self, name: str, path: str, source: str):
        super().__init__(name, path)
        self.source = source

    def get_code(self, fullname: str) -> Any:
        """The code of the mutant."""
        return compile(self.source, self.path, "exec", dont_inherit=True)


class Finder(importlib.abc.MetaPathFinder):
    """Finds the mutant by the name of its module."""

    def __init__(self, job: dict[str, Any]):
        self.job = job

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        """The spec of the mutant; None for all other modules."""
        if fullname != self.job["module"]:
            return None
        path = self.job["path"]
        loader = Mutated(fullname, path, self.job["source"])
        inner = [str(Path(path).parent)] if Path(path).name == "__init__.py" else None
        return importlib.util.spec_from_file_location(fullname, path, loader=loader, submodule_search_locations=inner)


def main() -> None:
    import hypothesis
    import opacus  # noqa: F401
    import pytest  # noqa: F401
    import torch
    import transformers  # noqa: F401
    from transformers import GPT2LMHeadModel  # noqa: F401

    torch.set_num_threads(1)
    hypothesis.settings.register_profile("no deadline", deadline=None)  # a busy machine would "notice" every mutant
    hypothesis.settings.load_profile("no deadline")
    for line in sys.stdin:
        print(_run(json.loads(line)), flush=True)


def _run(job: dict[str, Any]) -> int:
    process = os.fork()
    if not process:
        os.setsid()
        silent = os.open(os.devnull, os.O_RDWR)
        for descriptor in range(3):
            os.dup2(silent, descriptor)
        code = 99
        try:
            code = _tests(job)
        finally:
            os._exit(code)
    end = time.monotonic() + job["seconds"]
    while True:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            os.killpg(process, signal.SIGKILL)
            os.waitpid(process, 0)
            return -9
        time.sleep(0.01)


def _tests(job: dict[str, Any]) -> int:
    import pytest

    from experiments.reliability.traced import Select, Trace

    if "traced" in job:
        files, plugin = job["tests"], Trace(job["traced"], job["report"])
    else:
        sys.meta_path.insert(0, Finder(job))
        files, plugin = list(dict.fromkeys(each.partition("::")[0] for each in job["tests"])), Select(job["tests"])
    return int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *files], plugins=[plugin]))


if __name__ == "__main__":
    main()
