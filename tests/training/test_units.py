"""Units as examples: exact norms, batches, the choice of records, fingerprints and resumed runs."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from memsave.data.loader import Index, numbered
from memsave.data.units import UnitKeys
from memsave.ghost import GhostClipper
from memsave.privacy import Mechanism, PrivateGradients
from memsave.training import checkpoint
from memsave.training.loop import make_state, run_steps
from memsave.training.task import CountsTokens, examples, split
from memsave.training.units import EXISTS, NamesUnits, records_of, unit_batch, with_units
from tests.support.linear_task import line_model, trainer
from tests.support.units_alone import assert_units_exact


class Records:
    """Regression on records whose inputs depend on (record, draw), with a list as well as tensors in a batch."""

    unit, goal, fingerprint, data_fingerprint = "one record", "-loss", "batches", "raw"

    def __init__(self, units):
        self.record_units = list(units)

    @property
    def size(self):
        return len(self.record_units)

    counts, describe_counts = {"examples": 1}, lambda self: f"records: {self.size}"

    def load(self, indices):
        def row(index):
            seed = [index.example, index.draw // self.size] if self.augments else [index.example, 0]
            return torch.randn(
                4, dtype=torch.float64, generator=torch.Generator().manual_seed(hash(tuple(seed)) % 2**62)
            )

        rows = torch.stack(list(map(row, indices))) if indices else torch.zeros(0, 4, dtype=torch.float64)
        return {"x": rows[:, :3], "y": rows[:, 3], "id": [index.example for index in indices]}

    augments = False

    def place(self, batch):
        return batch

    def per_example_losses(self, model, batch):
        assert len(batch["id"]) == len(batch["x"])
        return (model(batch["x"]).squeeze(1) - batch["y"]).square()


def task_of(units, *, seed=0, augments=False, **keys):
    records = Records(units)
    records.augments = augments
    return with_units(records, keys=UnitKeys(unit="person", **keys), seed=seed)


def first(task):
    return [Index(number, number) for number in range(task.size)]


SIZES = st.lists(st.integers(1, 5), min_size=1, max_size=5)


@given(SIZES, st.sampled_from(["mean", "sum"]), st.sampled_from([None, 1, 2]), st.integers(1, 6))
@settings(max_examples=25, deadline=None)
def test_norms_and_clipped_sums_are_those_of_each_unit_alone(sizes, loss, most, micro_batch_size):
    task = task_of([f"{n}" for n, size in enumerate(sizes) for _ in range(size)], unit_loss=loss, records_per_unit=most)
    model, indices = line_model().eval(), first(task)
    assert task.size == len(sizes)
    norms = assert_units_exact(task, model, indices)
    batch, bound, found = task.load(indices), norms.median().item(), []
    whole, parts = copy.deepcopy(model), copy.deepcopy(model)
    for each, size in ((whole, None), (parts, micro_batch_size)):
        clipper = GhostClipper(each, max_grad_norm=bound)
        found.append(
            torch.cat([clipper.backward(task.per_example_losses(each, micro)) for micro in split(batch, size)])
        )
    torch.testing.assert_close(found[0], found[1])
    for one, other in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_an_empty_batch_has_no_losses():
    task = task_of("aab")
    batch = task.load([])
    assert examples(batch) == 0 and not list(split(batch, 2))
    assert task.per_example_losses(line_model(), batch).shape == (0,)


def test_a_batch_has_the_records_of_a_unit_along_dimension_1():
    task = task_of("abbcbb")
    assert (task.size, task.names) == (3, ["a", "b", "c"])
    batch = task.load([Index(1, 1), Index(0, 0)])
    assert batch[EXISTS].tolist() == [[True] * 4, [True, False, False, False]]
    assert batch["x"].shape == (2, 4, 3) and batch["id"] == [[1, 2, 4, 5], [0]]
    records, units = records_of(batch)
    assert units == [0, 0, 0, 0, 1] and records["id"] == [1, 2, 4, 5, 0]
    torch.testing.assert_close(records["x"], task.task.load([Index(each, 0) for each in records["id"]])["x"])
    assert not batch["x"][1, 1:].any()


def test_every_draw_takes_another_part_of_a_large_unit():
    task = task_of(["a"] * 10 + ["b"] * 3, records_per_unit=3)

    def taken(task, draw, example=0):
        return tuple(each.example for each in task.records(Index(example, draw)))

    drawn = [taken(task, step * task.size) for step in range(200)]
    assert all(len(set(each)) == 3 and list(each) == sorted(each) for each in drawn)
    counts = torch.bincount(torch.tensor(drawn).flatten())
    assert counts.min() > 30 and counts.max() < 90  # of 60 expected
    assert {taken(task, step * task.size + 1, 1) for step in range(5)} == {(10, 11, 12)}
    assert drawn == [taken(task, step * task.size) for step in range(200)]
    again = task_of(["a"] * 10 + ["b"] * 3, records_per_unit=3, seed=1)
    assert drawn != [taken(again, step * task.size) for step in range(200)]


def test_a_unit_more_changes_nothing_for_the_others():
    """Otherwise the presence of a person would change the gradients of all others."""
    mine = ["a"] * 6 + ["b"] * 6
    task, more = (task_of(units, records_per_unit=2, augments=True) for units in (mine, [*mine, "new"]))
    for step in range(5):
        (batch,), (other,) = (list(numbered([range(2)], size=each.size, start=step)) for each in (task, more))
        torch.testing.assert_close(task.load(batch)["x"], more.load(other)["x"])
        moved = task_of(["new", *mine], records_per_unit=2)
        for unit in (0, 1):
            before, after = task.records(batch[unit]), moved.records(Index(unit + 1, step * moved.size + unit + 1))
            occasions = [(each.example + 1, each.draw // task.task.size) for each in before]
            assert [(each.example, each.draw // moved.task.size) for each in after] == occasions
    assert not torch.equal(task.load([Index(0, 0)])["x"], task.load([Index(0, 2)])["x"])  # another step


def test_fingerprints():
    units = "aabbb"
    keys = [{}, {"records_per_unit": 2}, {"unit_loss": "sum"}]
    tasks = [*(task_of(units, **each) for each in keys), task_of("aaabb"), task_of("ccbbb")]
    assert len({each.fingerprint for each in tasks}) == len(tasks)
    assert {each.data_fingerprint for each in tasks} == {"raw"}
    assert task_of(units).fingerprint == tasks[0].fingerprint


def test_counts_and_the_unit_of_the_statement():
    task = task_of("aabbbc", records_per_unit=2)
    units = {"records": 6, "smallest": 1, "largest": 3, "larger_than_records_per_unit": 1}
    assert task.counts == {"examples": 3, "units": units}
    assert task.describe_counts() == (
        "records: 6; data.unit makes 3 examples of the training records, with 1 to 3 records each, 1 with more than 2 "
        "(data.records_per_unit)"
    )
    assert task.unit == "one person: all records with the same value of person"


def test_tokens_are_counted_without_padding():
    class Counting(Records):
        def count_tokens(self, batch):
            return 10 * len(batch["x"])

    assert not isinstance(task_of("aab"), CountsTokens)
    task = with_units(Counting("aab"), keys=UnitKeys(unit="person"), seed=0)
    assert isinstance(task, CountsTokens) and task.count_tokens(task.load(first(task))) == 30


def test_a_task_without_units_is_refused():
    class Other:
        unit = "one point"

    assert not isinstance(Other(), NamesUnits)
    with pytest.raises(TypeError, match="Other has no record_units"):
        with_units(Other(), keys=UnitKeys(unit="person"), seed=0)


def test_a_batch_of_the_largest_units_runs_on_fake_tensors():
    task, model = task_of("ab"), line_model()
    with FakeTensorMode(allow_non_fake_inputs=True):
        records = {"x": torch.zeros(6, 3, dtype=torch.float64), "y": torch.zeros(6, dtype=torch.float64)}
        batch = unit_batch(records, count=2)
        assert batch["x"].shape == (2, 3, 3)
        task.task.per_example_losses = lambda model, batch: model(batch["x"]).squeeze(1)
        assert task.per_example_losses(model, batch).shape == (2,)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_draws_the_same_units_and_records(tmp_path, workers):
    pytest.importorskip("opacus")
    task = task_of([name for name in "abcdefgh" for _ in range(ord(name) - 95)], records_per_unit=3, augments=True)
    config = trainer(batch_size=3, steps=8, micro_batch_size=2)

    def state():
        model = line_model()
        private = PrivateGradients(model, Mechanism(task.size, 3, 1.0, 0.5, delta=1e-2, accountant="rdp"), seed=3)
        return make_state(model, config, private=private)

    def close(each):
        each.private.close()
        return [p.detach().clone() for p in each.model.parameters()]

    whole = state()
    torch.manual_seed(1)
    assert len(list(run_steps(whole, task, config))) == 8
    expected = close(whole)
    part = state()
    torch.manual_seed(1)
    for done in run_steps(part, task, config, workers=workers):
        if done.step == 4:
            checkpoint.save(part, tmp_path / "checkpoint")
            break
    close(part)
    rest = state()
    checkpoint.load(rest, tmp_path / "checkpoint")
    assert len(list(run_steps(rest, task, config, workers=workers))) == 4
    for one, other in zip(close(rest), expected, strict=True):
        assert torch.equal(one, other)
