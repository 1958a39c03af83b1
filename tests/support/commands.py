"""The command `python -m memsave.run` in a subprocess."""

import os
import subprocess
import sys

from tests.support.tiny_configs import TINY_UNET

TWO_STEPS = [*TINY_UNET, "trainer.steps=2"]


def run_command(folder, *arguments):
    """Run the command in `folder` with its own cache; returns the completed process."""
    environment = {**os.environ, "MEMSAVE_CACHE": str(folder / "cache")}
    return subprocess.run(
        [sys.executable, "-m", "memsave.run", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
