"""What the commands that read files and write answers have in common: help, one process, one-sentence errors."""

import sys
from collections.abc import Callable, Sequence

from memsave.arguments import ArgumentError
from memsave.config import ConfigError
from memsave.data import DataError
from memsave.processes import several_processes


def run_command(
    body: Callable[[list[str]], int], arguments: Sequence[str] | None, *, help_text: str, extra: str, interrupted: str
) -> int:
    """Run a command; returns its exit code: that of `body`, 2 for bad input, 130 if it was interrupted.

    Args:
        body: gets the arguments.
        arguments: None takes those of the process.
        help_text: printed for --help, and without arguments.
        extra: the extra of the package memsave that the command needs.
        interrupted: printed after an interruption.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or {"-h", "--help"} & set(given):
        print(help_text)
        return 0 if given else 2
    try:
        found = several_processes()
        if found is not None:
            raise ConfigError(f"{found}, and each would write the same files; start one, without torchrun or srun")
        return body(given)
    except (ArgumentError, ConfigError, DataError) as error:
        message: object = error
    except OSError as error:
        message = f"{error.filename or 'a file'} cannot be read or written ({error.strerror}); give another one"
    except ModuleNotFoundError as error:
        message = f"the package {error.name} is not installed; install it with: pip install 'memsave[{extra}]'"
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130
    print(f"memsave: {message}", file=sys.stderr)
    return 2
