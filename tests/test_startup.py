"""Ctrl-C while a command of memsave is still importing: one word, exit code 130, no traceback."""

import signal
import subprocess
import sys
import time

import pytest

COMMANDS = {
    "run": ["memsave.run", "experiment=brats_rev"],
    "predict": ["memsave.predict", "checkpoint=nowhere", "input=nowhere", "output=nowhere"],
    "collect": ["memsave.collect", "nowhere"],
    "check": ["memsave.data.check", "root=nowhere"],
}


def interrupted(folder, command, *, delay):
    """(exit code, what was said) of a command that is interrupted so many seconds after memsave was found."""
    arguments = [sys.executable, "-X", "importtime", "-m", *command]  # which tells of every import when it ends
    with subprocess.Popen(arguments, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            if line.split("|")[-1].strip() == "memsave":
                break
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=60)
    return process.returncode, [line for line in told.splitlines() if not line.startswith("import time:")]


@pytest.mark.parametrize("delay", [0.0, 0.2, 0.5])
@pytest.mark.parametrize("name", COMMANDS)
def test_an_interrupt_during_imports_is_one_word(tmp_path, name, delay):
    code, told = interrupted(tmp_path, COMMANDS[name], delay=delay)
    assert (code, told) == (130, ["interrupted"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("program", [["-m", "other.inner"], ["-c", "import other"]])
def test_a_program_that_imports_memsave_keeps_its_own_handling(tmp_path, program):
    (tmp_path / "other").mkdir()  # a package, so that memsave is imported while Python looks for the module of -m
    (tmp_path / "other" / "__init__.py").write_text(
        "import signal, memsave\nprint(signal.getsignal(signal.SIGINT).__name__)\n"
    )
    (tmp_path / "other" / "inner.py").touch()
    done = subprocess.run([sys.executable, *program], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "default_int_handler\n"


def test_an_ignored_interrupt_stays_ignored(tmp_path):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell does for a command in the background
    try:
        code, told = interrupted(tmp_path, COMMANDS["collect"], delay=0.0)
    finally:
        signal.signal(signal.SIGINT, before)
    assert code == 2 and "holds no jobs" in told[0]
