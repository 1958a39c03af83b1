"""The recorder on whole models: fake tensors predict the bytes of the real step."""

import contextlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from memsave.models import ReversibleUNet3d
from memsave.models.language import causal_lm_losses
from memsave.profiler import MemoryRecorder

MODES = ("stored", "checkpoint", "reversible")


def unet_step(memory, *, blocks=1, engine="auto"):
    """(model, optimizer, inputs, step): one warm training step of a small U-Net."""
    torch.manual_seed(0)
    model = ReversibleUNet3d(channels=(8, 16), blocks=blocks, memory=memory, engine=engine)
    volume = torch.randn(1, 4, 16, 16, 16).contiguous(memory_format=torch.channels_last_3d)
    return train(model, [volume], lambda: model(volume).square().mean())


def gpt2_step(checkpointing=False):
    """The same for a small GPT-2 of transformers, with one loss per example."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=2, n_embd=64, n_head=4, vocab_size=500, n_positions=64, use_cache=False)
    model = transformers.GPT2LMHeadModel(config).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids, mask = torch.zeros(4, 50, dtype=torch.long), torch.ones(4, 50, dtype=torch.long)
    return train(model, [ids, mask], lambda: causal_lm_losses(model, ids, ids, attention_mask=mask).mean())


def train(model, inputs, loss):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=False)

    def step():
        value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # creates the state of the optimizer
    return model, optimizer, inputs, step


def report_of(make, *, fake):
    with FakeTensorMode() if fake else contextlib.nullcontext():
        model, optimizer, _, step = make()
        with MemoryRecorder(model, optimizer=optimizer) as recorder:
            step()
    return recorder.report()


@pytest.mark.parametrize("memory", MODES)  # engine=fused: tests/reversible/test_fused_memory.py
def test_a_unet_on_fake_tensors_takes_the_same_bytes(memory):
    real, fake = (report_of(lambda: unet_step(memory, engine="hooks"), fake=fake) for fake in (False, True))
    assert fake == real  # every event, category and block


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_gpt2_on_fake_tensors_takes_nearly_the_same_bytes(checkpointing):
    real, fake = (report_of(lambda: gpt2_step(checkpointing), fake=fake) for fake in (False, True))
    assert fake.peak_bytes == pytest.approx(real.peak_bytes, rel=0.005)
    for category, size in real.peak_by_category.items():  # transformers creates the mask differently for fake tensors
        assert fake.peak_by_category[category] == pytest.approx(size, abs=0.005 * real.peak_bytes)


@pytest.mark.parametrize(
    "make",
    [
        *(
            pytest.param(
                lambda memory=memory: unet_step(memory, blocks=2, engine="hooks"),
                marks=pytest.mark.slow,
            )
            for memory in MODES
        ),
        gpt2_step,
    ],
    ids=[*MODES, "gpt2"],
)
def test_totals_equal_those_of_mem_tracker(make):
    ours = report_of(make, fake=True)
    with FakeTensorMode():
        model, optimizer, inputs, step = make()
        tracker = MemTracker()
        tracker.track_external(model, optimizer, *inputs)
        with tracker:
            step()
    theirs = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
    assert theirs["Total"] == pytest.approx(ours.peak_bytes, rel=1e-3)
