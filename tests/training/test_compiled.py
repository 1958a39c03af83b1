"""Compiled blocks: losses and gradients are those of the blocks that are not compiled, in every memory mode."""

import pytest
import torch

from memsave.config import ConfigError, compose
from memsave.config.compose import to_objects
from memsave.models import ReversibleUNet3d
from memsave.models.mbconv import MBConv3d
from memsave.profiler import MemoryRecorder
from memsave.tasks.definition import definition_of
from memsave.training.compiled import compile_blocks
from tests.support.tiny_configs import TINY_GPT2_DP, TINY_UNET


@pytest.fixture(autouse=True)
def _compiled_anew():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def losses_and_gradients(memory, *, backend=None, dtype=torch.float64, precision=None, steps=2):
    torch.manual_seed(0)
    net = ReversibleUNet3d(channels=(4, 8), blocks=1, expansion=2, memory=memory, engine="hooks", dropout=0.2).to(dtype)
    if backend is not None:
        assert compile_blocks((m for m in net.modules() if isinstance(m, MBConv3d)), backend=backend) == 6
    x = torch.randn(1, 4, 8, 8, 8, dtype=dtype)
    found = []
    for _ in range(steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            loss = net(x).float().square().mean() if dtype == torch.float32 else net(x).square().mean()
        loss.backward()
        found.append(loss.detach())
    return torch.stack(found), torch.cat([p.grad.flatten() for p in net.parameters()])


@pytest.mark.parametrize(
    "memory",
    [pytest.param("stored", marks=pytest.mark.slow), pytest.param("checkpoint", marks=pytest.mark.slow), "reversible"],
)
def test_losses_and_gradients_are_those_of_the_model_itself(memory):
    ours, theirs = losses_and_gradients(memory, backend="aot_eager"), losses_and_gradients("stored")
    for one, other in zip(ours, theirs, strict=True):
        assert (one - other).norm() <= 1e-12 * other.norm()


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("memory", ["stored", "checkpoint", "reversible"])
def test_code_of_the_inductor_computes_the_same(memory, precision):
    options = {"dtype": torch.float32, "precision": precision}
    ours, theirs = (
        losses_and_gradients(memory, backend="inductor", **options),
        losses_and_gradients("stored", **options),
    )
    for one, other in zip(ours, theirs, strict=True):
        assert (one - other).norm() <= (1e-5 if precision == "float32" else 3e-2) * other.norm()


def test_recorded_steps_are_not_compiled_and_later_ones_are():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    block, x = MBConv3d(4, expansion=2), torch.randn(1, 4, 3, 3, 3)
    compile_blocks([block], backend=backend)
    with MemoryRecorder(block):
        recorded = block(x)
    assert not graphs
    assert torch.allclose(block(x), recorded, atol=1e-6)
    assert len(graphs) == 1


@pytest.mark.slow
def test_the_layers_of_a_language_model_are_compiled():
    config = to_objects(compose.compose([*TINY_GPT2_DP, "privacy=none", "trainer.compile=true"]))
    model = definition_of(config).make_fake_model().train()
    ids = torch.randint(300, (2, 10))
    plain = model(input_ids=ids).logits
    blocks = definition_of(config).compiled_blocks(model)
    assert compile_blocks(blocks, backend="aot_eager") == 2
    assert torch.allclose(model(input_ids=ids).logits, plain, atol=1e-5)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["privacy=ghost"], "privacy=ghost needs the layers inside it"),
        (["memory.engine=fused"], "memory.engine=hooks"),
        (["trainer.parallel=fsdp"], "trainer.parallel=ddp"),
    ],
)
def test_what_cannot_be_compiled_is_refused(overrides, words):
    with pytest.raises(ConfigError, match=words):
        to_objects(compose.compose([*TINY_UNET, "memory=reversible", "trainer.compile=true", *overrides]))


def test_a_model_without_known_blocks_is_refused():
    config = to_objects(compose.compose([*TINY_UNET, "trainer.compile=true"]))
    with pytest.raises(ConfigError, match="knows no blocks of task=segmentation"):
        definition_of(config).compiled_blocks(torch.nn.Linear(2, 2))
