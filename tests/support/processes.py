"""Run a function in several processes of one gloo group, started from a server that has imported torch once."""

import faulthandler
import multiprocessing
import os
import pickle
import traceback
from datetime import timedelta
from multiprocessing.connection import Connection

PRELOADED = ["tests.support.preloaded"]
SECONDS = 120.0  # after that, a hanging process is killed and the test fails


def run_processes(count, function, *args, group=True):
    """[function(*args) of each rank]; `function` is one of a test module. Raises AssertionError if one fails.

    group: start the process group; otherwise the function finds the environment of torchrun, and may start it.
    """
    from torch import distributed

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # as torchrun's agent
    started = []
    for rank in range(count):
        mine, theirs = context.Pipe(duplex=False)
        environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port, "TORCHELASTIC_USE_AGENT_STORE": True}
        target = (theirs, {key: str(value) for key, value in environment.items()}, group)
        process = context.Process(target=_run, args=(*target, pickle.dumps((function, args))))
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


def _run(connection: Connection, environment, group: bool, content: bytes) -> None:
    import torch
    from torch import distributed

    faulthandler.enable()
    os.environ.update(environment)
    torch.set_num_threads(1)
    try:
        function, args = pickle.loads(content)
        if group:
            distributed.init_process_group("gloo", timeout=timedelta(seconds=SECONDS))
        answer = True, function(*args)
        if group:
            distributed.barrier()
    except BaseException:
        answer = False, traceback.format_exc()
    connection.send_bytes(pickle.dumps(answer))
    connection.close()
    os._exit(0)  # an ordinary exit waits for threads of gloo
