"""`memory.offload` in training: the same losses and updates, privately too, and both sides of the memory reported."""

import gc
from functools import partial

import pytest
import torch

pytest.importorskip("monai")
pytest.importorskip("transformers")

from memsave.config import ConfigError
from memsave.config.compose import compose, to_objects
from memsave.ghost import GhostClipper
from memsave.host_bytes import host_bytes
from memsave.offload import ActivationOffload, offload_optimizer
from memsave.planning.fake_step import dummy_task, fake_step
from memsave.planning.plan import make_plan
from memsave.planning.report import lines, markdown
from memsave.profiler import Calibration, MemoryRecorder, format_bytes, peak_on_fake
from memsave.tasks.definition import definition_of
from memsave.training import checkpoint, loop
from tests.support.same_bits import assert_same
from tests.support.tiny_configs import TINY_GPT2_DP, TINY_UNET

CPU = torch.device("cpu")
BOTH = "memory.offload=[activations,optimizer]"
UNET = [*TINY_UNET, "data.crop_size=[8,8,8]", "model.channels=[4,8]", "profiler.compare=[]"]
GPT2 = [
    *TINY_GPT2_DP,
    "data.max_length=20",
    "trainer.micro_batch_size=3",
    "model.vocabulary=300",
    "profiler.compare=[]",
]


@pytest.fixture(autouse=True)
def everything_is_large(monkeypatch):
    """Tiny tensors are offloaded, too."""
    monkeypatch.setattr(loop, "ActivationOffload", partial(ActivationOffload, min_bytes=1))
    monkeypatch.setattr(loop, "offload_optimizer", partial(offload_optimizer, min_bytes=1))
    gc.collect()


def config_of(*overrides, base=UNET):
    return to_objects(compose([*base, *overrides]))


def updated(config, device, *, steps=2):
    """The parameters after some steps on a batch without data."""
    torch.manual_seed(0)
    step = fake_step(config, device=torch.device(device))
    for _ in range(steps):
        step.run()
    return [p.detach().clone() for p in step.model.parameters()]


PRIVATE = [
    ["privacy=ghost", "privacy.passes=1", "model.head=logits"],
    pytest.param(["privacy=ghost", "privacy.passes=2", "model.head=logits"], marks=pytest.mark.slow),
    pytest.param(["privacy=ghost", "privacy.passes=2", "model.head=chunked"], marks=pytest.mark.slow),
    ["privacy=ghost", "privacy.passes=1", "privacy.clipping=per_layer", "model.head=chunked"],
    ["privacy=ghost", "privacy.passes=2", "memory=checkpoint"],
    ["privacy=direct", "trainer.micro_batch_size=1"],
    pytest.param(["privacy=none", "memory=checkpoint"], marks=pytest.mark.slow),
]


@pytest.mark.parametrize("overrides", PRIVATE, ids=" ".join)
def test_updates_of_a_language_model_are_the_same_bit_for_bit(overrides, device):
    before = host_bytes()
    plain = updated(config_of(*overrides, base=GPT2), device)
    moved = updated(config_of(*overrides, BOTH, base=GPT2), device)
    assert_same(plain, moved)
    gc.collect()
    assert host_bytes() == before


@pytest.mark.parametrize(
    "overrides",
    [
        ["memory=stored"],
        ["memory=reversible"],
        pytest.param(
            ["memory=reversible", "memory.anchor_every=1", "memory.engine=hooks", "privacy=ghost", "privacy.passes=2"],
            marks=pytest.mark.slow,
        ),
    ],
    ids=" ".join,
)
def test_updates_of_a_unet_are_the_same_bit_for_bit(overrides, device):
    plain, moved = (updated(config_of(*overrides, *extra), device) for extra in ([], [BOTH]))
    assert_same(plain, moved)


def test_two_passes_are_chosen_for_offloaded_activations_and_the_backward_is_not_followed():
    config = config_of("privacy=ghost", "memory=offload", "model.head=logits", base=GPT2)
    torch.manual_seed(0)
    model = definition_of(config).make_fake_model()
    clipper, task = GhostClipper(model, max_grad_norm=1.0), dummy_task(config, device=CPU)
    batch = {key: value[:2] for key, value in task.batch.items()}
    with ActivationOffload(model, min_bytes=1)():
        losses = task.per_example_losses(model, batch)
    context = clipper._context
    assert context.offloads and not context.recomputes
    clipper.backward(losses)
    assert clipper.chosen_passes == 2
    clipper.backward(task.per_example_losses(model, batch))
    assert clipper.chosen_passes == 1
    clipper.close()


@pytest.mark.parametrize(
    ("overrides", "base", "error"),
    [
        (["memory=offload"], UNET, 0.0),
        pytest.param(["privacy=ghost", BOTH], GPT2, 0.05, marks=pytest.mark.slow),  # transformers makes fewer masks
    ],
    ids=["unet", "gpt2"],
)
def test_plans_predict_both_sides(overrides, base, error):
    config = config_of(*overrides, base=base)
    fake = peak_on_fake(lambda: fake_step(config, device=CPU))
    torch.manual_seed(0)
    step = fake_step(config, device=CPU)
    step.run()
    with MemoryRecorder(step.model, optimizer=step.optimizer) as recorder:
        step.run()
    real = recorder.report()
    assert fake.peak_bytes == pytest.approx(real.peak_bytes, rel=error)
    assert 0 < fake.offloaded_bytes == pytest.approx(real.offloaded_bytes, rel=error)


