"""The command `python -m memsave.data.check`, implemented in `memsave.data.volumes.check`."""

import sys

from memsave.data.volumes.check import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
