"""Categories, phases and modules of each byte are exact and add up to the total."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from memsave.profiler import CATEGORIES, MemoryRecorder
from tests.support.training_programs import ConvNet, Program, conv_program


def record(program: Program):
    with MemoryRecorder(program.model, optimizer=program.optimizer) as recorder:
        program.step()
    return recorder.report()


def parameter_bytes(model: nn.Module) -> int:
    return sum(parameter.untyped_storage().nbytes() for parameter in model.parameters())


def assert_adds_up(report) -> None:
    assert set(report.peak_by_category) == set(CATEGORIES)
    assert sum(report.peak_by_category.values()) == report.peak_bytes
    by_category = report.timeline.by_category()
    totals = report.timeline.totals()
    assert [sum(sizes) for sizes in zip(*by_category.values(), strict=True)] == totals
    assert max(totals) == totals[report.peak_index] == report.peak_bytes
    assert all(size >= 0 for sizes in by_category.values() for size in sizes)
    for name, size in report.peak_by_category.items():
        assert by_category[name][report.peak_index] == size
        assert sum(block.bytes for block in report.blocks if block.category == name) == size


@pytest.mark.usefixtures("device")
def test_every_category_of_a_linear_layer_is_exact():
    model = nn.Linear(10, 5)
    model.register_buffer("scale", torch.ones(5))
    x = torch.randn(4, 10)

    def step():
        y = model(x)  # 80, kept by square
        z = (y * model.scale).square()  # the product (80 bytes) is saved, the square (80 bytes) is not
        loss = z.sum()
        loss.backward()

    with MemoryRecorder(model) as recorder:
        step()
    report = recorder.report()
    start = report.timeline.start
    assert start["parameter"] == (50 + 5) * 4
    assert start["buffer"] == 20
    assert start["input"] == 160
    at_backward = report.timeline.phases[1][0]
    by_category = report.timeline.by_category()
    # Kept: y for the product's gradient? No: scale needs no gradient, so only the product and what Python holds:
    # y, z and loss are local names, and the root gradient (4 bytes) is created before the backward begins.
    assert by_category["activation"][at_backward] == 80 + 80 + 80 + 4 + 4
    assert by_category["gradient"][-1] == (50 + 5) * 4
    assert by_category["temporary"][-1] == 0 == by_category["activation"][-1]
    assert_adds_up(report)


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("release", [False, True])
@pytest.mark.usefixtures("device")
def test_parameters_gradients_and_optimizer_state_are_exact(warm, release):
    program = conv_program(release=release, warm=warm)
    size, count = parameter_bytes(program.model), len(list(program.model.parameters()))
    buffers = sum(buffer.untyped_storage().nbytes() for buffer in program.model.buffers())
    by_category = record(program).timeline.by_category()
    assert set(by_category["parameter"]) == {size}
    assert set(by_category["buffer"]) == {buffers}
    assert max(by_category["gradient"]) == size
    assert by_category["gradient"][-1] == (0 if release else size)
    assert by_category["gradient"][0] == (size if warm and not release else 0)
    assert by_category["optimizer"][-1] == 2 * size + 4 * count
    assert by_category["optimizer"][0] == (2 * size + 4 * count if warm else 0)


@pytest.mark.parametrize("options", [{"foreach": False}, {"foreach": True}, {"fused": True}], ids=str)
def test_all_optimizer_implementations_are_exact(options):
    program = conv_program(release=True)
    program.optimizer = torch.optim.AdamW(program.model.parameters(), **options)
    x = torch.randn(2, 2, 8, 8)

    def step():
        program.model(x).sum().backward()
        program.optimizer.step()
        program.optimizer.zero_grad()

    program.step = step
    report = record(program)
    size, count = parameter_bytes(program.model), len(list(program.model.parameters()))
    assert report.timeline.by_category()["optimizer"][-1] == 2 * size + 4 * count
    assert "optimizer" in [phase for _, phase in report.timeline.phases]
    assert_adds_up(report)


def test_gradients_released_inside_the_backward_are_gradients():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))

    def consume(parameter):
        parameter.data.sub_(parameter.grad)
        parameter.grad = None

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(consume)
    x = torch.randn(2, 8)
    with MemoryRecorder(model) as recorder:
        model(x).sum().backward()
    gradient = recorder.report().timeline.by_category()["gradient"]
    assert gradient[-1] == 0
    assert 8 * 8 * 4 <= max(gradient) < parameter_bytes(model)


def test_gradients_assigned_by_hand_are_gradients():
    model = nn.Linear(6, 6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(2, 6)

    def step():
        found = torch.autograd.grad(model(x).sum(), list(model.parameters()))
        for parameter, gradient in zip(model.parameters(), found):
            parameter.grad = gradient
        del found, gradient
        optimizer.step()
        optimizer.zero_grad()

    with MemoryRecorder(model, optimizer=optimizer) as recorder:
        step()
    gradient = recorder.report().timeline.by_category()["gradient"]
    assert (max(gradient), gradient[-1]) == (parameter_bytes(model), 0)


def test_tensors_dropped_in_the_forward_are_temporary_and_kept_ones_are_activations():
    x = torch.randn(100, requires_grad=True)

    def step():
        kept = x.exp()
        dropped = (kept + 1) + 1
        loss = dropped.sum()
        del dropped
        loss.backward()

    with MemoryRecorder(nn.Identity()) as recorder:
        step()
    by_category = recorder.report().timeline.by_category()
    assert max(by_category["activation"]) == 400 + 4 + 4
    assert max(by_category["temporary"]) >= 800


class Keeps(torch.autograd.Function):
    """Saves a tensor that its backward does not use, and creates none in its backward."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x * 2)
        return x.sum()

    @staticmethod
    def backward(ctx, *grads):
        return grads[0].expand(100)


