"""One process of a run that `memsave.launch` starts: `python -m memsave.worker FOLDER`, with the job in the folder."""

import pickle
import sys
from pathlib import Path

from memsave.following import follow
from memsave.launch import CODE, JOB
from memsave.leading import end_followers
from memsave.process_group import start_group
from memsave.processes import process_rank
from memsave.run import execute
from memsave.training.signals import interrupt_at_signals


def main(folder: Path) -> int:
    """Take part in the job; returns the exit code, which rank 0 also writes to the folder."""
    start_group()
    if process_rank() > 0:
        return follow()
    interrupt_at_signals()
    code = 1
    try:
        code = execute(**pickle.loads((folder / JOB).read_bytes()))
    except KeyboardInterrupt:
        code = 130
    finally:
        end_followers(code)
        (folder / CODE).write_text(str(code))
    return code


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
