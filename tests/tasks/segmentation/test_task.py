"""The segmentation task: its loss computed by hand, its data and scores, and equal training in three memory modes."""

import json
import math

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from memsave.config import ConfigError
from memsave.config.compose import compose, to_objects
from memsave.data import DataError
from memsave.data.loader import Index, numbered
from memsave.data.volumes.reader import regions
from memsave.experiment import make_model, make_task
from memsave.tasks.segmentation.inference import predict, without_small
from memsave.tasks.segmentation.losses import region_losses, supervised_losses
from memsave.tasks.segmentation.task import Segmentation, interval
from memsave.training.loop import first_batch, make_state, run_steps
from tests.support.tiny_configs import TINY_UNET
from tests.support.volume_files import SHAPE, decathlon


@pytest.mark.usefixtures("device")
def test_the_loss_equals_one_computed_by_hand():
    target = torch.zeros(2, 3, 2, 2, 2)
    target[0, 0] = 1
    logits = torch.zeros(2, 3, 2, 2, 2)  # probability 1/2 everywhere
    found = 1 - (2 * 4 + 1) / (4 + 8 + 1) + math.log(2)
    empty = 1 - 1 / (4 + 1) + math.log(2)
    expected = [(found + 2 * empty) / 3, empty]
    assert region_losses(logits, target).tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.usefixtures("device")
def test_a_loss_depends_only_on_its_own_example():
    torch.manual_seed(0)
    logits = torch.randn(3, 3, 4, 4, 4, dtype=torch.float64, requires_grad=True)
    target = torch.rand(3, 3, 4, 4, 4) > 0.7
    (gradient,) = torch.autograd.grad(region_losses(logits, target)[1], logits)
    assert gradient[1].abs().max() > 0
    assert gradient[[0, 2]].abs().max() == 0


def test_the_fingerprint_depends_on_the_content_of_files(tiny):
    task = make_task(tiny(), torch.device("cpu"))
    before, case = task.fingerprint, task.crops.volumes.cases[0]
    assert task.fingerprint == before
    for path in (case.label, case.images[0]):
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))  # keeps the size
        assert task.fingerprint != before
        path.write_bytes(content)
    assert task.fingerprint == before


def test_the_fingerprint_depends_on_the_order_of_modalities(tmp_path):
    """A continued run must have the same input channels, also if all modalities are in one file."""
    for name in ("A", "B"):
        decathlon(tmp_path / "msd", name, label=np.resize(np.uint8([1, 2, 3, ord(name) % 2]), SHAPE))
    common = ["experiment=brats_rev", "data=brats", "data.layout=msd", f"data.root={tmp_path / 'msd'}"]
    configs = [compose([*common, f"data.modalities={order}"]) for order in ("[t1,flair]", "[flair,t1]")]
    tasks = [make_task(to_objects(config), torch.device("cpu")) for config in configs]
    assert tasks[0].fingerprint != tasks[1].fingerprint


def test_the_data_are_the_same_for_every_crop_and_fold_and_others_with_another_mask(tiny):
    def fingerprint(*overrides):
        return make_task(tiny(*overrides), torch.device("cpu")).data_fingerprint

    task = make_task(tiny(), torch.device("cpu"))
    other = ["data.crop_size=[8,8,8]", "data.folds=2", "data.fold=1"]
    assert make_task(tiny(*other), torch.device("cpu")).fingerprint != task.fingerprint
    before = task.data_fingerprint
    assert fingerprint(*other) == before != fingerprint("data.seed=1")
    path = task.held_out.cases[0].label
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert fingerprint() != before


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    monkeypatch.setenv("MEMSAVE_CACHE", str(tmp_path))
    return lambda *overrides: to_objects(compose([*TINY_UNET, *overrides]))


def test_unused_cases_are_counted_and_described(tiny, tmp_path):
    names = [case.id for case in make_task(tiny(), torch.device("cpu")).crops.volumes.cases]
    every = [*names, *(case.id for case in make_task(tiny(), torch.device("cpu")).held_out.cases)]
    split = {"train": every[:2], "validation": every[2:3], "test": every[3:]}
    (tmp_path / "split.json").write_text(json.dumps(split))
    task = make_task(tiny(f"data.split_file={tmp_path / 'split.json'}"), torch.device("cpu"))
    assert task.counts == {"examples": 2, "held_out": 1, "left_out": 1}
    assert task.describe_counts() == "training cases: 2, held-out cases: 1, left out: 1 (test of data.split_file)"


