"""A command of memsave in a process of its own, which starts quickly: a server that has imported torch forks it.

`tests/test_startup.py` and a few others start a new interpreter instead, as a user does.
"""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from subprocess import CompletedProcess

from tests.support.processes import PRELOADED
from tests.support.tiny_configs import TINY_UNET

TWO_STEPS = [*TINY_UNET, "trainer.steps=2"]
SECONDS = 300


class Command:
    """A running `python -m MODULE ARGUMENTS` in `folder`, with its own cache.

    variables: further environment variables; those of PYTHONPATH come first in the search path.
    """

    def __init__(self, folder, *arguments, module="memsave.run", **variables):
        self.arguments = [module, *map(str, arguments)]
        self._outputs = [_unused(folder, name) for name in ("stdout", "stderr")]
        environment = {**os.environ, "MEMSAVE_CACHE": str(folder / "cache"), **variables}
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        target = (str(folder), self.arguments, environment, *map(str, self._outputs))
        self.process = context.Process(target=_run, args=target)
        self.process.start()

    def kill(self):
        """SIGKILL, at once."""
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.join()

    def wait(self):
        """The completed process."""
        self.process.join(SECONDS)
        if self.process.is_alive():
            self.kill()
        said = [path.read_text() for path in self._outputs]
        for path in self._outputs:
            path.unlink()
        return CompletedProcess(self.arguments, self.process.exitcode, *said)


def run_command(folder, *arguments, **options):
    """Run the command to its end; returns the completed process."""
    return Command(folder, *arguments, **options).wait()


def run_interpreter(folder, *arguments):
    """As `run_command`, in a new interpreter: workers of joblib do not end in a forked process."""
    command = [sys.executable, "-m", "memsave.run", *arguments]
    environment = {**os.environ, "MEMSAVE_CACHE": str(folder / "cache")}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=SECONDS)


def _unused(folder, name):
    """A file beside the folder, so that the command finds the folder as it was."""
    number = 0
    while (path := Path(folder).parent / f"{Path(folder).name}.{name}{number}").exists():
        number += 1
    path.touch()
    return path


def _run(folder, arguments, environment, *outputs):
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    first = [each for each in environment.get("PYTHONPATH", "").split(os.pathsep) if each]
    sys.path[:0] = [folder, *first]
    sys.argv = arguments
    runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
