"""The clipper's contract: clipped sums, refusals, and the state after a step."""

import weakref
from contextlib import nullcontext

import pytest
import torch
from torch import distributed, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from memsave.ghost import GhostClipper
from memsave.profiler import MemoryRecorder
from memsave.reversible import AdditiveCoupling, ReversibleSequence
from tests.ghost.test_layers import draw, losses_of
from tests.support.per_example_reference import assert_exact, by_clipper, by_loop

pytestmark = pytest.mark.usefixtures("device")


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 3)).double()


class Checkpointed(nn.Module):
    def __init__(self, *, reentrant=False):
        super().__init__()
        self.first, self.body, self.last = nn.Linear(4, 4), small_body(), nn.Linear(4, 2)
        self.reentrant = reentrant

    def forward(self, x):
        return self.last(checkpoint(self.body, self.first(x), use_reentrant=self.reentrant))


def small_body():
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Dropout(0.3), nn.LayerNorm(4))


class Reversible(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 8)
        half = [nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Dropout(0.2), nn.LayerNorm(4)) for _ in range(6)]
        self.net = ReversibleSequence([AdditiveCoupling(f, g) for f, g in zip(half[::2], half[1::2], strict=True)])

    def forward(self, x):
        return self.net(self.first(x))


@pytest.mark.parametrize("make", [small, Checkpointed, Reversible])
def test_dropout_checkpoints_and_reversible_sequences_are_exact(make):
    torch.manual_seed(0)
    assert_exact(make().double(), draw(4, 4), losses_of)


@pytest.mark.parametrize(("make", "passes"), [(small, 1), (Checkpointed, 2), (Reversible, 2)])
def test_auto_takes_two_passes_where_activations_are_not_stored(make, passes):
    model = make().double()
    clipper = GhostClipper(model, max_grad_norm=1.0)
    clipper.backward(losses_of(model, draw(4, 4)))
    assert clipper.chosen_passes == passes


def test_the_norm_pass_forms_no_weight_gradient(monkeypatch):
    products = []

    class MemoryMonitor(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm):
                products.append(tuple(result.shape))
            return result

    model = nn.Sequential(nn.Linear(50, 60), nn.Tanh(), nn.Linear(60, 50))
    clipper = GhostClipper(model, max_grad_norm=1.0, passes=2)
    losses = model(torch.randn(3, 2, 50)).sum((1, 2))
    monkeypatch.setattr(torch.autograd, "backward", lambda *args, **options: None)  # the norm pass alone
    with MemoryMonitor():
        clipper.backward(losses)
    assert (6, 60) in products or (3, 2, 60) in products  # the gradient of the activations
    assert not any(sorted(shape[-2:]) == [50, 60] for shape in products)


def test_gradients_accumulate_over_micro_batches():
    model, x = small().eval(), draw(6, 4)
    clipper = GhostClipper(model, max_grad_norm=0.2)
    for part in x.split(2):
        clipper.backward(model(part).sin().sum(1))
    ours = [p.grad.clone() for p in model.parameters()]
    clipper.close()
    _, sums = by_loop(model, x, lambda m, b: m(b).sin().sum(1), max_grad_norm=0.2)
    for one, other in zip(ours, sums.values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("passes", [1, 2])
def test_the_memory_peak_does_not_grow_with_the_number_of_micro_batches(passes):
    model, x = small(), draw(6, 4)
    clipper = GhostClipper(model, max_grad_norm=0.2, passes=passes)
    clipper.backward(model(x).sin().sum(1))
    clipper._independence._steps_left = 10**9  # no other check
    peaks = []
    for count in (2, 6):
        model.zero_grad()
        with MemoryRecorder(model) as recorder:
            for _ in range(count):
                clipper.backward(model(x).sin().sum(1))
        peaks.append(recorder.report().peak_bytes)
        assert not any(p.grad.requires_grad for p in model.parameters())
    assert peaks[0] == peaks[1]


def test_direct_is_exact_for_one_example_of_any_layers():
    model, x = nn.Sequential(nn.Linear(4, 4), nn.MultiheadAttention(4, 2)).double(), draw(1, 4)

    def losses(m, b):
        y = m[0](b)
        return m[1](y, y, y)[0].sum(1)

    norms, sums = by_loop(model, x, losses, max_grad_norm=0.1)
    ours, our_sums = by_clipper(model, x, losses, max_grad_norm=0.1, passes="direct")
    torch.testing.assert_close(ours, norms)
    for name, total in sums.items():
        torch.testing.assert_close(our_sums[name], total, rtol=1e-9, atol=1e-14)


def test_close_leaves_the_model_as_it_was():
    model = small()
    before = {name: sorted(vars(module)) for name, module in model.named_modules()}
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    clipper = GhostClipper(model, max_grad_norm=1.0)
    clipper.backward(losses_of(model, draw(2, 4)))
    clipper.close()
    assert {name: sorted(vars(module)) for name, module in model.named_modules()} == before
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    model(draw(2, 4)).sum().backward()  # an ordinary backward again


def test_a_forward_without_grad_creates_no_context():
    model = small()
    clipper = GhostClipper(model, max_grad_norm=1.0)
    with torch.no_grad():
        model(draw(2, 4))
    assert clipper._context is None


def test_errors_name_the_value_and_the_remedy():
    model = small()
    clipper = GhostClipper(model, max_grad_norm=1.0)
    with pytest.raises(ValueError, match=r"shape \(\).*one loss per example"):
        clipper.backward(model(draw(2, 4)).sum())
    with pytest.raises(ValueError, match="3 losses, but the model saw a batch of 2"):
        clipper.backward(model(draw(2, 4)).sum(1).repeat(2)[:3])
    with pytest.raises(RuntimeError, match=r"ordinary backward.*clipper\.backward"):
        model(draw(2, 4)).sum().backward()
    with pytest.raises(RuntimeError, match="called outside the model's own forward"):
        model[0](draw(2, 4))
    with pytest.raises(
        RuntimeError, match="ordinary backward"
    ):  # a loss of two forwards: the first one's norms are lost
        clipper.backward(model(draw(2, 4)).sum(1) + model(draw(2, 4)).sum(1))


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), r"1 \(BatchNorm1d\) makes .*GroupNorm"),
        (nn.DataParallel(nn.Linear(4, 4)), "the model is wrapped in DataParallel.*the module inside"),
        (nn.Sequential(nn.DataParallel(nn.Linear(4, 4))), "0 is wrapped in DataParallel"),
    ],
    ids=["BatchNorm", "wrapped", "wrapped inside"],
)
def test_models_that_cannot_be_clipped_exactly_are_refused_by_name(model, words):
    with pytest.raises(ValueError, match=words):
        GhostClipper(model, max_grad_norm=1.0)


def test_a_parameter_used_outside_the_forward_is_refused_by_name():
    model = small().double()
    clipper = GhostClipper(model, max_grad_norm=1.0)
    losses = losses_of(model, draw(2, 4)) + model[0].weight.sum()
    with pytest.raises(ValueError, match=r"0\.weight has a gradient that passed no norm hook.*outside of the model's"):
        clipper.backward(losses)


def test_a_refused_model_is_left_as_it_was():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    with pytest.raises(ValueError, match="BatchNorm1d"):
        GhostClipper(model, max_grad_norm=1.0)
    model[0](torch.randn(2, 4)).sum().backward()


class OfParts(nn.Module):
    """A model that takes its batch in a dict, after another argument."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, temperature, parts):
        return self.layer(parts["x"]) / (temperature if isinstance(temperature, float) else temperature.sum())


def test_the_batch_size_is_read_from_mappings_or_given_as_an_argument():
    assert_exact(OfParts().double(), {"x": draw(3, 4)}, lambda m, b: losses_of(lambda x: m(2.0, x), b))
    model, temperatures = OfParts().double(), draw(5)
    clipper = GhostClipper(model, max_grad_norm=1.0)
    losses = losses_of(lambda x: model(temperatures, x), {"x": draw(3, 4)})
    with pytest.raises(ValueError, match=r"there are 3 losses, but the model saw a batch of 5"):
        clipper.backward(losses)
    clipper.close()
    clipper = GhostClipper(model, max_grad_norm=1.0, batch_size=3)
    assert clipper.backward(losses_of(lambda x: model(temperatures, x), {"x": draw(3, 4)})).shape == (3,)
    clipper.close()
    GhostClipper(model, max_grad_norm=1.0)
    with pytest.raises(ValueError, match="no tensor whose dimension 0 could be the batch"):
        model(2.0, {})


def test_reentrant_checkpoints_are_refused_in_one_sentence():
    model = Checkpointed(reentrant=True).double()
    clipper = GhostClipper(model, max_grad_norm=1.0)
    with pytest.raises(ValueError, match=r"reentrant checkpoints.*use_reentrant=False$"):
        clipper.backward(losses_of(model, draw(2, 4)))


@pytest.fixture
def one_process(tmp_path):
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.skipif(not distributed.is_available(), reason="torch was built without distributed")
def test_models_of_several_processes_are_refused_and_the_module_inside_is_not(one_process):
    with torch.device("cpu"):  # of gloo
        model = nn.parallel.DistributedDataParallel(small())
        with pytest.raises(ValueError, match=r"the model is wrapped in DistributedDataParallel.*the module inside"):
            GhostClipper(model, max_grad_norm=1.0)
        assert_exact(model.module, draw(4, 4), losses_of)
        sharded, plain, x = fully_shard(small(), mesh=init_device_mesh("cpu", (1,))).eval(), small().eval(), draw(4, 4)
        norms = [GhostClipper(each, max_grad_norm=0.1).backward(losses_of(each, x)) for each in (sharded, plain)]
        torch.testing.assert_close(*norms)
        for one, other in zip(sharded.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(one.grad.full_tensor(), other.grad)


@pytest.mark.parametrize(
    "options", [{"passes": 1}, {"passes": 2}, {"clipping": "automatic"}, {"clipping": "per_layer"}], ids=str
)
def test_examples_that_are_not_counted_contribute_nothing(options):
    plain, padded = small().eval(), small().eval()
    x = draw(4, 4)
    reference, clipper = (GhostClipper(model, max_grad_norm=0.1, **options) for model in (plain, padded))
    right = reference.backward(plain(x).square().sum(1))
    more = torch.cat([torch.full_like(x[:1], torch.nan), x, 100 * x[:1]])
    norms = clipper.backward(padded(more).square().sum(1), counted=torch.tensor([0, 1, 1, 1, 1, 0]))
    torch.testing.assert_close(norms[1:-1], right)
    assert norms[0].isnan() and norms[-1] > 0
    assert clipper.nonfinite == 0
    assert clipper.clipped.tolist() == [False, *reference.clipped.tolist(), False]
    for one, other in zip(padded.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    with pytest.raises(ValueError, match=r"counted has shape \(3,\) for 4 losses; give one number per example"):
        clipper.backward(losses_of(padded, x), counted=torch.ones(3))


def test_a_parameter_that_the_loss_does_not_use_has_no_gradient_in_direct_mode():
    model = nn.ModuleList([nn.Linear(4, 3), nn.Linear(4, 3)]).double()
    model.forward = lambda x: model[0](x)
    clipper = GhostClipper(model, max_grad_norm=0.1, passes="direct")
    clipper.backward(losses_of(model, draw(1, 4)))
    assert model[0].weight.grad.any() and not model[1].weight.grad.any()


def test_a_single_example_that_is_not_counted_adds_zeros():
    model = small()
    clipper = GhostClipper(model, max_grad_norm=0.1, passes="direct")
    assert clipper.backward(losses_of(model, draw(1, 4)), counted=torch.zeros(1)) > 0
    assert not any(p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("passes", [1, 2, "direct"])
def test_a_step_on_fake_tensors_has_the_memory_peak_of_a_real_one(passes):
    peaks = []
    for fake in (False, True):
        with FakeTensorMode() if fake else nullcontext():
            model = nn.Sequential(nn.Embedding(30, 8), nn.Linear(8, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 30))
            ids = torch.zeros(1 if passes == "direct" else 4, 6, dtype=torch.long)
            clipper = GhostClipper(model, max_grad_norm=1.0, passes=passes)
            for _ in range(2):  # the first step also checks independence
                model.zero_grad()
                clipper._independence._steps_left = 2  # no other check
                with MemoryRecorder(model) as recorder:
                    clipper.backward(model(ids).square().sum((1, 2)))
            peaks.append(recorder.report().peak_bytes)
            assert fake or clipper.nonfinite == 0
    assert peaks[0] == peaks[1]


@pytest.mark.parametrize("layer", [nn.Linear(3, 3), nn.LayerNorm(3), nn.PReLU(3)], ids=str)
def test_a_clipper_holds_no_activation_that_a_checkpoint_drops(layer):
    alive = []

    class Body(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer.to(torch.get_default_device())

        def forward(self, x):
            y = x * 2.0
            alive.append(weakref.ref(y))
            return self.layer(y)

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = Body()

        def forward(self, x):
            return checkpoint(self.body, x, use_reentrant=False)

    model = Whole()
    clipper = GhostClipper(model, max_grad_norm=1.0)
    losses = model(torch.randn(2, 3)).sum(1)
    assert alive[0]() is None
    clipper.backward(losses)
