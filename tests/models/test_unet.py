"""The U-Net computes the same function and gradients in every memory mode, at every size."""

import json

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from memsave.models import MBConv3d, ReversibleUNet3d
from memsave.models.memory import MEMORY_MODES
from memsave.models.recast import RecastConv3d
from memsave.profiler import MemoryRecorder
from memsave.tasks.segmentation.losses import region_losses

SMALL = {"channels": (4, 8, 8), "blocks": 2, "expansion": 2}


def network(seed=0, dtype=torch.float64, **options):
    torch.manual_seed(seed)
    return ReversibleUNet3d(**{**SMALL, **options}).to(dtype)


def volume(*size, batch=2, dtype=torch.float64):
    generator = torch.Generator(torch.get_default_device()).manual_seed(1)
    return torch.randn(batch, 4, *size, dtype=dtype, generator=generator)


def step(net, x, mode):
    net.memory = mode
    net.zero_grad()
    torch.manual_seed(2)
    y = net(x)
    y = y if isinstance(y, torch.Tensor) else torch.cat([each.flatten() for each in y])
    y.square().mean().backward()
    return y.detach(), {name: p.grad.clone() for name, p in net.named_parameters()}, torch.rand(2)


def test_arguments_rebuild_the_same_architecture():
    """After a round trip through JSON, the format in which they are saved."""
    options = {"skip": "concat", "squeeze_excitation": 0.25, "deep_supervision": True, "blocks": (1, 2, 3), "chunks": 2}
    net, x = network(**options, memory=["stored", "reversible", "reversible"]).eval(), volume(8, 9, 7)
    net.memory = ("checkpoint", "stored", "reversible")
    other = ReversibleUNet3d(**json.loads(json.dumps(net.arguments))).to(torch.float64).eval()
    assert other.memory == net.memory
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(x), net(x))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"skip": "concat"},
        {"squeeze_excitation": 0.25},
        {"dropout": 0.3},
        {"blocks": (1, 2, 3)},
        {"grid": 2**-14},
        {"deep_supervision": True},
        {"strides": [(1, 2, 2), 3]},
    ],
    ids=["plain", "concat", "gate", "dropout", "depths", "grid", "deep supervision", "strides"],
)
@pytest.mark.usefixtures("device")
def test_memory_modes_compute_the_same_function(options):
    net, x = network(**options), volume(8, 9, 7)
    stored = step(net, x, "stored")
    for mode in ("checkpoint", "reversible", "hooks"):
        for sequence in [*net.encoder, *net.decoder]:
            sequence.engine = "hooks" if mode == "hooks" else "auto"
        y, gradients, after = step(net, x, "reversible" if mode == "hooks" else mode)
        if mode == "reversible":  # computed in chunks: equal up to rounding
            torch.testing.assert_close(y, stored[0], rtol=1e-9, atol=1e-12)
        else:
            assert torch.equal(y, stored[0])
        assert torch.equal(after, stored[2])
        for name, gradient in stored[1].items():
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-9, atol=1e-12, msg=f"{mode}: {name}")


@pytest.mark.usefixtures("device")
def test_memory_modes_compute_the_same_function_under_autocast():
    net = network(dtype=torch.float32, channels=(8, 16), blocks=4, engine="hooks")
    x = volume(8, 8, 8, dtype=torch.float32)

    def under_autocast(mode):
        net.memory = mode
        with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
            return net(x)

    stored = under_autocast("stored")
    for mode in ("checkpoint", "reversible"):
        assert torch.equal(under_autocast(mode), stored)


def test_what_reads_the_output_of_a_reversible_level_keeps_no_copy_of_it():
    modes = ["reversible", "stored", "reversible", "checkpoint"]
    net = network(channels=(4, 8, 8, 16), deep_supervision=True, memory=modes)
    layers = {name: layer for name, layer in net.named_modules() if isinstance(layer, RecastConv3d)}
    kept = {name for name, layer in layers.items() if layer.input_is_kept}
    assert len(layers) == 3 + 3 + 1 + 2
    assert kept == {"down.0.0", "head", "down.2.0", "up.1", "side_heads.1"}
    net.memory = "stored"
    assert not any(layer.input_is_kept for layer in layers.values())


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("skip", ["add", "concat"])
def test_under_autocast_a_reversible_network_keeps_its_levels_once(skip):
    """In float32: the copies in bfloat16 that the next layers read are computed again in the backward."""
    net = network(dtype=torch.float32, channels=(8, 16), blocks=1, skip=skip, memory="reversible")
    x = volume(16, 16, 16, batch=1, dtype=torch.float32)
    with MemoryRecorder(net) as recorder, torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        y = net(x)
    assert y.requires_grad
    totals = recorder.report().timeline.totals()
    level = 8 * 16**3  # elements; encoder and decoder, and a coarser level with a quarter of them
    copies = 4 * 16**3 + 16 * 8**3 + y.numel()  # in bfloat16: of x, of the first normalised layer, and the result
    kept = totals[-1] - totals[0] - 4 * (2 + 1 / 4) * level - 2 * copies
    assert 0 <= kept - (2 * 16 * 16**3 if skip == "concat" else 0) < 0.5 * level


@pytest.mark.usefixtures("device")
def test_with_a_grid_gradients_under_autocast_are_bit_identical_to_stored():
    net = network(dtype=torch.float32, channels=(8, 16), blocks=4, grid=2**-14, engine="hooks")
    x = volume(8, 8, 8, dtype=torch.float32)

    def gradients(mode):
        net.memory = mode
        net.zero_grad()
        with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
            loss = net(x).float().square().mean()
        loss.backward()
        return [p.grad.clone() for p in net.parameters()]

    stored = gradients("stored")
    for mode in ("checkpoint", "reversible"):
        assert all(torch.equal(a, b) for a, b in zip(gradients(mode), stored, strict=True))


