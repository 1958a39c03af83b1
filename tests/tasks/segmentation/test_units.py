"""Patients with several scans as units: exact norms in a reversible U-Net, splits, plans, and what is protected."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("monai")

from memsave.config.compose import compose, to_objects
from memsave.data.loader import Index
from memsave.experiment import make_model, make_task
from memsave.planning.fake_step import fake_step
from memsave.tasks.definition import definition_of
from tests.support.per_example_reference import assert_exact
from tests.support.tiny_configs import TINY_UNET
from tests.support.units_alone import assert_units_exact

CPU = torch.device("cpu")
PATIENTS = "AAABBC"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("phantoms")


@pytest.fixture
def tiny(root, tmp_path):
    """The config of six scans of three patients, whose table is in data.unit."""
    path = tmp_path / "patients.csv"
    lines = [f"Phantom_{number:05d},{patient}" for number, patient in enumerate(PATIENTS)]
    path.write_text("\n".join(["case,patient", *lines]) + "\n")
    common = [*TINY_UNET, f"data.root={root}", f"data.cases={len(PATIENTS)}", f"data.unit={path}"]
    return lambda *overrides: to_objects(compose([*common, *overrides]))


@pytest.fixture
def in_float64(monkeypatch):
    """Losses and masks are float32 otherwise."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)

    def converted(task):
        inner = getattr(task, "task", task)
        place = inner.place
        inner.place = lambda batch: place({**batch, "image": batch["image"].double()})
        return task

    return converted


@pytest.mark.parametrize(
    "overrides",
    [
        ["memory=reversible", "data.records_per_unit=2"],
        pytest.param(["memory=stored", "data.crops_per_case=2", "data.unit_loss=sum"], marks=pytest.mark.slow),
    ],
)
def test_norms_and_clipped_sums_of_patients_are_exact(tiny, in_float64, overrides):
    torch.manual_seed(0)
    config = tiny(*overrides)
    task, model = in_float64(make_task(config, CPU)), make_model(config)[0].double()
    assert task.size == 2 and max(map(len, task.groups)) > 1
    assert_units_exact(task, model, [Index(0, 0), Index(1, 1)], passes=[1])


@pytest.mark.slow
def test_several_crops_of_a_case_are_clipped_exactly_by_ghost_norms(tiny, in_float64):
    torch.manual_seed(0)
    config = tiny("data.unit=null", "data.crops_per_case=2", "privacy=ghost", "memory=stored")
    task, model = in_float64(make_task(config, CPU)), make_model(config)[0].double()
    batch = task.place(task.load([Index(0, 0), Index(1, 1)]))
    assert batch["image"].shape[:2] == (2, 2)
    assert_exact(model, batch, task.per_example_losses, passes=(1,))


def test_the_data_are_the_same_and_patients_are_held_out_whole(tiny):
    task, scans = make_task(tiny(), CPU), make_task(tiny("data.unit=null"), CPU)
    assert task.data_fingerprint == scans.data_fingerprint
    assert task.fingerprint != make_task(tiny("data.records_per_unit=1"), CPU).fingerprint
    held_out = {case.patient for case in task.task.held_out.cases}
    assert len(held_out) == 1 and not held_out & set(task.names) and held_out | set(task.names) == set(PATIENTS)
    assert (task.counts["examples"], task.counts["units"]["records"]) == (2, task.task.size)
    assert task.unit.startswith("one patient: all scans") and scans.unit.startswith(
        "one patient: all crops of one case"
    )
    assert len(task.load([Index(0, 0), Index(1, 0)])["id"]) == 2


def test_scans_of_one_patient_are_called_scans_without_units(tiny, monkeypatch):
    from memsave.data.volumes.config import SegmentationData

    several = SegmentationData.patients
    config = tiny()
    monkeypatch.setattr(SegmentationData, "patients", lambda self, found: several(config.data, found))  # as BraTS 2023
    assert make_task(tiny("data.unit=null"), CPU).unit.startswith("one scan, of which a patient may have several")


def test_a_batch_has_the_largest_units_in_a_plan(tiny):
    definition = definition_of(tiny("data.records_per_unit=3", "data.crops_per_case=2"))
    assert definition.training_batch(count=2, device=CPU)["image"].shape[:4] == (2, 3, 2, 4)
    assert definition.unit_sizes() == ["3 records a unit"] and not definition.has_static_batches


@pytest.mark.slow
@pytest.mark.parametrize("memory", ["stored", "reversible"])
def test_a_step_with_the_largest_units_is_planned(tiny, memory):
    config = tiny("data.records_per_unit=3", "data.crops_per_case=2", "privacy=ghost", f"memory={memory}")
    with FakeTensorMode():
        fake_step(config, device=CPU).run()
