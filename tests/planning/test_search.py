"""The search of memory=auto: host memory by its time and its free bytes, and the largest micro-batch."""

from itertools import product
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("monai")
pytest.importorskip("transformers")

from memsave.config.compose import compose, load, to_objects
from memsave.host_bytes import TO_DEVICE, TO_HOST
from memsave.planning import plan as planning
from memsave.planning import search as searching
from memsave.planning.auto import choose_memory
from memsave.planning.budget import OverBudget, free_bytes, free_host_bytes
from memsave.planning.copies import LARGE, SMALL, copy_rates
from memsave.planning.plan import host_folder, make_plan
from memsave.planning.search import Search, Trial
from memsave.profiler import Calibration
from memsave.profiler.seconds import OTHER, TimeModel
from memsave.progress import Progress
from memsave.tasks.definition import definition_of
from tests.support.tiny_configs import TINY_GPT2, TINY_UNET

CPU = torch.device("cpu")
UNET = [*TINY_UNET, "memory=auto", "memory.engine=hooks", "profiler.compare=[]"]
TEXT = ["experiment=gpt2_dp", *TINY_GPT2, "memory=auto", "privacy=none"]
RATES = TimeModel({OTHER: (1e-6, 1e-9, 1e-10)}, largest={OTHER: 1.0}, calls=1)


@pytest.fixture(autouse=True)
def rates(monkeypatch):
    """Rates of operators that no measurement changes."""
    monkeypatch.setattr(planning, "_cached", lambda *_, timed, **__: Calibration(0.0, RATES if timed else None))
    copies_take(monkeypatch, 1e-9)


def copies_take(monkeypatch, seconds_per_byte):
    found = dict.fromkeys((TO_HOST, TO_DEVICE), (0.0, 0.0, seconds_per_byte))
    for module in (planning, searching):
        monkeypatch.setattr(module, "copy_rates", lambda device, *, folder: found)


def search_of(budget, *overrides, base=UNET):
    return Search(to_objects(compose([*base, f"budget={budget}", *overrides])), CPU, budget)


@pytest.mark.slow
def test_host_memory_is_chosen_if_its_copies_take_less_time_than_recomputation(monkeypatch):
    stored = search_of(2**40).fastest()
    budget = stored.need.total // 2
    chosen = {}
    for seconds_per_byte in (1e-12, 1e-7):
        copies_take(monkeypatch, seconds_per_byte)
        best = chosen[seconds_per_byte] = search_of(budget).fastest()
        assert best.need.total <= budget
    fast, slow = chosen.values()
    assert (fast.config.memory.levels, fast.config.memory.offload) == (["stored"] * 2, ["activations"])
    assert slow.config.memory.levels != ["stored"] * 2 and not slow.config.memory.offload
    assert stored.seconds < fast.seconds < slow.seconds


@pytest.mark.slow
def test_host_memory_is_chosen_if_nothing_else_fits_and_written_to_the_config(tmp_path):
    tight = search_of(2**20)
    assert tight.fastest() is None
    tight.measure_smallest()
    least = min(tight.trials, key=lambda trial: trial.need.total)
    assert "activations" in least.config.memory.offload
    config = tight.config.changed({"budget": f"{least.need.total}B"})
    chosen = choose_memory(config, tmp_path, CPU, progress=Progress())
    assert chosen.memory.offload and load(tmp_path / "config.yaml").memory.offload == chosen.memory.offload


@pytest.mark.slow
def test_a_plan_whose_host_side_does_not_fit_is_refused_and_named(monkeypatch, tmp_path):
    copies_take(monkeypatch, 1e-12)
    budget = search_of(2**40).fastest().need.total // 2
    monkeypatch.setattr(searching, "free_host_bytes", lambda device, *, folder: 100)
    found = search_of(budget)
    assert found.fastest().config.memory.offload == []
    (note,) = found.notes()
    assert note.startswith("memory.offload needs ") and "and 100 B on the disk of" in note
    given = search_of(2**30, "memory.offload=[activations]").config
    with pytest.raises(OverBudget, match=r"memory\.offload needs .* in host memory, and 100 B on the disk"):
        choose_memory(given, tmp_path, CPU, progress=Progress())


