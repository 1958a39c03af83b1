"""Runs tests on mutants in forked processes: `python -m experiments.reliability.mutant_server JOBS ANSWERS`.

JOBS is JSON: a list of {"module", "path", "source", "tests", "seconds"}; without a source the file stays as it is. A
line of ANSWERS is JSON: {"code", "seconds"}, with the exit code of pytest, or -9 after a timeout. Nothing of memsave is
imported before a fork, so that each process imports the mutant. No file is changed.
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
    jobs = json.loads(Path(sys.argv[1]).read_text())
    with Path(sys.argv[2]).open("w", buffering=1) as answers:
        for job in jobs:
            started = time.monotonic()
            code = _run(job)
            answers.write(json.dumps({"code": code, "seconds": time.monotonic() - started}) + "\n")


def _run(job: dict[str, Any]) -> int:
    process = os.fork()
    if not process:
        os.setsid()
        silent = os.open(os.devnull, os.O_RDWR)
        for descriptor in range(3):
            os.dup2(silent, descriptor)
        code = 99
        try:
            import pytest

            if job["source"] is not None:
                sys.meta_path.insert(0, Finder(job))
            code = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *job["tests"]]))
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


if __name__ == "__main__":
    main()
