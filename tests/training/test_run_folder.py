"""A folder holds one run."""

import subprocess
import sys

import pytest

from memsave.config import ConfigError
from memsave.training.run_folder import WORK, lock_folder, refuse_second_run


@pytest.mark.parametrize("name", WORK)
def test_a_second_run_is_refused_unless_it_resumes(tmp_path, name):
    folder, other = tmp_path / "run", tmp_path / "other"
    folder.mkdir()
    refuse_second_run(folder, resume=None)
    (folder / name).mkdir()
    for resume in (None, str(other), str(other / "checkpoint")):
        with pytest.raises(ConfigError, match=rf"already holds a run \({name}\); continue it with trainer\.resume="):
            refuse_second_run(folder, resume=resume)
    for resume in (folder, folder / "checkpoint", folder / "checkpoint.previous"):
        refuse_second_run(folder, resume=str(resume))


def test_a_folder_is_locked_until_its_process_ends(tmp_path):
    hold = f"""
from pathlib import Path
from memsave.training.run_folder import lock_folder
with lock_folder(Path({str(tmp_path)!r})):
    print("held", flush=True)
    input()
"""
    holder = subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with pytest.raises(ConfigError, match="another process runs in"), lock_folder(tmp_path):
        pass
    holder.kill()
    holder.wait()
    with lock_folder(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []
