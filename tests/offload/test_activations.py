"""Activations in host memory: the same gradients, bit for bit, less live memory, and the errors of plain training."""

import copy
import gc
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from memsave.host_bytes import host_bytes
from memsave.models.unet import ReversibleUNet3d
from memsave.offload import ActivationOffload
from memsave.offload.activations import _needed_bytes
from memsave.profiler import MemoryRecorder
from memsave.profiler.calibration import TrainingStep
from memsave.profiler.planner import peak_on_fake
from tests.support.same_bits import assert_same


@pytest.fixture(autouse=True)
def _no_garbage():
    """Errors of earlier tests refer to graphs, whose bytes would count here."""
    gc.collect()


def offload(model, **options):
    """Every storage is offloaded, and no copy waits on the device longer than it must."""
    return ActivationOffload(model, **{"min_bytes": 1, "waiting_bytes": 0, **options})


def gradients(model, x, context=None, *, loss=lambda y: y.square().mean()):
    """(the loss, the gradients of x and of each parameter, the most bytes in host memory) of one step."""
    torch.manual_seed(1)
    model.zero_grad()
    x = x.clone().requires_grad_()
    if context is None:
        value = loss(model(x))
    else:
        with context:
            value = loss(model(x))
    held = host_bytes()
    value.backward()
    return [value.detach(), x.grad, *(p.grad for p in model.parameters())], held


def assert_same_bits(model, x, **options):
    plain, before = gradients(model, x)
    moved, held = gradients(model, x, offload(model, **options)())
    assert held > before
    assert_same(plain, moved)
    assert host_bytes() == before  # backward frees all of it


def unet(**options):
    torch.manual_seed(0)
    return ReversibleUNet3d(2, 2, channels=(8, 16), blocks=2, expansion=2, dropout=0.1, **options)


def volume():
    return torch.randn(1, 2, 8, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2), device="cpu").to(
        torch.empty(0).device
    )


@pytest.mark.parametrize(
    "options",
    [
        {"memory": "stored"},
        {"memory": "checkpoint"},
        {"memory": "reversible", "engine": "hooks"},
        {"memory": "reversible", "engine": "hooks", "anchor_every": 1},
        {"memory": "reversible", "engine": "auto", "chunks": 2},
        {"memory": "reversible", "anchor_every": 1, "grid": 2**-14},
        {"memory": ("stored", "reversible"), "skip": "concat"},
    ],
    ids=str,
)
def test_a_unet_has_the_same_gradients_in_every_mode(options, device):
    assert_same_bits(unet(**options).double(), volume())


def test_a_language_model_has_the_same_gradients(device):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=50, n_positions=20)
    model, ids = transformers.GPT2LMHeadModel(sizes).double(), torch.arange(30).reshape(2, 15)

    def step(context):
        torch.manual_seed(3)
        model.zero_grad()
        with context:
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return [p.grad for p in model.parameters()]

    moving = offload(model)
    plain = step(torch.enable_grad())
    for _ in range(2):  # the second time with recomputed layers
        assert all(map(torch.equal, plain, step(moving(keep=[ids]))))
        model.gradient_checkpointing_enable()


class Views(nn.Module):
    """Saves views of one storage: with strides, offsets, gaps and overlaps."""

    def forward(self, x):
        a, b = x.chunk(2, dim=1)
        wide = x[:, :1].expand(-1, 3, -1)
        return (a.exp() * b.transpose(1, 2).sin().transpose(1, 2)).sum() + (wide * wide).sum() + x[1:, 1::2].cos().sum()