@pytest.fixture
def without_calibration(monkeypatch):
    monkeypatch.setattr("memsave.planning.plan.calibration_of", lambda *_, **__: Calibration())


def test_a_plan_shows_both_sides(without_calibration, monkeypatch):
    plan = make_plan(config_of("mode=plan", "memory=offload"), CPU, strategies=["stored"])
    (row,) = plan.rows
    assert row.as_dict()["host_bytes"] == row.need.host > 0
    text = "\n".join(lines(plan))
    assert "host" in text and "activations in host memory" in text and "| host |" in markdown(plan)
    plain = make_plan(config_of("mode=plan", "memory=stored"), CPU, strategies=["stored"])
    assert "host" not in "\n".join(lines(plain))
    assert not plan.notes
    monkeypatch.setattr("memsave.planning.plan.free_host_bytes", lambda *_, **__: row.need.host - 1)
    (note,) = make_plan(config_of("mode=plan", "memory=offload"), CPU, strategies=["stored"]).notes
    assert note.startswith(f"memory.offload needs {format_bytes(row.need.host)} in host memory, and ")


def test_the_choices_with_more_in_host_memory():
    task = definition_of(config_of("memory=auto", "budget=1GiB"))
    rounds = task.memory_choices(CPU)
    assert not any(choice.memory.offload for choices in rounds for choice in choices)
    moved = task.offloaded_choices(rounds[-1][-1])
    assert all(each.memory.levels == ["reversible"] * 2 for each in moved)
    assert [each.memory.offload for each in moved] == [["activations"], ["optimizer"], ["activations", "optimizer"]]
    assert BOTH in definition_of(moved[-1]).describe_memory()


def test_auto_keeps_what_is_offloaded_already():
    task = definition_of(config_of("memory=auto", "budget=1GiB", "memory.offload=[optimizer]"))
    rounds = task.memory_choices(CPU)
    assert all("optimizer" in choice.memory.offload for choices in rounds for choice in choices)
    (both,) = task.offloaded_choices(rounds[-1][-1])
    assert both.memory.offload == ["activations", "optimizer"]
    sharded = config_of("memory=auto", "budget=1GiB", "trainer.parallel=fsdp", base=[*UNET, "memory.engine=auto"])
    assert not definition_of(sharded).offloaded_choices(sharded)


def test_a_checkpoint_continues_with_and_without_offloading(device, tmp_path):
    def state_of(config):
        torch.manual_seed(0)
        step = fake_step(config, device=torch.device(device))
        model = step.model
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        return loop.make_state(model, config.trainer, memory=config.memory)

    def continued(state, steps=2):
        for _ in range(steps):
            for number, parameter in enumerate(state.model.parameters()):
                parameter.grad = torch.full_like(parameter, 0.1 * (number + 1))
            loop.update(state)
        return [p.detach().clone() for p in state.model.parameters()]

    plain, moved = (state_of(config_of("memory=stored", *extra)) for extra in ([], [BOTH]))
    assert_same(continued(plain), continued(moved))
    for name, state in (("plain", plain), ("moved", moved)):
        checkpoint.save(state, tmp_path / name)
    content = [(tmp_path / name / "optimizer.safetensors").read_bytes() for name in ("plain", "moved")]
    assert content[0] == content[1]
    expected, before = continued(plain), host_bytes()
    for name in ("plain", "moved"):
        again = state_of(config_of("memory=stored", BOTH))
        checkpoint.load(again, tmp_path / name)
        assert host_bytes() > before  # the loaded state is in host memory
        assert_same(continued(again), expected)


@pytest.mark.slow
def test_a_run_reports_both_sides_and_leaves_no_file(run):
    _, stored, _ = run("memory=stored", name="stored")
    code, moved, folder = run("memory=offload", BOTH, name="moved")
    assert code == 0 and moved["metrics"]["loss"] == stored["metrics"]["loss"]
    assert moved["memory"]["offloaded"] == ["activations", "optimizer"]
    assert moved["memory"]["offloaded_bytes"] > 0 == stored["memory"]["offloaded_bytes"]
    assert moved["memory"]["peak_bytes"] < stored["memory"]["peak_bytes"]
    assert sorted(each.name for each in folder.iterdir()) == sorted(
        each.name for each in (folder.parent / "stored").iterdir()
    )


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["memory.offload=[weights]"], "choose one of activations, optimizer"),
        (["memory.offload_folder=/tmp"], "memory.offload_folder is for memory.offload"),
        (
            ["memory=offload", "trainer.parallel=fsdp"],
            r"memory.offload=\[activations\] would copy the whole parameters",
        ),
    ],
)
def test_invalid_combinations_are_refused(overrides, words):
    with pytest.raises(ConfigError, match=words):
        config_of(*overrides)
