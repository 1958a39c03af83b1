"""How a process that fails tells the others, which may wait for it in a collective.

A failed process writes its error to torchrun's store, which outlives the process group, and leaves the group; with
gloo, the others' collectives then fail at once. Rank 0 finds the error in the store and reports it. The failed process
waits for that before it ends, because torchrun terminates all processes as soon as one has ended with an error.
"""

import os
import pickle
import time
from contextlib import suppress
from datetime import timedelta

from torch import distributed

from memsave.processes import portable, process_count, process_rank

FAILED, FINISHED = "failed", "finished"
SECONDS = 20.0  # torchrun kills processes 30 seconds after it has asked them to end


class ProcessLost(RuntimeError):
    """Another process of the run has ended, and left no error."""


class Interrupted(Exception):
    """Another process of the run was interrupted."""


class Failures:
    """The errors of the processes of one run; does nothing in a single process."""

    def __init__(self) -> None:
        self._rank, self._several = process_rank(), process_count() > 1
        if self._several:
            host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            store = distributed.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=SECONDS))
            self._store = distributed.PrefixStore(f"memsave/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)

    def cause(self, error: Exception) -> Exception:
        """The error that ended the run: this one, or another process's if this one only says that it left the group."""
        if not self._several or not is_lost_connection(error):
            return error
        with suppress(Exception):  # torchrun may have ended
            if self._store.check([FAILED]):
                return pickle.loads(bytes.fromhex(self._store.get(FAILED).decode()))
        return ProcessLost("another process of this run ended without an error message (killed, or out of memory)")

    def leave(self, error: Exception) -> bool:
        """Tell the others the error, leave the group, and wait until rank 0 has reported it.

        Returns True if this process must report it, because it was the first to fail and rank 0 reports nothing.
        """
        if not self._several:
            return False
        mine = (portable(error) or b"").hex()
        first = True
        try:
            first = self._store.compare_set(FAILED, "", mine).decode() == mine
            distributed.destroy_process_group()
            end = time.monotonic() + SECONDS
            while time.monotonic() < end:
                if self._store.check([FINISHED]):
                    return False
                time.sleep(0.05)
        except (Exception, KeyboardInterrupt):  # torchrun has ended, or asks this process to end
            pass
        return first

    def finish(self) -> None:
        """Rank 0 has reported how the run ended."""
        if self._several and self._rank == 0:
            with suppress(Exception):  # torchrun may have ended
                self._store.set(FINISHED, "1")


def is_lost_connection(error: Exception) -> bool:
    """Whether a collective failed because another process left the group."""
    if isinstance(error, distributed.DistError):
        return True
    return isinstance(error, RuntimeError) and any(
        text in str(error) for text in ("gloo", "Connection closed by peer", "Connection reset by peer", "NCCL")
    )
