"""A run that receives a stop signal leaves a checkpoint that continues bit for bit."""

import os
import signal
import subprocess
import sys

import pytest
import torch

from memsave.training import checkpoint
from memsave.training import signals as interrupt
from memsave.training.loop import make_state, run_steps
from memsave.training.signals import stop_requested
from tests.support.linear_task import Lines, line_model, trainer


def test_repeated_signals_count_once():
    with stop_requested() as stopping:
        for number in (signal.SIGINT, signal.SIGINT, signal.SIGHUP):
            os.kill(os.getpid(), number)
        assert stopping()


def test_an_ignored_hangup_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    try:
        with stop_requested() as stopping:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stopping()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_later_signal_interrupts_at_once_and_handlers_are_put_back(monkeypatch):
    monkeypatch.setattr(interrupt, "SECONDS", -1.0)
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with stop_requested() as stopping:
        assert not stopping()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stopping()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_sigterm_interrupts_the_process():
    program = (
        "import os, signal; from memsave.training.signals import interrupt_at_signals; interrupt_at_signals()\n"
        "try: os.kill(os.getpid(), signal.SIGTERM)\nexcept KeyboardInterrupt: print('interrupted')"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "interrupted\n"


@pytest.mark.parametrize("where", ["forward", "optimizer"])
def test_a_signal_during_a_step_stops_after_the_step(tmp_path, where):
    config = trainer()
    torch.manual_seed(3)
    whole = [done.loss for done in run_steps(make_state(line_model(), config), Lines(), config)]

    torch.manual_seed(3)
    state, calls = make_state(line_model(), config), []

    def kill(*args):
        calls.append(1)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGINT)

    if where == "forward":
        state.model.register_forward_hook(kill)
    else:
        state.optimizer.register_step_pre_hook(kill)
    with stop_requested() as stopping:
        for _ in run_steps(state, Lines(), config):
            if stopping():
                checkpoint.save(state, tmp_path / "checkpoint")
                break
    assert state.step == 4
    resumed = make_state(line_model(), config)
    checkpoint.load(resumed, tmp_path / "checkpoint")
    assert [done.loss for done in run_steps(resumed, Lines(), config)] == whole[4:]
