"""The command `python -m memsave.data.check`; see `memsave.data.volumes.check`, which `--help` prints."""

import sys

from memsave.data.volumes.check import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