BATCH, STATE = 64, 4000
OFFLOAD = ([], ["activations"], ["optimizer"], ["activations", "optimizer"])


def simulated(mode, head, offload, size, *, copy_rate):
    """(bytes by category, bytes in host memory, seconds) of a language model's step, by formulas."""
    kept = 1000 if mode == "stored" else 300
    per_example, state = ("activations" in offload) * kept, ("optimizer" in offload) * STATE
    temporary = size * (800 if head == "logits" else 100)
    peak = {"parameter": 2000, "optimizer": STATE - state, "activation": size * (kept - per_example),
            "temporary": temporary}  # fmt: skip
    work = 10 + 3 * (mode != "stored") + 2 * (head != "logits") + 5 / size
    return peak, size * per_example + state, work + (BATCH * per_example + state) * copy_rate


class Simulated(Search):
    """Predicts by these formulas, instead of fake steps."""

    copy_rate = 1e-4

    def trial(self, config):
        known = [trial for trial in self.trials if trial.config == config]
        if known:
            return known[0]
        keys = config.memory.mode, config.model.head, config.memory.offload, config.trainer.micro_batch_size
        peak, host, seconds = simulated(*keys, copy_rate=self.copy_rate)
        report = SimpleNamespace(peak_by_category=peak)
        need = SimpleNamespace(total=sum(peak.values()), host=host, reserve=0, report=report)
        self.trials.append(Trial(config, need, seconds, None))
        return self.trials[-1]

    def _copy_seconds(self, moved):
        return moved * self.copy_rate


@pytest.mark.parametrize("copy_rate", [1e-6, 3e-5, 1e-4, 1e-3])
@pytest.mark.parametrize("budget", [150_000, 50_000, 20_000, 9_000, 5_000, 2_500])
def test_the_search_finds_the_fastest_of_all_plans_of_a_language_model(budget, copy_rate, monkeypatch):
    monkeypatch.setattr(Simulated, "copy_rate", copy_rate)
    every = product(("stored", "checkpoint"), ("logits", "chunked"), OFFLOAD, range(1, BATCH + 1))
    found = (simulated(*keys, copy_rate=copy_rate) for keys in every)
    fastest = min(seconds for peak, _, seconds in found if sum(peak.values()) <= budget)
    config = to_objects(compose([*TEXT, f"trainer.batch_size={BATCH}", f"budget={budget}"]))
    search = Simulated(config, CPU, budget)
    best = search.fastest()
    assert best.need.total <= budget
    assert best.seconds <= 1.06 * fastest
    assert len(search.trials) <= 30


def test_a_plan_must_fit_into_host_memory_too(monkeypatch):
    config = to_objects(compose([*TEXT, f"trainer.batch_size={BATCH}", "budget=9000"]))
    monkeypatch.setattr(Simulated, "copy_rate", 1e-6)
    plenty = Simulated(config, CPU, 9_000).fastest()
    assert "activations" in plenty.config.memory.offload and plenty.need.host > 3_000
    monkeypatch.setattr(searching, "free_host_bytes", lambda device, *, folder: 3_000)
    scarce = Simulated(config, CPU, 9_000)
    best = scarce.fastest()
    assert best.need.host <= 3_000 and best.seconds > plenty.seconds
    (note,) = scarce.notes()
    assert note.startswith("memory.offload needs ") and "and 2.93 KiB on the disk of" in note


@pytest.mark.slow
def test_the_optimizer_alone_may_be_in_host_memory(monkeypatch):
    monkeypatch.setattr(searching, "NEAR", 0.0)
    copies_take(monkeypatch, 1e-12)
    size = ["model.width=64", "data.max_length=120"]
    whole = search_of(2**40, *size, base=TEXT).fastest()
    held = whole.need.report.peak_by_category["optimizer"]
    best = search_of(whole.need.total - held // 2, *size, base=TEXT).fastest()
    assert best.config.memory.offload == ["optimizer"]
    assert whole.need.host == 0 < best.need.host
    assert best.seconds > whole.seconds


@pytest.mark.slow
def test_the_micro_batch_is_the_largest_that_fits(monkeypatch):
    monkeypatch.setattr(searching, "NEAR", 0.0)  # never fast enough
    config = search_of(2**40, "trainer.batch_size=64", base=TEXT).config
    whole = search_of(2**40, "trainer.batch_size=64", base=TEXT)
    choice = config.changed({"memory.mode": "stored", "model.head": "logits", "trainer.micro_batch_size": 64})
    trial = whole.trial(choice)
    for share in (0.7, 0.4):
        found = search_of(int(share * trial.need.total), "trainer.batch_size=64", base=TEXT)
        best = found._largest(found._outlook(trial.config, trial))
        size = best.config.trainer.micro_batch_size
        assert found.fits(best)
        assert not found.fits(found.trial(choice.changed({"trainer.micro_batch_size": size + 1})))
        assert len(found.trials) <= 5


def test_a_config_has_one_fake_step():
    found = search_of(2**40)
    config = definition_of(found.config).memory_choices(CPU)[0][0]
    assert found.trial(config) is found.trial(config.changed({"memory.levels": ["stored", "stored"]}))
    assert len(found.trials) == 1


@pytest.mark.slow
def test_the_predicted_time_of_a_plan_has_the_copies(monkeypatch):
    def seconds(*overrides):
        config = to_objects(compose([*UNET, "memory.engine=auto", "mode=plan", *overrides]))
        return make_plan(config, CPU, strategies=["stored"]).own.step_seconds

    plain, moved = seconds("memory=stored"), seconds("memory=offload")
    copies_take(monkeypatch, 3e-9)
    assert seconds("memory=stored") == plain
    assert seconds("memory=offload") - moved == pytest.approx(2 * (moved - plain), rel=0.1)


@pytest.mark.slow
def test_anchors_take_memory_and_save_no_work():
    """Backward evaluates a branch also where its input is anchored, because the activations inside are needed."""
    found = search_of(2**40, "model.blocks=[4,4]")
    config = found.config.changed({"memory.levels": ["reversible", "reversible"]})
    plain, anchored = (found.trial(config.changed({"memory.anchor_every": every})) for every in (None, 1))
    assert anchored.need.total > 1.2 * plain.need.total
    flops = [sum(work.flops for work in trial.work.total.values()) for trial in (plain, anchored)]
    assert flops[0] == flops[1]
    assert anchored.seconds == pytest.approx(plain.seconds, rel=0.05)


def test_copies_are_measured(monkeypatch, tmp_path):
    found = copy_rates.__wrapped__(CPU, folder=tmp_path)
    assert set(found) == {TO_HOST, TO_DEVICE}
    assert all(0 < per_byte < 1e-7 and 0 <= per_call < 0.1 and per_flop == 0 for per_call, per_flop, per_byte in
               found.values())  # fmt: skip
    assert SMALL < LARGE


def test_host_memory_is_that_of_the_disk_on_a_cpu_and_of_the_host_for_a_gpu(tmp_path, monkeypatch):
    config = to_objects(compose([*UNET, "budget=1GiB", f"memory.offload_folder={tmp_path}/new/folder"]))
    assert host_folder(config, None) == tmp_path
    assert host_folder(search_of(2**30).config, tmp_path / "run") == tmp_path
    alone = free_host_bytes(CPU, folder=tmp_path)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert free_host_bytes(CPU, folder=tmp_path) == pytest.approx(alone / 4, rel=0.1)
    assert free_host_bytes(torch.device("cuda"), folder=tmp_path) == pytest.approx(free_bytes(CPU), rel=0.2)
