"""How a process that fails tells the others, which may wait for it in a collective.

A failed process writes its error to torchrun's store, which outlives the process group. A thread of rank 0 finds it
there, also while rank 0 waits in a collective that will not end, and reports it. The failed process waits for that
before it ends, because torchrun terminates all processes as soon as one has ended with an error.
"""

import os
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

from torch import distributed

from memsave.processes import portable, process_count, process_rank

FAILED, FINISHED = "failed", "finished"
SECONDS = 20.0  # torchrun kills processes 30 seconds after it has asked them to end
POLL, GRACE = 0.5, 3.0  # rank 0 looks for errors this often, and then has this long to find them by itself


class ProcessLost(RuntimeError):
    """Another process of the run has ended, and left no error."""


class Interrupted(Exception):
    """Another process of the run was interrupted."""


class Failures:
    """The errors of the processes of one run; does nothing in a single process."""

    def __init__(self) -> None:
        self._rank, self._several = process_rank(), process_count() > 1
        if self._several:
            self._store = _connected()

    @contextmanager
    def watched(self, report: Callable[[Exception], int]) -> Iterator[None]:
        """Within, rank 0 reports the error of another process and ends, also while it waits for that process.

        `report(error)` returns the exit code.
        """
        if not self._several or self._rank > 0:
            yield
            return
        ended = threading.Event()
        threading.Thread(target=self._watch, args=(ended, report), daemon=True).start()
        try:
            yield
        finally:
            ended.set()

    def _watch(self, ended: threading.Event, report: Callable[[Exception], int]) -> None:
        with suppress(Exception):  # torchrun may have ended
            store = _connected()
            while not ended.wait(POLL):
                if store.check([FAILED]) and not ended.wait(GRACE):
                    code = report(_read(store))
                    store.set(FINISHED, "1")
                    os._exit(code)

    def cause(self, error: Exception) -> Exception:
        """The error that ended the run: this one, or another process's if this one only says that it left the group."""
        if not self._several or not is_lost_connection(error):
            return error
        with suppress(Exception):  # torchrun may have ended
            if self._store.check([FAILED]):
                return _read(self._store)
        return ProcessLost("another process of this run ended without an error message (killed, or out of memory)")

    def leave(self, error: Exception) -> bool:
        """Tell the others the error, and wait until rank 0 has reported it.

        Returns True if this process must report it, because it was the first to fail and rank 0 reports nothing.
        """
        if not self._several:
            return False
        mine = (portable(error) or b"").hex()
        first = True
        try:
            first = self._store.compare_set(FAILED, "", mine).decode() == mine
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


def _connected() -> distributed.Store:
    """A connection to the store of torchrun; each thread needs its own."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = distributed.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=SECONDS))
    return distributed.PrefixStore(f"memsave/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def _read(store: distributed.Store) -> Exception:
    return pickle.loads(bytes.fromhex(store.get(FAILED).decode()))


def is_lost_connection(error: Exception) -> bool:
    """Whether a collective failed because another process left the group."""
    if isinstance(error, distributed.DistError):
        return True
    return isinstance(error, RuntimeError) and any(
        text in str(error) for text in ("gloo", "Connection closed by peer", "Connection reset by peer", "NCCL")
    )