def test_tensors_released_at_the_start_of_backward_are_activations():
    x = torch.randn(100, requires_grad=True)
    with MemoryRecorder(nn.Identity()) as recorder:
        Keeps.apply(x).backward()
    assert max(recorder.report().timeline.by_category()["activation"]) == 400 + 4 + 4


def test_gradients_of_activations_are_temporary():
    x = torch.randn(100, requires_grad=True)
    with MemoryRecorder(nn.Identity()) as recorder:
        (found,) = torch.autograd.grad(x.exp().sum(), x)
    end = {name: sizes[-1] for name, sizes in recorder.report().timeline.by_category().items()}
    assert end["temporary"] == 400
    assert found.shape == (100,)


def test_two_forwards_before_one_backward_have_exact_categories():
    model = nn.Sequential(nn.Linear(8, 8), nn.Sigmoid())
    x = torch.randn(4, 8)

    def step():
        for _ in range(2):
            (model(x).sum() + model(x).sum()).backward()

    with MemoryRecorder(model) as recorder:
        step()
    report = recorder.report()
    assert [phase for _, phase in report.timeline.phases] == ["forward", "backward", "forward", "backward"]
    for state, phase in report.timeline.phases:
        if phase == "backward":
            # Two sigmoids; four sums, the total and the root gradient are scalars that may have died already.
            kept = report.timeline.by_category()["activation"][state]
            assert 2 * 128 <= kept <= 2 * 128 + 6 * 4


def test_phases_and_modules_of_a_checkpointed_step_are_correct():
    report = record(conv_program(checkpointed=True, size=16))
    phases = [phase for _, phase in report.timeline.phases]
    assert phases[0] == "forward"
    assert phases.count("recompute") == 3
    assert phases[-2:] == ["optimizer", "forward"]  # the step copies its gradients last, outside all modules
    rebuilt = [block for block in report.blocks if block.phase == "recompute"]
    assert rebuilt and {block.module for block in rebuilt} <= {f"blocks.2.{index}" for index in range(3)}
    assert {block.category for block in rebuilt} == {"temporary"}
    owned = {(block.category, block.module) for block in report.blocks}
    assert ("parameter", "blocks.0.2") in owned and ("buffer", "norm") in owned and ("activation", "stem") in owned


@pytest.mark.parametrize("checkpointed", [False, True])
def test_allocations_of_a_backward_belong_to_the_module_of_the_node(checkpointed):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.act, self.last = nn.Linear(4, 8), nn.Sigmoid(), nn.Linear(8, 16)

        def forward(self, x):
            body = nn.Sequential(self.first, self.act, self.last)
            return checkpoint(body, x, use_reentrant=False) if checkpointed else body(x)

    net, x = Net(), torch.randn(3, 4)
    with MemoryRecorder(net) as recorder:
        (net(x) ** 2).sum().backward()
    made = {(block.module, block.shape) for block in recorder._ledger.blocks if block.phase == "backward"}
    assert ("last", (3, 8)) in made  # the gradient of its input
    assert ("act", (3, 8)) in made  # and that of the activation's input
    assert ("first", (8, 4)) in made and ("last", (16, 8)) in made  # weights
    assert {shape for module, shape in made if module is None} <= {(), (3, 16)}  # of the loss, outside all modules