def test_views_of_one_storage_share_one_copy(device):
    x = torch.randn(3, 4, 5, dtype=torch.float64).requires_grad_()
    before, base = host_bytes(), x * 1
    with offload(Views())():
        y = Views()(base)
        shared = host_bytes() - before
    own = [base.exp()[:, :2], base.sin()[:, 2:]]  # what is new: two results that are saved, besides the base
    assert shared <= base.numel() * 8 + 3 * max(each.untyped_storage().nbytes() for each in own)
    y.backward()
    assert_same_bits(nn.Sequential(nn.PReLU(dtype=torch.float64), Views()), x.detach())


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 4), min_size=1, max_size=4),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64]),
    order=st.randoms(use_true_random=False),
    starts=st.lists(st.integers(0, 3), min_size=4, max_size=4),
    steps=st.lists(st.integers(1, 2), min_size=4, max_size=4),
)
def test_any_view_comes_back_with_its_values_strides_and_dtype(sizes, dtype, order, starts, steps, device):
    full = [size * step + start for size, start, step in zip(sizes, starts, steps)]
    base = torch.randn(full, dtype=torch.complex64 if dtype.is_complex else torch.float32).to(dtype)
    base.requires_grad_()
    view = (base * 1)[tuple(slice(start, None, step) for start, step in zip(starts, steps[: len(sizes)]))]
    dims = list(range(view.dim()))
    order.shuffle(dims)
    view = view.permute(dims)
    seen = []

    class Save(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.sum()

        @staticmethod
        def backward(ctx, grad):
            (x,) = ctx.saved_tensors
            seen.append(x)
            return grad.expand(x.shape)

    with offload(nn.Identity())():
        y = Save.apply(view)
    expected, shape, strides = view.detach().clone(), view.shape, view.stride()
    del view
    y.real.backward() if dtype.is_complex else y.backward()
    (found,) = seen
    assert (found.shape, found.stride(), found.dtype) == (shape, strides, dtype)
    assert torch.equal(found, expected)


def test_a_small_part_of_a_storage_is_copied_alone_at_its_alignment():
    whole = torch.zeros(100_000)
    first, length = _needed_bytes(whole[1000:2000])
    assert first == 4000 // 512 * 512 and first + length == 8000
    assert _needed_bytes(whole[:60_000]) == (0, 400_000)
    assert _needed_bytes(whole[:0]) == (0, 0)


def test_parameters_buffers_small_and_kept_tensors_stay_on_the_device(device):
    model, x = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)), torch.randn(8, 8)
    model[1].weight.detach().mul_(2)
    before = host_bytes()
    with offload(model)(keep=[x, "text"]):
        y = nn.functional.linear(x, model[0].weight.detach().t()) * model[1].running_var
        z = x.clone().requires_grad_() * x[2:4].sum() * model[0].weight.t()
        assert host_bytes() - before <= 8 * 8 * 4 + 8  # the clone and one number
    del y, z
    with ActivationOffload(model, min_bytes=10_000)():
        model(x).exp()
        assert host_bytes() == before


def test_a_storage_that_is_alive_is_not_copied_back(device):
    model = nn.Identity()
    x = torch.randn(1000, requires_grad=True)
    with offload(model)():
        y = x * 1
        z = y.exp()  # saves its result
    found = z.grad_fn._saved_result
    assert found.untyped_storage().data_ptr() == z.untyped_storage().data_ptr()
    z.sum().backward()


def test_several_backwards_and_double_backward(device):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Sigmoid()).double()
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)

    def run(context):
        with context:
            y = model(x).square().sum()
        first = torch.autograd.grad(y, x, retain_graph=True)[0]
        (again,) = torch.autograd.grad(y, x, create_graph=True)
        (second,) = torch.autograd.grad(again.square().sum(), x)
        return first, again.detach(), second

    before = host_bytes()
    assert all(map(torch.equal, run(torch.enable_grad()), run(offload(model)())))
    gc.collect()
    assert host_bytes() == before


def test_a_change_in_place_after_the_save_is_an_error(device):
    with offload(nn.Identity())():
        x = torch.randn(500, requires_grad=True) * 1
        y = x.sin()
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    with offload(nn.Identity(), min_bytes=10_000)():  # also of a tensor that stays
        x = torch.randn(5, requires_grad=True) * 1
        y = x.sin()
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_tensor_saved_before_and_after_a_change_has_two_copies(device):
    x = torch.randn(500, dtype=torch.float64, requires_grad=True)
    with offload(nn.Identity())():
        y = x * 1
        before = y.sin()
        y.add_(1)
        after = y.cos()
    del y
    after.sum().backward()
    torch.testing.assert_close(x.grad, -(x + 1).sin().detach(), rtol=1e-12, atol=0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        before.sum().backward()


def test_an_in_place_change_of_a_reversible_output_is_explained(device):
    model = unet(memory="reversible", engine="hooks").double().encoder[0]
    x = torch.randn(1, 8, 4, 4, 4, dtype=torch.float64, requires_grad=True)
    with offload(model)():
        y = model(x)
    y.mul_(2)
    with pytest.raises(RuntimeError, match="output of the reversible sequence was changed in place"):
        y.sum().backward()


def test_an_exception_in_the_forward_frees_everything(device):
    class Fails(nn.Module):
        def forward(self, x):
            y = x.exp().sin()
            raise ArithmeticError(str(y.shape))

    before = host_bytes()
    x = torch.randn(1000, requires_grad=True)
    with pytest.raises(ArithmeticError), offload(Fails())():
        Fails()(x)
    gc.collect()
    assert host_bytes() == before
    y = x.exp()  # the hooks are gone
    assert host_bytes() == before and y.requires_grad


def test_nothing_is_freed_late(device):
    """The outputs of nodes are in no reference cycle: all is freed without the garbage collector."""
    model = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.Sigmoid()) for _ in range(3)])
    before, x = host_bytes(), torch.randn(8, 8)
    gc.disable()
    try:
        for least in (1, 10_000):
            with offload(model, min_bytes=least)():
                y = model(x)
            dead = weakref.ref(y.untyped_storage())
            del y
            assert dead() is None and host_bytes() == before
    finally:
        gc.enable()


