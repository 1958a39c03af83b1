"""memory=auto: it chooses the fastest strategy that fits, and does not change the training."""

from itertools import chain, product

import pytest
import torch

pytest.importorskip("monai")
pytest.importorskip("transformers")

from memsave.config import ConfigError
from memsave.config.compose import compose, load, to_objects
from memsave.experiment import make_model, run_experiment
from memsave.planning import search as searching
from memsave.planning.auto import choose_memory
from memsave.planning.budget import OverBudget
from memsave.planning.fake_step import fake_step
from memsave.planning.search import Search
from memsave.profiler import parse_bytes, peak_on_fake
from memsave.profiler.calibration import Calibration
from memsave.progress import Progress
from memsave.tasks.definition import definition_of
from tests.support.tiny_configs import TINY_GPT2, TINY_UNET

pytestmark = pytest.mark.usefixtures("cache")
CPU = torch.device("cpu")
BRATS = [*TINY_UNET, "memory=auto", "memory.engine=hooks", "data.crop_size=[32,32,32]", "profiler.compare=[]"]
TEXT = ["experiment=gpt2_dp", *TINY_GPT2, "memory=auto"]


def config_of(*overrides, base=BRATS):
    return to_objects(compose([*base, *overrides]))


def choices(config):
    return list(chain.from_iterable(definition_of(config).memory_choices(CPU)))


def peak_of(config):
    return peak_on_fake(lambda: fake_step(config, device=CPU)).peak_bytes


def levels_of(config):
    return tuple(config.memory.levels)


def mixtures(config):
    task, parts = definition_of(config), ["", "encoder.0", "encoder.1", "decoder.0"]
    return list(task.memory_mixtures(choices(config), parts))


def test_a_unet_mixes_the_modes_of_its_levels():
    config = config_of("budget=1GiB", "memory.engine=auto")
    assert [(*levels_of(each), each.memory.engine) for each in choices(config)] == [
        ("stored", "stored", "auto"),
        ("checkpoint", "checkpoint", "auto"),
        ("reversible", "reversible", "hooks"),
        ("reversible", "reversible", "fused"),
        ("reversible", "reversible", "fused"),
    ]
    found = {(levels_of(each), each.memory.engine, each.memory.chunks): parts for each, parts in mixtures(config)}
    assert len(found) == len(mixtures(config)) == 4 + 3 * 5  # nothing rebuilt; or one level, or both, by three engines
    assert found[("reversible", "stored"), "fused", 8] == {"encoder.0": 4, "encoder.1": 0, "decoder.0": 4}
    assert {engine for _, engine, _ in found} == {"auto", "hooks", "fused"}


@pytest.mark.parametrize(
    ("overrides", "engines"),
    [(["memory.engine=fused"], {"fused"}), ([], {"hooks"}), (["model.squeeze_excitation=0.25"], {"hooks"})],
    ids=["fused", "hooks", "squeeze-excitation"],
)
def test_a_given_engine_is_kept(overrides, engines):
    config = config_of("budget=1GiB", *overrides)
    assert {each.memory.engine for each in choices(config) if "reversible" in levels_of(each)} == engines


@pytest.mark.parametrize(
    "overrides",
    [
        ["privacy=ghost", "privacy.noise_multiplier=1.0"],
        ["trainer.compile=true"],
        ["trainer.parallel=fsdp", "trainer.processes=2", "mode=plan"],
    ],
    ids=["ghost clipping", "compiled", "sharded"],
)
def test_the_fused_engine_is_no_choice_where_it_refuses(overrides):
    config = config_of("budget=1GiB", "memory.engine=auto", *overrides, base=["experiment=brats_rev", "memory=auto"])
    assert {each.memory.engine for each in choices(config) if "reversible" in levels_of(each)} == {"hooks"}


def test_a_fixed_mode_is_calibrated_by_itself():
    assert definition_of(config_of("memory=checkpoint", base=TINY_UNET)).memory_strategies() == ["checkpoint"]


def test_mixtures_and_choices_are_compared_by_the_time_of_a_whole_batch(monkeypatch):
    monkeypatch.setattr(searching, "widest_calibration", lambda *args, **kwargs: Calibration())
    config = config_of("budget=1GiB", "trainer.batch_size=8", "trainer.micro_batch_size=1", "memory.levels=null")
    search = Search(config, CPU, 2**30)
    stored, rebuilt = (search._trace(choice) for choice in choices(config)[:2])
    found = {levels_of(config): seconds for seconds, _, config in search._mixtures([stored, rebuilt])}
    low, high = sorted([stored.trial.seconds, rebuilt.trial.seconds])
    mixed = [seconds for levels, seconds in found.items() if len(set(levels)) == 2]
    assert mixed and all(0.9 * low < seconds < 1.1 * high for seconds in mixed)