@pytest.mark.parametrize("size", [(1, 1, 1), (5, 6, 7), (16, 8, 12), (3, 17, 2)])
@pytest.mark.parametrize("skip", ["add", "concat"])
@pytest.mark.usefixtures("device")
def test_logits_have_the_size_of_the_input(size, skip):
    x = volume(*size, batch=1)
    assert network(skip=skip)(x).shape == (1, 3, *size)


@pytest.mark.usefixtures("device")
def test_strides_divide_the_sizes_of_the_levels():
    net = network(channels=(4, 8, 8, 8), strides=[(1, 2, 2), 2, (2, 1, 3)], deep_supervision=True)
    levels = net(volume(6, 12, 9))
    assert [tuple(each.shape[2:]) for each in levels] == [(6, 12, 9), (6, 6, 5), (3, 3, 3)]
    usual = network(channels=(4, 8, 8, 8), strides=[2, 2, 2], deep_supervision=True)
    assert torch.equal(
        usual(volume(8, 9, 7))[0], network(channels=(4, 8, 8, 8), deep_supervision=True)(volume(8, 9, 7))[0]
    )


@pytest.mark.usefixtures("device")
def test_side_heads_are_used_only_in_training():
    net = network(channels=(4, 8, 8, 8), deep_supervision=True)
    levels = net(volume(16, 12, 9))
    assert [tuple(each.shape[1:]) for each in levels] == [(3, 16, 12, 9), (3, 8, 6, 5), (3, 4, 3, 3)]
    assert net.eval()(volume(16, 12, 9)).shape == (2, 3, 16, 12, 9)
    plain = network(channels=(4, 8, 8, 8)).eval()
    plain.load_state_dict({key: value for key, value in net.state_dict().items() if "side" not in key})
    assert torch.equal(plain(volume(8, 8, 8)), net(volume(8, 8, 8)))


def test_coarser_levels_use_fewer_chunks():
    def chunks_of(net):
        assert all(set(level.engines()) == {"fused"} for level in [*net.encoder, *net.decoder])
        return [level.blocks[0].f.chunks for level in net.encoder]

    assert chunks_of(network(channels=(16, 32, 64), chunks=8)) == [8, 2, 1]
    assert chunks_of(network(channels=(16, 32, 64), chunks=3)) == [4, 1, 1]
    assert chunks_of(network(channels=(4, 8, 256), chunks=8)) == [2, 2, 8]


@pytest.mark.usefixtures("device")
def test_state_dicts_are_interchangeable_between_memory_modes():
    nets = [network(seed, memory=mode) for seed, mode in enumerate(MEMORY_MODES)]
    for net in nets[1:]:
        net.load_state_dict(nets[0].state_dict())
        with torch.no_grad():
            torch.testing.assert_close(net(volume(6, 6, 6)), nets[0](volume(6, 6, 6)), rtol=1e-9, atol=1e-12)


@pytest.fixture
def two_threads():
    """PyTorch runs pointwise convolutions of few samples without channels_last when it has a single thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("two_threads")
def test_mbconv_keeps_shape_and_layout():
    x = torch.randn(2, 4, 5, 6, 7).to(memory_format=torch.channels_last_3d)
    y = MBConv3d(4, expansion=3, squeeze_excitation=0.5)(x)
    assert y.shape == x.shape
    assert y.is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.usefixtures("two_threads")
def test_a_step_keeps_little_more_than_one_block_of_the_finest_level():
    def peak(**options):
        with FakeTensorMode():  # it takes the same bytes: tests/profiler/test_models.py
            net = ReversibleUNet3d(channels=(16, 32, 64), **options)
            x = torch.randn(1, 4, 32, 32, 32).contiguous(memory_format=torch.channels_last_3d)
            target = torch.zeros(1, 3, 32, 32, 32, dtype=torch.bool)
            with MemoryRecorder(net) as recorder:
                region_losses(net(x), target).sum().backward()
        held = recorder.report().timeline.by_category()
        held = [sizes for name, sizes in held.items() if name not in ("parameter", "gradient")]
        return max(map(sum, zip(*held))) / (16 * 32**3 * 4)

    # in streams of the finest level: stream, gradient, input's gradient, skip, image and coarse levels; five chunks
    assert peak(chunks=8) < 5.75 + 5 * 2 / 8
    assert peak(engine="hooks") > 16


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"channels": (4, 7)}, "even number"),
        ({"channels": ()}, "even number"),
        ({"blocks": (1, 2)}, r"blocks are \[1, 2\] for 3 levels"),
        ({"blocks": 0}, "at least 1"),
        ({"skip": "sum"}, "choose one of add, concat"),
        ({"strides": [2]}, r"strides are \[2\] for 3 levels; give 2"),
        ({"strides": [2, (1, 2)]}, "as one number or as three"),
        ({"strides": [2, 4]}, "each of 1 to 3 voxels"),
        ({"chunks": 0}, "chunks is 0; give at least 1"),
        ({"engine": "fast"}, "choose one of auto, fused, hooks"),
        ({"engine": "fused", "squeeze_excitation": 0.5}, "squeeze-excitation reads all expanded channels"),
        ({"memory": "free"}, "choose one of stored, checkpoint, reversible"),
    ],
)
def test_invalid_arguments_raise_errors(options, words):
    with pytest.raises(ValueError, match=words):
        network(**options)
