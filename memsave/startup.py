"""Ctrl-C while a command starts: its imports take seconds, and none of its own handlers is there yet.

Importing memsave installs the handler where the process is `python -m memsave.SOMETHING`, before anything else is
imported; no other program that imports memsave is touched.
"""

import os
import signal
import sys


def quit_at_interrupt() -> None:
    """Have SIGINT end a command of memsave with one word and exit code 130, until the command handles it itself."""
    if _is_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _quit)


def _is_command() -> bool:
    """Whether Python is locating the module that `-m` names, and it is one of memsave's."""
    given = sys.orig_argv
    named = given[given.index("-m") + 1 :] if "-m" in given else []
    return sys.argv[:1] == ["-m"] and bool(named) and named[0].startswith("memsave.")


def _quit(number: int, frame: object) -> None:
    """An exception would be lost in C extensions that are being imported, or end in their traceback."""
    os.write(2, b"interrupted\n")
    os._exit(130)