def test_memory_modes_have_the_same_losses_for_five_steps(tiny):
    curves = {}
    for mode in ("stored", "checkpoint", "reversible"):
        config = tiny(f"memory={mode}", "trainer.steps=5", "model.dropout=0.1")
        torch.manual_seed(0)
        task = make_task(config, torch.device("cpu"))
        state = make_state(make_model(config)[0], config.trainer)
        curves[mode] = [done.loss for done in run_steps(state, task, config.trainer)]
    assert curves["stored"][-1] < curves["stored"][0]
    assert curves["checkpoint"] == pytest.approx(curves["stored"], rel=1e-4)
    assert curves["reversible"] == pytest.approx(curves["stored"], rel=1e-4)


def test_prediction_covers_the_whole_volume(tiny):
    model, _ = make_model(tiny())
    image = torch.randn(4, 20, 33, 18)
    assert predict(model, image, window=(16, 16, 16)).shape == (3, 20, 33, 18)
    assert model.training


@pytest.mark.usefixtures("device")
def test_the_loss_weight_halves_with_each_coarser_level():
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)
    levels = [torch.randn(2, 3, size, size, size, generator=generator) for size in (8, 4, 2)]
    target = torch.rand(2, 3, 8, 8, 8, generator=generator) > 0.7
    expected = sum(
        weight * region_losses(logits, target[..., ::step, ::step, ::step])
        for logits, weight, step in zip(levels, (4, 2, 1), (1, 2, 4), strict=True)
    )
    torch.testing.assert_close(supervised_losses(levels, target), expected / 7)
    torch.testing.assert_close(supervised_losses(levels[:1], target), region_losses(levels[0], target))


def test_several_crops_of_a_case_are_one_example_with_one_loss(tiny):
    config = tiny("data.crops_per_case=3", "trainer.batch_size=2")
    task, model = make_task(config, torch.device("cpu")), make_model(config)[0]
    for batch in (first_batch(task, config.trainer), task.place(task.load([Index(0, 0), Index(1, 1)]))):
        assert batch["image"].shape == (2, 3, 4, 16, 16, 16)
        losses = task.per_example_losses(model, batch)
        single = [
            region_losses(model(batch["image"][i]), regions(batch["label"][i])).mean() for i in range(len(losses))
        ]
        torch.testing.assert_close(losses, torch.stack(single))


def test_the_loss_runs_on_fake_tensors(tiny):
    config = tiny()
    task, (model, _) = make_task(config, torch.device("cpu")), make_model(config)
    batch = first_batch(task, config.trainer)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = {key: mode.from_tensor(batch[key]) for key in ("image", "label")}
        assert task.per_example_losses(model, fake).shape == (2,)


def test_each_fold_is_held_out_once(tiny):
    held_out = [
        {case.id for case in make_task(tiny("data.folds=4", f"data.fold={n}"), torch.device("cpu")).held_out.cases}
        for n in range(4)
    ]
    assert all(len(each) == 1 for each in held_out) and len(set.union(*held_out)) == 4


def test_predictions_are_on_the_original_grid_for_any_spacing(tiny):
    config = tiny("data.spacing=[1.5,1.5,2]", "data.crop_size=[8,8,8]")
    task, model = make_task(config, torch.device("cpu")), make_model(config)[0]
    volume = task.held_out[0]
    assert volume["image_spacing"] == (1.5, 1.5, 2.0)
    assert task.predict(model, volume).shape == (3, 32, 32, 24)
    scores = task.evaluate(model)
    assert set(scores) == {"dice", *(f"{kind}_{name}" for kind in ("dice", "hd95") for name in ("wt", "tc", "et"))}


def test_lesion_wise_scores_are_an_option(tiny):
    config = tiny("data.lesion_wise=true")
    task, model = make_task(config, torch.device("cpu")), make_model(config)[0]
    assert {"lesion_dice_wt", "lesion_hd95_et"} <= set(task.evaluate(model))


@pytest.mark.usefixtures("device")
def test_a_small_enhancing_region_is_removed():
    masks = torch.zeros(3, 4, 4, 4, dtype=torch.bool)
    masks[:, 0, 0, :3] = True
    kept = without_small(masks, ("wt", "tc", "et"), smallest_et=3)
    assert torch.equal(kept, masks)
    dropped = without_small(masks, ("wt", "tc", "et"), smallest_et=4)
    assert torch.equal(dropped[:2], masks[:2]) and not dropped[2].any()
    assert masks[2].any()  # the input is unchanged


