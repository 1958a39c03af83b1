"""nnUNetTrainerMemsave inside nnU-Net: exact steps, deep supervision, and the patch of a budget."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch

pytest.importorskip("nnunetv2")

from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

from memsave.integrations.nnunet import TRAINERS, nnUNetTrainerMemsave, patches_up_to
from memsave.profiler import parse_bytes
from memsave.profiler.allocator import allocator_peak
from memsave.profiler.calibration import create_state

pytestmark = pytest.mark.slow

STRIDES = [[1, 1, 1], [1, 2, 2], [2, 2, 2]]
LABELS = {"background": 0, "lesion": 1}
REGIONS = {"background": 0, "whole": [1, 2], "core": [2], "ignore": 3}


@pytest.fixture
def make(tmp_path, monkeypatch):
    for name in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
    monkeypatch.delenv("MEMSAVE_BUDGET", raising=False)
    (tmp_path / "preprocessed" / "Dataset001_Tiny").mkdir(parents=True)

    def made(budget=None, *, memory="reversible", labels=LABELS, dimensions=3, batch=2):
        monkeypatch.setenv("MEMSAVE_MEMORY", memory)
        if budget is not None:
            monkeypatch.setenv("MEMSAVE_BUDGET", budget)
        else:
            monkeypatch.delenv("MEMSAVE_BUDGET", raising=False)
        arguments = {
            "n_stages": 3,
            "features_per_stage": [8, 16, 16],
            "strides": [each[:dimensions] for each in STRIDES],
            "n_conv_per_stage": [2, 4, 2],
        }
        plan = {
            "data_identifier": "tiny",
            "batch_size": batch,
            "batch_dice": False,
            "patch_size": [8, 16, 16],
            "median_image_size_in_voxels": [20.0, 40.0, 44.5],
            "architecture": {
                "network_class_name": "PlainConvUNet",
                "arch_kwargs": arguments,
                "_kw_requires_import": [],
            },
        }
        plans = {
            "dataset_name": "Dataset001_Tiny",
            "plans_name": "nnUNetPlans",
            "label_manager": "LabelManager",
            "configurations": {"3d_fullres": plan},
            "continue_training": False,
        }
        dataset = {"channel_names": {"0": "ct", "1": "pet"}, "labels": labels, "file_ending": ".nii.gz"}
        if labels is REGIONS:
            dataset["regions_class_order"] = [1, 2]
        return nnUNetTrainerMemsave(plans, "3d_fullres", 0, dataset, torch.device("cpu"))

    return made


def ready(trainer):
    """The trainer with network, optimizer and loss, without a data set."""
    torch.manual_seed(0)
    folder = Path(trainer.preprocessed_dataset_folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "case.b2nd").touch()
    trainer.initialize()
    return trainer


def batch_of(trainer, *, dtype=torch.float64):
    torch.manual_seed(1)
    patch = trainer.configuration_manager.patch_size
    targets = trainer._targets(list(patch), 2)
    for each in targets:
        each.copy_(torch.rand(each.shape) > 0.6)
    return {"data": torch.randn(2, 2, *patch, dtype=dtype), "target": targets}


@pytest.mark.parametrize("labels", [LABELS, REGIONS], ids=["labels", "regions"])
def test_a_step_of_nnunet_equals_that_of_the_stored_network(make, labels):
    steps = {}
    for memory in ("stored", "checkpoint", "reversible"):
        trainer = ready(make(memory=memory, labels=labels))
        trainer.network.double()
        losses = [float(trainer.train_step(batch_of(trainer))["loss"]) for _ in range(2)]
        steps[memory] = losses, torch.cat([each.detach().flatten() for each in trainer.network.parameters()])
    for memory in ("checkpoint", "reversible"):
        assert steps[memory][0] == pytest.approx(steps["stored"][0], rel=1e-12)
        assert torch.allclose(steps[memory][1], steps["stored"][1], rtol=1e-9, atol=1e-12)


def test_logits_have_the_sizes_of_the_targets(make):
    trainer = ready(make())
    batch = batch_of(trainer, dtype=torch.float32)
    outputs = trainer.network(batch["data"])
    assert [each.shape[2:] for each in outputs] == [each.shape[2:] for each in batch["target"]]
    assert "tp_hard" in trainer.validation_step(batch)


def test_a_network_for_inference_takes_the_trained_weights(make):
    trainer = ready(make())
    managers = trainer.plans_manager, trainer.configuration_manager
    network = nnUNetTrainerMemsave.build_network_architecture(*managers, 2, 2, False)
    network.load_state_dict(trainer.network.state_dict())
    volume = torch.randn(1, 2, 8, 16, 20)
    trainer.set_deep_supervision_enabled(False)
    with torch.no_grad():
        assert torch.equal(network.eval()(volume), trainer.network.eval()(volume))


def test_a_larger_budget_has_larger_patches_and_is_kept(make):
    small, large = (ready(make(budget)) for budget in ("3MiB", "24MiB"))
    patches = [each.configuration_manager.patch_size for each in (small, large)]
    assert all(a <= b for a, b in zip(*patches, strict=True)) and patches[0] != patches[1]
    assert all(side % 2 == 0 and side % multiple == 0 for side, multiple in zip(patches[1], (2, 4, 4), strict=True))
    step = large._step(list(patches[1]), 2)
    create_state(step.optimizer)
    state = sum(each.numel() * 4 for each in step.model.parameters())
    held = 2 * state + sum(each.numel() * each.element_size() for each in large._targets(list(patches[1]), 2))
    held += 2 * 2 * 4 * torch.tensor(patches[1]).prod().item()
    found = large.configuration_manager.configuration["memsave"]["predicted_bytes"]
    assert found <= parse_bytes("24MiB")
    assert held + allocator_peak(step.run) == pytest.approx(found, rel=0.03)
    Path(large.output_folder_base, "plans.json").write_text(json.dumps(large.plans_manager.plans))
    again = ready(make())  # validation, or continued training, in another shell
    assert again.configuration_manager.patch_size == large.configuration_manager.patch_size
    with pytest.raises(ValueError, match="trained with MEMSAVE_BUDGET=24MiB, not with MEMSAVE_BUDGET=3MiB"):
        ready(make("3MiB"))


def test_mistakes_give_one_sentence(make):
    with pytest.raises(
        ValueError, match=r"MEMSAVE_BUDGET=10KiB: the smallest patch, \[2, 4, 4\] with 2 per batch, needs"
    ):
        ready(make("10KiB"))
    with pytest.raises(ValueError, match="much"):
        ready(make("much"))
    with pytest.raises(ValueError, match="memory"):
        ready(make(memory="less"))
    with pytest.raises(ValueError, match="trains 3D configurations"):
        ready(make(dimensions=2))


def test_nnunet_finds_the_trainer(monkeypatch):
    monkeypatch.setenv("nnUNet_extTrainer", str(TRAINERS))
    found = recursive_find_trainer_class_by_name("nnUNetTrainerMemsave")
    assert found.__name__ == "nnUNetTrainerMemsave"


def test_patches_grow_to_the_image():
    patches = patches_up_to([20.0, 40.0, 44.5], multiples=[2, 4, 4])
    assert patches[0] == [2, 4, 4] and patches[-1] == [20, 40, 44]
    for one, other in pairwise(patches):
        assert sum(a != b for a, b in zip(one, other, strict=True)) == 1
    assert patches == sorted(patches, key=lambda each: torch.tensor(each).prod().item())
