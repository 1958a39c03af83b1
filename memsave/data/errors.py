"""The exception of `memsave.data`."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class DataError(ValueError):
    """Data that cannot be used; the message is one sentence that names the fault and the remedy."""


def raise_first(faults: Sequence[str], **options: Any) -> None:
    """Raise DataError for the first fault, if there is one, with the command whose `options` list the others."""
    if len(faults) > 1:
        rest = "1 more fault is" if len(faults) == 2 else f"{len(faults) - 1} more faults are"
        texts = {k: str(v) if isinstance(v, (str, Path)) else f"[{','.join(v)}]" for k, v in options.items() if v}
        command = shlex.join(["python", "-m", "memsave.data.check", *(f"{k}={v}" for k, v in texts.items())])
        raise DataError(f"{faults[0].removesuffix('.')}; {rest} listed by {command}.")
    if faults:
        raise DataError(faults[0])