def test_the_interval_of_a_mean_matches_the_normal_approximation():
    assert interval([0.8]) == (0.8, 0.8)
    low, high = interval([0.5 + 0.1 * (n % 5 - 2) for n in range(100)])
    deviation = 0.1 * 2**0.5 / 10  # of the mean
    assert low == pytest.approx(0.5 - 1.96 * deviation, abs=0.004)
    assert high == pytest.approx(0.5 + 1.96 * deviation, abs=0.004)


def folder_of(path, values=(0, 1), cases=3):
    """Cases of one modality with a mask, 0.8 x 0.8 x 4 mm."""
    nibabel = pytest.importorskip("nibabel")
    numbers = np.random.default_rng(0)
    affine = np.diag([0.8, 0.8, 4.0, 1.0])
    for number in range(cases):
        image = numbers.random((24, 24, 8)).astype(np.float32) + 1
        mask = np.zeros((24, 24, 8), dtype=np.uint8)
        mask[8:14, 8 : 12 + number, 2:5] = values[1]
        nibabel.save(nibabel.Nifti1Image(image + mask, affine), path / f"p{number}_t1ce.nii.gz")
        nibabel.save(nibabel.Nifti1Image(mask, affine), path / f"p{number}_label.nii.gz")


FOLDER = ["data=brats", "data.layout=folder", "data.modalities=[t1ce]", "data.crop_size=[16,16,8]"]


def brats(tmp_path, *overrides):
    own = [each for each in TINY_UNET if not each.startswith("data.")]
    return to_objects(compose([*own, *FOLDER, f"data.root={tmp_path}", *overrides]))


def test_one_modality_with_a_mask_trains_and_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    folder_of(tmp_path)
    config = brats(tmp_path, "trainer.steps=2")
    task, model = make_task(config, torch.device("cpu")), make_model(config)[0]
    assert model(first_batch(task, config.trainer)["image"]).shape[1] == 1
    scores = task.evaluate(model)
    assert set(scores) == {"dice", "dice_lesion", "hd95_lesion"}
    (tmp_path / "out").mkdir()
    picture, table = task.show(tmp_path / "out")
    assert picture.stat().st_size > 1000
    assert table.read_text().splitlines()[0] == "case,dice_lesion,hd95_lesion"
    assert "LESION" in task.summary(scores)


def test_faults_of_the_data_are_reported_before_training(tmp_path):
    folder_of(tmp_path, values=(0, 7))
    words = r"labels 0, 7.*2 more faults are listed by python -m memsave\.data\.check root="
    with pytest.raises(DataError, match=words):
        make_task(brats(tmp_path, "data.scheme=brats2021"), torch.device("cpu"))
    make_task(brats(tmp_path, "data.scheme=brats2021", "data.check=none"), torch.device("cpu"))


def channels(data):
    return len(data.input_modalities()), len(data.label_scheme().names)


def test_the_network_has_the_channels_of_the_data(tmp_path):
    assert channels(brats(tmp_path).data) == (1, 1)
    assert channels(brats(tmp_path, "data.layout=brats2024", "data.scheme=brats2024_rc").data) == (1, 4)
    assert channels(brats(tmp_path, "data.layout=msd", "data.modalities=null").data) == (4, 3)
    with pytest.raises(ConfigError, match=r"data\.layout=folder needs data\.modalities"):
        channels(brats(tmp_path, "data.modalities=null").data)


def test_a_case_more_changes_no_crop_of_the_others(tmp_path):
    """In a private run, the presence of a patient must not change the gradients of all others."""
    few, more = (to_objects(compose([*TINY_UNET, "data.validation_fraction=0.25", f"data.cases={n}"])) for n in (4, 6))
    tasks = [Segmentation(each.data, trainer=each.trainer, device=torch.device("cpu")) for each in (few, more)]
    names = [[case.id for case in task.crops.volumes.cases] for task in tasks]
    shared = sorted({*names[0]} & {*names[1]})
    assert shared and names[0] != names[1]
    for step in range(2):
        crops = []
        for task, own in zip(tasks, names, strict=True):
            (batch,) = numbered([[own.index(name) for name in shared]], size=task.size, start=step)
            crops.append(task.load(batch)["image"])
        assert torch.equal(*crops)
