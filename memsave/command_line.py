"""What the commands that read files and write answers have in common: help, processes, one-sentence errors."""

import sys
from collections.abc import Callable, Sequence

from memsave.arguments import ArgumentError
from memsave.config import ConfigError
from memsave.data import DataError
from memsave.failures import is_lost_connection
from memsave.process_group import start_group, stop_group
from memsave.processes import process_rank, wait_for_all


def run_command(
    body: Callable[[list[str]], int], arguments: Sequence[str] | None, *, help_text: str, extra: str, interrupted: str
) -> int:
    """Run a command; returns its exit code: that of `body`, 2 for bad input, 130 if it was interrupted.

    Several processes of torchrun form a group. They end together, with the same exit code, and only the first one
    prints.

    Args:
        body: gets the arguments. In a group, every process calls it, and its errors are those of `together`.
        arguments: None takes those of the process.
        help_text: printed for --help, and without arguments.
        extra: the extra of the package memsave that the command needs.
        interrupted: printed after an interruption.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    started = False
    try:
        started = start_group()
        if not given or {"-h", "--help"} & set(given):
            code, message = 0 if given else 2, None
            if process_rank() == 0:
                print(help_text)
        else:
            code, message = _run(body, given, extra=extra)
        _print_first(message)
        wait_for_all()  # torchrun ends the others as soon as one process ends with an exit code other than 0
        return code
    except ConfigError as error:  # of start_group: there is no first process
        print(f"memsave: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        _print_first(interrupted)
        return 130
    except RuntimeError as error:
        if not is_lost_connection(error):
            raise
        _print_first("memsave: another process of this command has ended (killed, or out of memory)")
        return 1
    finally:
        if started:
            stop_group()


def _run(body: Callable[[list[str]], int], given: list[str], *, extra: str) -> tuple[int, str | None]:
    """(exit code, the sentence to print if the command failed)."""
    try:
        return body(given), None
    except (ArgumentError, ConfigError, DataError) as error:
        message: object = error
    except OSError as error:
        message = f"{error.filename or 'a file'} cannot be read or written ({error.strerror}); give another one"
    except ModuleNotFoundError as error:
        message = f"the package {error.name} is not installed; install it with: pip install 'memsave[{extra}]'"
    return 2, f"memsave: {message}"


def _print_first(message: str | None) -> None:
    """Print a message, on the first process."""
    if message is not None and process_rank() == 0:
        print(message, file=sys.stderr)
