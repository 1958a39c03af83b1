"""`trainer.processes=4`: a run starts its processes itself, as torchrun does, so that each job of a sweep can, too.

PyTorch's elastic agent, the one of torchrun, runs in this process and starts `python -m memsave.worker` several times.
As a job of submitit, which Slurm starts once on each node, the agents of all nodes find each other.
"""

import logging
import os
import pickle
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memsave.config import ConfigError
from memsave.training.signals import SIGNALS

JOB, CODE = "job", "code"
FIRST_PORT, PORTS = 29_500, 1_000


@dataclass(frozen=True)
class Nodes:
    """The computers of a run."""

    count: int = 1
    first: str = "localhost"
    """The name of the first one, on which rank 0 runs."""
    run: str = "memsave"
    """An id that the agents of one run share."""

    @property
    def endpoint(self) -> str:
        """Where the agents of several nodes meet; a free port on a single one."""
        number = int("".join(filter(str.isdigit, self.run)) or 0)
        return f"{self.first}:{FIRST_PORT + number % PORTS}" if self.count > 1 else "localhost:0"


def nodes_of_job() -> Nodes:
    """The computers of the job of submitit in which this process runs; this one alone without such a job."""
    if "SUBMITIT_EXECUTOR" not in os.environ:
        return Nodes()
    import submitit

    job = submitit.JobEnvironment()
    return Nodes(job.num_nodes, job.hostnames[0], job.job_id)


def launch(job: dict[str, Any], *, processes: int) -> int:
    """Start the processes of a run, and wait for them; returns the exit code of rank 0.

    `job`: the keyword arguments of `memsave.run.execute`. Raises ConfigError if they cannot be spread over the nodes.
    """
    nodes = nodes_of_job()
    if processes % nodes.count:
        raise ConfigError(
            f"trainer.processes={processes} cannot be spread evenly over {nodes.count} nodes; give a multiple of them"
        )
    with tempfile.TemporaryDirectory(prefix="memsave-") as folder:
        (Path(folder) / JOB).write_bytes(pickle.dumps(job))
        ok = _run_agent(nodes, folder, per_node=processes // nodes.count)
        code = Path(folder) / CODE
        return int(code.read_text()) if code.is_file() else 0 if ok else 1


def _run_agent(nodes: Nodes, folder: str, *, per_node: int) -> bool:
    """Run the agent until all processes of this node have ended; whether all succeeded."""
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=nodes.count,
        max_nodes=nodes.count,
        nproc_per_node=per_node,
        run_id=nodes.run,
        rdzv_backend="c10d",
        rdzv_endpoint=nodes.endpoint,
        max_restarts=0,
    )
    threads = str(max(1, (os.cpu_count() or 1) // per_node))
    os.environ.setdefault("OMP_NUM_THREADS", threads)
    with _own_signal_handlers(), _quiet_agent():
        try:
            elastic_launch(config, sys.executable)("-m", "memsave.worker", folder)
        except (ChildFailedError, SignalException):  # the worker has reported why
            return False
    return True


@contextmanager
def _own_signal_handlers() -> Iterator[None]:
    """Restore the handlers of signals at the end; the agent replaces them."""
    before = {number: signal.getsignal(number) for number in (*SIGNALS, signal.SIGQUIT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _quiet_agent() -> Iterator[None]:
    """The agent logs nothing: what a user needs to know, rank 0 says."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)
