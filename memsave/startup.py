"""Ctrl-C while a command imports its modules, which takes seconds, before the command has installed its own handlers.

Importing memsave installs a handler for SIGINT if the process is `python -m memsave.SOMETHING`, before any other
import. It changes nothing in other programs that import memsave.
"""

import os
import signal
import sys


def quit_at_interrupt() -> None:
    """Make SIGINT end a command of memsave with the message "interrupted" and exit code 130, until it has a handler."""
    if _is_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _quit)


def _is_command() -> bool:
    """Whether Python is locating the module of `-m`, and that module belongs to memsave."""
    given = sys.orig_argv
    named = given[given.index("-m") + 1 :] if "-m" in given else []
    return sys.argv[:1] == ["-m"] and bool(named) and named[0].startswith("memsave.")


def _quit(number: int, frame: object) -> None:
    """Exit at once: an exception could be lost in a C extension during its import, or print a traceback."""
    os.write(2, b"interrupted\n")
    os._exit(130)