def test_modules_of_a_backward_inside_a_forward_are_correct():
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            x = x.detach().requires_grad_()
            (grad,) = torch.autograd.grad(self.layer(x).sigmoid().sum(), x)
            return grad

    net = nn.Sequential(Inner(), nn.Linear(4, 2))
    with MemoryRecorder(net) as recorder:
        net(torch.randn(3, 4)).sum().backward()
    made = {(block.module, block.shape) for block in recorder._ledger.blocks if block.phase == "backward"}
    assert ("0.layer", (3, 4)) in made and ("0", (3, 4)) in made and ("1", (2, 4)) in made


def test_a_checkpointed_function_without_modules_is_recompute():
    x = torch.randn(100, requires_grad=True)
    with MemoryRecorder(nn.Identity()) as recorder:
        checkpoint(lambda x: x.exp().sin(), x, use_reentrant=False).sum().backward()
    assert "recompute" in [phase for _, phase in recorder.report().timeline.phases]


def test_clipping_after_a_backward_belongs_to_the_backward():
    model = nn.Linear(8, 8)
    x = torch.randn(2, 8)
    with MemoryRecorder(model) as recorder:
        model(x).sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    assert [phase for _, phase in recorder.report().timeline.phases] == ["forward", "backward"]


def test_checkpoint_peaks_below_stored():
    stored, frugal = (record(conv_program(checkpointed=flag, size=16, depth=6)) for flag in (False, True))
    assert frugal.peak_bytes < stored.peak_bytes
    assert max(frugal.timeline.by_category()["activation"]) < max(stored.timeline.by_category()["activation"])


def test_inference_keeps_only_the_output():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    x = torch.randn(4, 8)
    with torch.no_grad(), MemoryRecorder(model) as recorder:
        result = model(x)
    end = {name: sizes[-1] for name, sizes in recorder.report().timeline.by_category().items()}
    assert end["activation"] == result.untyped_storage().nbytes()
    assert end["temporary"] == 0


@settings(max_examples=25, deadline=None)
@given(
    widths=st.lists(st.integers(1, 9), min_size=2, max_size=4),
    batch=st.integers(1, 4),
    act=st.sampled_from([nn.ReLU, nn.SiLU, nn.Tanh]),
    recompute=st.booleans(),
    convolution=st.booleans(),
    optimizer_kind=st.sampled_from([torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad]),
)
@pytest.mark.usefixtures("device")
def test_categories_add_up_for_random_programs(widths, batch, act, recompute, convolution, optimizer_kind):
    layers: list[nn.Module] = []
    for inner, outer in pairwise(widths):
        layers += [nn.Conv1d(inner, outer, 1) if convolution else nn.Linear(inner, outer), act()]
    model = nn.Sequential(*layers)
    optimizer = optimizer_kind(model.parameters(), lr=0.1)
    x = torch.randn(batch, widths[0], 3) if convolution else torch.randn(batch, widths[0])

    def step():
        y = checkpoint(model, x, use_reentrant=False) if recompute else model(x)
        y.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    report = record(Program(model, optimizer, step))
    assert_adds_up(report)
    by_category = report.timeline.by_category()
    assert set(by_category["parameter"]) == {parameter_bytes(model)}
    assert max(by_category["gradient"]) == parameter_bytes(model)
    assert by_category["activation"][-1] == by_category["temporary"][-1] == by_category["gradient"][-1] == 0


@pytest.mark.usefixtures("device")
def test_tied_parameters_count_once():
    model = ConvNet()
    model.again = model.head
    assert_adds_up(record(Program(model, torch.optim.SGD(model.parameters()), lambda: model(torch.randn(1, 2, 8, 8)))))
    tied = nn.ModuleDict({"a": nn.Linear(4, 4, bias=False), "b": nn.Linear(4, 4, bias=False)})
    tied["b"].weight = tied["a"].weight
    with MemoryRecorder(tied) as recorder:
        tied["b"](tied["a"](torch.randn(2, 4))).sum().backward()
    assert recorder.report().peak_by_category["parameter"] == 64
