"""The recorder agrees with MemTracker, and does not change the step that it records."""

import contextlib

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from memsave.profiler import MemoryRecorder, allocator_peak
from tests.support.training_programs import ConvNet, conv_program


def record(program, *, model=None, optimizer=None):
    with MemoryRecorder(model or program.model, optimizer=optimizer or program.optimizer) as recorder:
        result = program.step()
    return recorder.report(), result


@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_peak_equals_that_of_mem_tracker(checkpointed):
    ours, _ = record(conv_program(release=True, checkpointed=checkpointed))
    with FakeTensorMode():
        program = conv_program(release=True, checkpointed=checkpointed)
        data = [cell.cell_contents for cell in program.step.__closure__]
        tracker = MemTracker()
        tracker.track_external(
            program.model, program.optimizer, *(item for item in data if isinstance(item, torch.Tensor))
        )
        with tracker:
            program.step()
    theirs = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
    assert ours.peak_bytes == theirs["Total"]
    assert ours.timeline.start["parameter"] == theirs["Parameter"]


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("order", ["fake first", "recorder first", "fake model alone"])
def test_fake_tensors_give_the_same_report(order, checkpointed):
    real, _ = record(conv_program(checkpointed=checkpointed, release=True, warm=True))
    mode = FakeTensorMode()
    with mode:
        program = conv_program(checkpointed=checkpointed, release=True, warm=True)
    recorder = MemoryRecorder(program.model, optimizer=program.optimizer)
    with contextlib.ExitStack() as stack:
        stack.enter_context(mode if order == "fake first" else contextlib.nullcontext())
        stack.enter_context(recorder)
        stack.enter_context(mode if order == "recorder first" else contextlib.nullcontext())
        program.step()
    assert recorder.report() == real


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.usefixtures("device")
def test_losses_and_gradients_are_bit_equal(checkpointed):
    plain, watched = conv_program(checkpointed=checkpointed), conv_program(checkpointed=checkpointed)
    for _ in range(3):
        expected = plain.step()
        _, found = record(watched)
        assert len(expected) == len(found) > 1
        assert all(torch.equal(a, b) for a, b in zip(expected, found))
    assert all(torch.equal(a, b) for a, b in zip(plain.model.parameters(), watched.model.parameters()))


@pytest.mark.parametrize("checkpointed", [False, True])
def test_hooks_do_not_change_lifetimes(checkpointed):
    hooked, _ = record(conv_program(checkpointed=checkpointed, release=True))
    program = conv_program(checkpointed=checkpointed, release=True)
    bystander = nn.Linear(1, 1)  # the hooks are on another model, whose 8 bytes are counted, too
    bare, _ = record(program, model=bystander, optimizer=torch.optim.SGD(bystander.parameters()))
    assert hooked.timeline.deltas == bare.timeline.deltas
    assert hooked.peak_bytes == bare.peak_bytes - 8


@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_allocator_peak_does_not_change_under_the_recorder(checkpointed):
    plain = conv_program(checkpointed=checkpointed, release=True, warm=True, size=32)
    watched = conv_program(checkpointed=checkpointed, release=True, warm=True, size=32)
    assert allocator_peak(plain.step) == allocator_peak(lambda: record(watched))


def hook_counts(model, optimizer):
    modules = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    parameters = [len(p._post_accumulate_grad_hooks or {}) for p in model.parameters()]
    steps = len(optimizer._optimizer_step_pre_hooks) + len(optimizer._optimizer_step_post_hooks)
    return sum(modules), sum(parameters), steps


@pytest.mark.parametrize("fail", [False, True])
def test_all_hooks_are_removed_at_exit_and_after_an_exception(fail):
    program = conv_program()
    recorder = MemoryRecorder(program.model, optimizer=program.optimizer)
    with pytest.raises(KeyError) if fail else contextlib.nullcontext(), recorder:
        assert min(hook_counts(program.model, program.optimizer)) > 0
        program.step()
        if fail:
            raise KeyError("broken step")
    assert hook_counts(program.model, program.optimizer) == (0, 0, 0)
    assert recorder.report().peak_bytes > 0
    before = len(recorder.report().timeline)
    program.step()
    assert len(recorder.report().timeline) == before


def test_a_failed_entry_removes_all_hooks():
    class Stubborn(nn.Linear):
        def register_forward_hook(self, *args, **kwargs):
            raise TypeError("no hooks")

    model = nn.Sequential(nn.Linear(2, 2), Stubborn(2, 2))
    with pytest.raises(TypeError, match="no hooks"), MemoryRecorder(model):
        raise AssertionError("entered")
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model) == 0
    assert torch._C._len_torch_dispatch_stack() == 0


def test_modules_are_correct_after_a_forward_that_raises():
    class Fails(nn.Module):
        def forward(self, x):
            raise ValueError("broken forward")

    model = nn.ModuleDict({"outer": nn.Sequential(nn.Linear(4, 4), Fails()), "fine": nn.Linear(4, 4)})
    x = torch.randn(2, 4)
    with MemoryRecorder(model) as recorder:
        with contextlib.suppress(ValueError):
            model["outer"](x)
        kept = [model["fine"](x), x + 1]
    made = [block.module for block in recorder.report().blocks if block.category == "activation"]
    assert made == ["fine", None]
    assert len(kept) == 2


def test_cpu_autocast_is_recorded():
    program = conv_program(release=True)
    x = torch.randn(2, 2, 8, 8)

    def step():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = program.model(x).float().sum()
        loss.backward()
        program.optimizer.step()

    program.step = step
    report, _ = record(program)
    assert "bfloat16" in {block.dtype for block in report.blocks}
    assert sum(report.peak_by_category.values()) == report.peak_bytes


def test_entering_twice_and_reporting_early_raise_errors():
    recorder = MemoryRecorder(ConvNet())
    with pytest.raises(RuntimeError, match="leave the recorder's with-block first"):
        recorder.report()
    with recorder, pytest.raises(RuntimeError, match="leave the recorder's with-block first"):
        recorder.report()
    with pytest.raises(RuntimeError, match="make a new one for each recording"):
        recorder.__enter__()
    recorder.report()