@pytest.mark.slow
def test_the_search_finds_what_all_combinations_would_give():
    """Exact fake steps of all 9 combinations; the search takes few, and loses at most 4% of time."""
    config = config_of("budget=1GiB")
    every = Search(config, CPU, 2**30)
    for levels in product(("stored", "checkpoint", "reversible"), repeat=2):
        every.trial(config.changed({"memory.levels": list(levels)}))
    needs = sorted({trial.need.total for trial in every.trials})
    for budget in (needs[0], needs[3], needs[5], needs[-1] - 1):
        best = min(trial.seconds for trial in every.trials if trial.need.total <= budget)
        found = Search(config, CPU, budget, times=every.times)
        chosen = found.by_parts(definition_of(config).memory_choices(CPU))
        assert chosen is not None and chosen.need.total <= budget
        assert chosen.seconds <= 1.04 * best
        assert len(found.trials) <= 6


def test_with_enough_memory_one_fake_step_is_enough(tmp_path, capsys):
    chosen = choose_memory(config_of("budget=1GiB"), tmp_path, CPU, progress=Progress())
    assert levels_of(chosen) == ("stored", "stored")
    assert "s a step, predicted; 1 fake steps in" in capsys.readouterr().err
    assert load(tmp_path / "config.yaml").memory.levels == ["stored", "stored"]


@pytest.mark.slow
def test_levels_are_chosen_under_ghost_clipping(tmp_path):
    private = ["privacy=ghost", "privacy.noise_multiplier=1", "trainer.micro_batch_size=1"]
    most = peak_of(config_of("memory=stored", *private, base=[*TINY_UNET, "data.crop_size=[32,32,32]"]))
    chosen = choose_memory(config_of(f"budget={round(0.8 * most)}", *private), tmp_path, CPU, progress=Progress())
    assert set(levels_of(chosen)) != {"stored"} and peak_of(chosen) < 0.8 * most


def test_if_nothing_fits_the_error_names_the_smallest_budget(tmp_path):
    with pytest.raises(
        OverBudget, match=r"no strategy to keep activations fits into 1\.00 MiB: the smallest one needs a budget"
    ):
        choose_memory(config_of("budget=1MiB"), tmp_path, CPU, progress=Progress())


@pytest.mark.slow
def test_the_smallest_budget_is_enough():
    config = config_of("budget=1MiB")
    tight = Search(config, CPU, 2**20)
    rounds = definition_of(config).memory_choices(CPU)
    assert tight.by_parts(rounds) is None
    tight.measure_smallest()
    assert Search(config, CPU, tight.smallest()).by_parts(rounds) is not None


@pytest.mark.slow
def test_levels_can_be_given_and_do_not_change_the_loss(tmp_path):
    losses = {}
    for name, overrides in {
        "auto": ["budget=30MiB"],
        "given": ["memory.levels=[reversible,stored]"],
        "stored": ["memory=stored", "memory.engine=auto"],
    }.items():
        (tmp_path / name).mkdir()
        config = config_of("trainer.steps=2", *overrides)
        losses[name] = run_experiment(config, tmp_path / name, progress=Progress())["metrics"]["loss"]
    assert losses["auto"] == pytest.approx(losses["stored"], rel=1e-5)
    assert losses["given"] == pytest.approx(losses["stored"], rel=1e-5)


def test_each_level_has_its_own_mode():
    model, _ = make_model(config_of("budget=1GiB").changed({"memory.levels": ["reversible", "stored"]}))
    assert model.memory == ("reversible", "stored")
    assert [level.recompute for level in model.encoder] == [True, False]
    model.memory = "stored"
    assert not any(level.recompute for level in model.encoder)
    with pytest.raises(ValueError, match="memory has 1 entries for 2 levels; give one per level"):
        model.memory = ["stored"]


@pytest.mark.slow
def test_for_a_language_model_mode_head_and_micro_batch_are_chosen(tmp_path):
    loose = config_of("budget=1GiB", "model.width=64", "model.vocabulary=4000", base=TEXT)
    strategies = [(each.memory.mode, each.model.head) for each in choices(loose)]
    assert strategies[0] == ("stored", "logits")
    assert set(strategies) == {(mode, head) for mode in ("stored", "checkpoint") for head in ("logits", "chunked")}
    chosen = choose_memory(loose, tmp_path, CPU, progress=Progress())
    assert (chosen.memory.mode, chosen.model.head, chosen.trainer.micro_batch_size) == ("stored", "logits", 8)
    tight = config_of("budget=12MiB", "model.width=64", "model.vocabulary=4000", base=TEXT)
    chosen = choose_memory(tight, tmp_path, CPU, progress=Progress())
    assert chosen.trainer.batch_size == loose.trainer.batch_size  # the logical batch never changes
    assert chosen.trainer.micro_batch_size < 8 or chosen.model.head == "chunked"
    assert peak_of(chosen) <= parse_bytes("12MiB")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([], "memory=auto needs a budget, as in budget=8GiB"),
        (["budget=1GiB", "vary=volume"], "memory=auto chooses for one size; leave vary=volume out"),
        (["memory.levels=[stored]", "budget=1GiB"], "give a mode for each level of a U-Net, finest first"),
        (["memory.levels=[stored,kept]", "budget=1GiB"], "choose one of stored, checkpoint, reversible"),
        (
            ["memory=stored", "memory.engine=auto", "memory.levels=[stored,stored]"],
            r"memory\.levels is for memory=auto; leave it out",
        ),
    ],
)
def test_invalid_combinations_are_refused(overrides, words):
    with pytest.raises(ConfigError, match=words):
        config_of(*overrides)
