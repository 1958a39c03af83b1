"""Run a function in several processes of one gloo group, started from a server that has imported torch once."""

import multiprocessing
import os
import pickle
import tempfile
import traceback
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path

PRELOADED = ["tests.support.preloaded"]
SECONDS = 120.0  # after that, a hanging process is killed and the test fails


def run_processes(count, function, *args):
    """[function(*args) of each rank]; `function` is one of a test module. Raises AssertionError if one fails."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        started = []
        for rank in range(count):
            mine, theirs = context.Pipe(duplex=False)
            target = (theirs, Path(folder) / "store", rank, count, pickle.dumps((function, args)))
            process = context.Process(target=_run, args=target, daemon=True)
            process.start()
            theirs.close()
            started.append((process, mine))
        try:
            answers = [_answer(process, mine) for process, mine in started]
        finally:
            for process, _ in started:
                process.kill()
                process.join()
    failed = [f"rank {rank}:\n{content}" for rank, (ok, content) in enumerate(answers) if not ok]
    assert not failed, "\n".join(failed)
    return [content for _, content in answers]


def _answer(process, connection: Connection):
    try:
        if not connection.poll(SECONDS):
            return False, f"no answer after {SECONDS:g} seconds"
        return pickle.loads(connection.recv_bytes())
    except EOFError:
        process.join(5)
        return False, f"ended with exit code {process.exitcode} and without an answer"


def _run(connection: Connection, store: Path, rank: int, count: int, content: bytes) -> None:
    import faulthandler

    import torch
    from torch import distributed

    faulthandler.enable()
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(count), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    try:
        distributed.init_process_group(
            "gloo",
            store=distributed.FileStore(str(store), count),
            rank=rank,
            world_size=count,
            timeout=timedelta(seconds=SECONDS),
        )
        function, args = pickle.loads(content)
        answer = True, function(*args)
        distributed.barrier()
    except BaseException:
        answer = False, traceback.format_exc()
    connection.send_bytes(pickle.dumps(answer))
    connection.close()
    os._exit(0)  # an ordinary exit waits for threads of gloo
