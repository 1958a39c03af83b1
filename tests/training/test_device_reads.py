"""A training step does not wait for its device, except for reads that are listed here.

Reading a value of a GPU (`.item()`, `bool(tensor)`, `nonzero`) waits until it has done all work so far. On the CPU,
reads by our own code are counted instead.
"""

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor

import memsave
from memsave.config.compose import compose, to_objects
from memsave.planning.fake_step import fake_step
from tests.support.tiny_configs import TINY_GPT2_DP, TINY_UNET

READS = ("item", "tolist", "nonzero", "cpu", "__bool__", "__int__", "__float__", "__index__")
PACKAGE = str(Path(memsave.__file__).parent)
WARM_UP = 4  # forwards in which layers are checked for the first time


def reads_of(step, monkeypatch):
    """The number of reads of one step, by file of memsave."""
    found = Counter()

    def counting(name):
        original = getattr(Tensor, name)

        def method(self, *args, **kwargs):
            caller = sys._getframe(1).f_code.co_filename
            if caller.startswith(PACKAGE):
                found[Path(caller).name] += 1
            return original(self, *args, **kwargs)

        return method

    with monkeypatch.context() as patch:
        for name in READS:
            patch.setattr(Tensor, name, counting(name))
        step()
    return dict(found)


def warm(overrides, device, monkeypatch):
    """A step of a config, after the first ones."""
    for module in ("late_checks", "head"):
        monkeypatch.setattr(f"memsave.ghost.{module}.is_slow_to_read", lambda tensor: True)
    monkeypatch.setattr("memsave.ghost.independence.IndependenceSchedule.next_check", only_unchecked)
    torch.manual_seed(0)
    made = fake_step(to_objects(compose(overrides)), device=torch.device(device))

    def step():
        with torch.device("cpu"):  # a run has no other default device
            made.run()

    for _ in range(WARM_UP):
        step()
    return step


def only_unchecked(schedule, *, unchecked):
    """No check at random steps."""
    return "complete" if unchecked else ""


MODES = [
    ["memory=stored"],
    ["memory=checkpoint"],
    ["memory=reversible", "memory.engine=hooks"],
    ["memory=reversible", "memory.engine=fused"],
]


@pytest.mark.parametrize("mode", MODES, ids=" ".join)
def test_a_step_of_the_unet_reads_nothing(mode, device, monkeypatch):
    step = warm([*TINY_UNET, *mode], device, monkeypatch)
    assert reads_of(step, monkeypatch) == {}
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("mode", [MODES[1], pytest.param(MODES[2], marks=pytest.mark.slow)], ids=" ".join)
def test_a_private_step_of_the_unet_reads_once_per_backward(mode, device, monkeypatch):
    privacy = ["privacy=ghost", "trainer.micro_batch_size=2"]
    step = warm([*TINY_UNET, *privacy, *mode], device, monkeypatch)
    assert reads_of(step, monkeypatch) == {"late_checks.py": 2, "backward_context.py": 2}  # of two micro-batches


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["privacy=none"], {}),
        (["privacy.passes=1"], {"late_checks.py": 1}),
        (["privacy.passes=2"], {"late_checks.py": 1, "backward_context.py": 1}),
    ],
    ids=["plain", "one pass", "two passes"],
)
def test_a_step_of_a_language_model_reads_mask_targets_and_checks(options, expected, device, monkeypatch):
    step = warm([*TINY_GPT2_DP, "trainer.micro_batch_size=2", *options], device, monkeypatch)
    of_inputs = {"padding.py": 1, "language.py": 1, "stand_in.py": 1, "head.py": 1}
    micro_batches = 2
    found = {name: count / micro_batches for name, count in reads_of(step, monkeypatch).items()}
    assert found == of_inputs | expected
