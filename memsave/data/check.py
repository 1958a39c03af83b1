"""The command `python -m memsave.data.check`: of texts with data=NAME, otherwise of volumes."""

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str]) -> int:
    """Run the command line; returns the exit code."""
    import memsave.data.text.check as text
    import memsave.data.volumes.check as volumes

    if any(argument.startswith("data=") for argument in arguments):
        return text.main(arguments)
    if {"-h", "--help"} & set(arguments):
        print(f"{volumes.__doc__}\n{text.__doc__}")
        return 0
    return volumes.main(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