def test_the_live_bytes_fall_and_are_reported_beside_those_of_the_host(device):
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(8)])
    x, moving = torch.randn(256, 64), offload(model)

    def report(context):
        with MemoryRecorder(model) as recorder:
            with context:
                loss = model(x).square().mean()
            loss.backward()
            model.zero_grad()
        return recorder.report()

    plain, moved = report(torch.enable_grad()), report(moving(keep=[x]))
    one = x.numel() * 4
    assert plain.peak_by_category["activation"] >= 8 * one
    assert plain.offloaded_bytes == 0 and moved.offloaded_bytes >= 8 * one
    assert moved.peak_bytes < plain.peak_bytes - 4 * one
    assert report(moving(keep=[x])).peak_bytes == moved.peak_bytes
    assert "in host memory" in str(moved) and "in host memory" not in str(plain)
    assert moved.from_dict(moved.as_dict()).offloaded_bytes == moved.offloaded_bytes


@pytest.mark.parametrize("mode", ["stored", "checkpoint", "reversible"])
def test_fake_tensors_have_the_bytes_of_the_real_step(mode):
    def make():
        model, x = unet(memory=mode, engine="hooks"), torch.zeros(1, 2, 8, 8, 8)
        moving = offload(model)

        def run():
            with moving(keep=[x]):
                loss = model(x).square().mean()
            loss.backward()
            model.zero_grad()

        return TrainingStep(model, run)

    fake, step = peak_on_fake(make), make()
    step.run()
    with MemoryRecorder(step.model) as recorder:
        step.run()
    real = recorder.report()
    assert (fake.peak_bytes, fake.offloaded_bytes) == (real.peak_bytes, real.offloaded_bytes)
    assert real.offloaded_bytes


def test_fake_storages_die(device):
    with FakeTensorMode():
        model, before = nn.Linear(16, 16, device="cpu"), host_bytes()
        with offload(model)():
            y = model(torch.zeros(8, 16, device="cpu")).sigmoid()
        dead = weakref.ref(y.untyped_storage())
        y.sum().backward()
        assert host_bytes() == before
        del y
    assert dead() is None


def test_checkpoints_around_and_inside(device):
    class Inside(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh())

        def forward(self, x):
            return checkpoint(self.net, x * 2, use_reentrant=False)

    class Around(Inside):
        def forward(self, x):
            with offload(self)():
                y = checkpoint(super().forward, x.exp(), use_reentrant=False)
            return y

    torch.manual_seed(0)
    x = torch.randn(4, 6, dtype=torch.float64)
    assert_same_bits(Inside().double(), x)
    plain, around = Inside().double(), Around().double()
    around.load_state_dict(plain.state_dict())
    expected, _ = gradients(nn.Sequential(Exp(), plain), x)
    found, _ = gradients(around, x)
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))


class Exp(nn.Module):
    def forward(self, x):
        return x.exp()


def test_the_batched_gradients_of_vmap(device):
    x = torch.randn(5, dtype=torch.float64, requires_grad=True)
    with offload(nn.Identity())():
        y = (x.sin() * 1).exp()
    basis = torch.eye(5, dtype=torch.float64)
    (found,) = torch.autograd.grad(y, x, basis, is_grads_batched=True)
    torch.testing.assert_close(found, torch.diag(x.sin().exp() * x.cos()).detach())


def test_copies_of_a_model_and_autocast(device):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.SiLU(), nn.Linear(16, 16))
    x = torch.randn(8, 16)

    def run(model, context):
        model.zero_grad()
        with context, torch.autocast(device, dtype=torch.bfloat16):
            loss = model(x).float().square().mean()
        loss.backward()
        return [p.grad for p in model.parameters()]

    assert all(map(torch.equal, run(copy.deepcopy(model), torch.enable_grad()), run(model, offload(model)())))
