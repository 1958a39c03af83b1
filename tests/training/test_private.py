"""Private training in the training loop: reports, refusals, and resumed runs."""

import json
import os
import signal
import time
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("opacus")
pytest.importorskip("transformers")

from memsave.config import ConfigError
from memsave.config.compose import compose, to_objects
from memsave.data import DataError
from memsave.experiment import run_experiment
from memsave.privacy import Mechanism, PrivacyError, PrivateGradients
from memsave.progress import Progress
from memsave.tasks.language.generation import Generation
from memsave.training import checkpoint
from memsave.training.loop import TrainingError, make_state, run_steps
from memsave.training.statement import round_up
from tests.support.commands import Command
from tests.support.linear_task import Lines, line_model, trainer
from tests.support.tiny_configs import TINY_GPT2_DP

QUICK = ["privacy.accountant=rdp", "profiler.compare=[]"]  # the exact accountant and a comparison take seconds


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def run(overrides, folder, cache):
    folder.mkdir(exist_ok=True)
    config = to_objects(compose([*TINY_GPT2_DP, f"model.cache={cache}", *overrides]))
    return run_experiment(config, folder, progress=Progress())


def test_a_run_reports_epsilon_and_releases_its_model(tmp_path, cache, capfd):
    result = run(["privacy.noise_multiplier=1.0"], tmp_path / "run", cache)
    spent = result["privacy"]
    assert spent["steps"] == 3
    assert spent["sample_rate"] == 8 / 40
    assert spent["delta"] == pytest.approx(40**-1.1)
    assert spent["epsilon"] == pytest.approx(Mechanism(40, 8, 1.0, 0.1, delta=40**-1.1).epsilon(3))
    assert (spent["sampler"], spent["accountant"], spent["seeded"]) == ("poisson", "pld", False)
    assert {"perplexity", "bleu", "rouge_l", "perplexity_before", "bleu_before"} <= set(result["metrics"])
    assert set(result["memory"]["compared"]) == {"stored", "without privacy"}
    said = capfd.readouterr().err
    assert result["data"]["examples"] == 40
    assert f"training examples: 40, {result['data']['cut_examples']} cut to 60 tokens" in said
    assert f"epsilon = {round_up(spent['epsilon'], '.2f')}" in said
    statement = (tmp_path / "run" / "privacy.md").read_text()
    for words in (
        f"({round_up(spent['epsilon'], '.2f')}, ",
        "of 40 in training",
        "Poisson sampling",
        "Other runs",
        "checkpoint/",
    ):
        assert words in statement
    assert (tmp_path / "run" / "checkpoint" / "SECRET.txt").is_file()
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
    assert (tmp_path / "run" / "samples.md").is_file()


@pytest.mark.parametrize(("delta", "warned"), [("null", True), pytest.param("1e-5", False, marks=pytest.mark.slow)])
def test_a_large_delta_is_reported(delta, warned, tmp_path, cache, capfd):
    settings = [*QUICK, f"privacy.target_delta={delta}", "privacy.noise_multiplier=1.0", "trainer.steps=1"]
    run(settings, tmp_path / "run", cache)
    words = "delta is 0.017 for 40 examples: with up to this probability the bound of epsilon fails"
    said = capfd.readouterr().err
    assert (f"warning: {words}" in said) == warned
    assert (words in (tmp_path / "run" / "privacy.md").read_text()) == warned


def test_noise_is_calibrated_to_the_target(tmp_path, cache):
    spent = run([*QUICK, "privacy.target_epsilon=5"], tmp_path / "run", cache)["privacy"]
    assert 4.9 <= spent["epsilon"] <= 5


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ("privacy.seed=3", "came from a fixed seed"),
        ("privacy.noise_multiplier=0", "no noise was added"),
        pytest.param(
            "privacy.noise_multiplier=1e-200",
            "too small for any guarantee (noise multiplier 1e-200)",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_run_that_is_not_private_says_why_before_and_after(option, reason, tmp_path, cache, capfd):
    result = run([*QUICK, option], tmp_path / "run", cache)
    assert result["privacy"]["epsilon"] is None
    assert reason in result["privacy"]["no_guarantee"]
    statement = (tmp_path / "run" / "privacy.md").read_text()
    assert statement.startswith("# No privacy") and reason in statement
    said = capfd.readouterr().err
    assert f"No privacy: {result['privacy']['no_guarantee']}" in said
    assert "NOT private" in said.partition("step 1 of 3")[0]
    assert not any("epsilon" in line for line in lines_of(tmp_path / "run"))
    json.dumps(result, allow_nan=False)


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_an_epsilon_that_cannot_be_computed_stops_a_run_before_its_first_step(tmp_path, cache):
    with pytest.raises(PrivacyError, match=r"cannot compute the epsilon of 3 steps .*delta 1e-18"):
        run(
            ["privacy.noise_multiplier=1.0", "privacy.target_delta=1e-18", "privacy.accountant=prv"],
            tmp_path / "run",
            cache,
        )
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.slow
def test_a_very_large_epsilon_is_reported_as_no_protection(tmp_path, cache, capfd):
    spent = run(["privacy.noise_multiplier=1e-3"], tmp_path / "run", cache)["privacy"]
    assert 1e5 < spent["epsilon"] < 1e9
    assert spent["accountant"] == "pld"
    assert "(pld), 3 steps; an epsilon this large protects nobody" in capfd.readouterr().err
    statement = (tmp_path / "run" / "privacy.md").read_text()
    assert (
        f"at most e^{spent['epsilon']:.3g} times as likely" in statement
        and "In practice, an epsilon above 20 protects nobody" in statement
    )


def test_every_line_of_the_log_has_the_epsilon_spent_so_far(tmp_path, cache, capfd):
    result = run(["privacy.noise_multiplier=1.0", "profiler.compare=[]"], tmp_path / "run", cache)
    mechanism = Mechanism(40, 8, 1.0, 0.1, delta=40**-1.1)
    steps = [line for line in lines_of(tmp_path / "run") if "loss" in line]
    assert [line["epsilon"] for line in steps] == [pytest.approx(mechanism.epsilon(k)) for k in (1, 2, 3)]
    said = f"step 3 of 3, loss {steps[2]['loss']:.3f}, epsilon {round_up(mechanism.epsilon(3), '.2f')}"
    assert said in capfd.readouterr().err
    assert result["privacy"]["epsilon"] == steps[-1]["epsilon"]


def interrupted_at(step, monkeypatch):
    """Send the run a stop signal in that step."""
    original, calls = PrivateGradients.finish, []

    def finish(self):
        calls.append(1)
        if len(calls) == step:
            os.kill(os.getpid(), signal.SIGINT)
        original(self)

    monkeypatch.setattr(PrivateGradients, "finish", finish)


def test_an_interrupted_run_reports_epsilon_and_releases_its_model(tmp_path, cache, monkeypatch):
    interrupted_at(2, monkeypatch)
    with pytest.raises(KeyboardInterrupt) as stopped:
        run(["privacy.noise_multiplier=1.0", "profiler.compare=[]"], tmp_path / "run", cache)
    spent = stopped.value.outcome["privacy"]
    assert (spent["steps"], spent["planned_steps"]) == (2, 3)
    assert spent["epsilon"] == pytest.approx(Mechanism(40, 8, 1.0, 0.1, delta=40**-1.1).epsilon(2))
    statement = (tmp_path / "run" / "privacy.md").read_text()
    assert "The weights after 2 steps, those in `model/`" in statement
    assert "after 2 of 3 steps" in statement and "a score on private data" in statement
    released = load_file(tmp_path / "run" / "model" / "model.safetensors")
    saved = load_file(tmp_path / "run" / "checkpoint" / "model.safetensors")
    assert all(torch.equal(released[name], saved[name]) for name in released if name in saved)


SLOW_PARTS = [pytest.param(part, marks=pytest.mark.slow) for part in ("show", "summary")]


@pytest.mark.parametrize("part", ["evaluate", *SLOW_PARTS])
def test_faults_after_the_last_step_keep_model_and_statement(part, tmp_path, cache, monkeypatch):
    def fail(self, *args):
        raise RuntimeError("no such font")

    monkeypatch.setattr(Generation, part, fail)
    with pytest.raises(RuntimeError, match="no such font") as failed:
        run([*QUICK, "privacy.noise_multiplier=1.0", "trainer.evaluate_first=false"], tmp_path / "run", cache)
    assert failed.value.outcome["privacy"]["steps"] == 3
    assert "The weights after 3 steps" in (tmp_path / "run" / "privacy.md").read_text()
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
    assert (tmp_path / "run" / "checkpoint" / "state.json").is_file()


def test_the_run_works_without_privacy(tmp_path, cache):
    result = run(["privacy=none", "memory=checkpoint", "profiler.compare=[]"], tmp_path / "run", cache)
    assert result["privacy"] is None
    assert not (tmp_path / "run" / "privacy.md").exists()
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("privacy", ["none", "ghost"])
def test_the_reversible_model_trains_writes_and_is_released(privacy, tmp_path, cache):
    overrides = ["model=rev_gpt2", "memory=reversible", f"privacy={privacy}", "profiler.compare=[stored,reversible]"]
    noise = ["privacy.noise_multiplier=1.0"] if privacy == "ghost" else []
    result = run([*overrides, *noise], tmp_path / "run", cache)
    compared = result["memory"]["compared"]
    assert compared["reversible"]["loss"] == pytest.approx(compared["stored"]["loss"], rel=1e-6)
    assert {"perplexity", "bleu"} <= set(result["metrics"])
    assert (tmp_path / "run" / "samples.md").is_file()
    released = ["model=gpt2", f"model.name={tmp_path / 'run' / 'model'}", "trainer.steps=1"]
    tiny = [each for each in TINY_GPT2_DP if not each.startswith("model.")]
    (tmp_path / "again").mkdir()
    config = to_objects(compose([*tiny, *released, "privacy=none"]))
    again = run_experiment(config, tmp_path / "again", progress=Progress())
    assert again["metrics"]["perplexity_before"] == pytest.approx(result["metrics"]["perplexity"], rel=1e-5)


@pytest.mark.parametrize(
    ("overrides", "error", "words"),
    [
        (["privacy.target_delta=0.1"], PrivacyError, r"delta is 0\.1 for 40 examples"),
        (["trainer.batch_size=41"], PrivacyError, "batch size is 41 for 40 examples"),
        (["data.max_length=201"], ConfigError, "data.max_length is 201, but the model has 200 positions"),
        (["model=gpt2", "model.name=/no/such/folder"], ConfigError, "neither an existing folder nor a valid name"),
    ],
)
def test_impossible_configs_are_refused_in_one_sentence(overrides, error, words, tmp_path, cache):
    tiny = [each for each in TINY_GPT2_DP if "model=gpt2" not in overrides or not each.startswith("model.")]
    config = to_objects(compose([*tiny, *([] if "model=gpt2" in overrides else [f"model.cache={cache}"]), *overrides]))
    with pytest.raises(error, match=words):
        run_experiment(config, tmp_path, progress=Progress())


class Persons(Lines):
    """The examples of `Lines` as a data set for sampling."""

    def load(self, indices):
        x, y = (torch.cat([each[key] for each in self.data]) for key in "xy")
        rows = [index.example for index in indices]
        return {"x": x[rows], "y": y[rows]}


def private_state(seed, *, config):
    model = line_model()
    private = PrivateGradients(model, Mechanism(48, 2, 0.7, 0.5, delta=1e-3), seed=seed)
    return make_state(model, config, private=private)


def test_the_loop_takes_empty_batches_and_counts_them():
    config = trainer(steps=40)
    state = private_state(0, config=config)
    done = list(run_steps(state, Persons(), config))
    assert [each.loss for each in done].count(None) > 0  # some batches are empty at an expected size of 2
    assert state.private.steps == 40


def test_a_run_with_diverging_parameters_is_stopped():
    config = trainer(steps=5)
    state = private_state(0, config=config)
    state.optimizer.param_groups[0]["params"][0].data.fill_(float("inf"))
    with pytest.raises(TrainingError, match=r"parameters are not finite after step 1; lower trainer\.optimizer\.lr"):
        list(run_steps(state, Persons(), config))


def test_numbers_of_a_guarantee_are_rounded_up():
    assert [round_up(7.991, ".2f"), round_up(7.99, ".2f"), round_up(6.982e-5, ".2e"), round_up(9.999e-5, ".2e")] == [
        "8.00",
        "7.99",
        "6.99e-05",
        "1.00e-04",
    ]


@pytest.mark.parametrize("size", [None, 1, 2])
def test_the_micro_batch_size_does_not_change_the_result(size):
    config = trainer(steps=5, micro_batch_size=size)
    state = private_state(0, config=config)
    state.model.eval()  # dropout depends on the micro-batches
    list(run_steps(state, Persons(), config))
    other = private_state(0, config=config)
    other.model.eval()
    list(run_steps(other, Persons(), trainer(steps=5)))
    for one, another in zip(state.model.parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(one, another, rtol=1e-9, atol=1e-12)


def test_a_private_checkpoint_is_continued_only_by_a_private_run(tmp_path):
    config = trainer(steps=4)
    state = private_state(0, config=config)
    steps = run_steps(state, Persons(), config)
    next(steps)
    checkpoint.save(state, tmp_path / "checkpoint")
    list(steps)
    with pytest.raises(checkpoint.CheckpointError, match="of a run with privacy; continue with the same privacy="):
        checkpoint.load(make_state(line_model(), config), tmp_path / "checkpoint")
    continued = private_state(7, config=config)
    checkpoint.load(continued, tmp_path / "checkpoint")
    list(run_steps(continued, Persons(), config))
    assert continued.private.steps == 4
    for one, another in zip(state.model.parameters(), continued.model.parameters(), strict=True):
        assert torch.equal(one, another)


def test_tied_parameters_are_kept_once_and_come_back(tmp_path, cache):
    from memsave.data.text.visits import public_records
    from memsave.tasks.language.small_gpt2 import SmallGPT2, small_gpt2, train_tokenizer

    sizes = SmallGPT2(layers=1, heads=2, width=16, vocabulary=400)
    tokenizer = train_tokenizer([each.completion for each in public_records(50)], size=400)
    model, other = small_gpt2(sizes, tokenizer), small_gpt2(replace(sizes, seed=1), tokenizer)
    checkpoint.save(make_state(model, trainer()), tmp_path / "checkpoint")
    assert "lm_head.weight" not in load_file(tmp_path / "checkpoint" / "model.safetensors")
    checkpoint.load(make_state(other, trainer()), tmp_path / "checkpoint")
    assert other.lm_head.weight is other.transformer.wte.weight
    for one, another in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, another)


def command(cache, folder, *overrides):
    tiny = [
        *TINY_GPT2_DP,
        "privacy.seed=5",
        "privacy.noise_multiplier=1.0",
        "privacy.verify=false",
        *QUICK,
    ]
    fixed = ["trainer.steps=12", "trainer.checkpoint_every=1", "trainer.evaluate_first=false", "trainer.device=cpu"]
    folder.mkdir(exist_ok=True)
    return Command(folder, *tiny, *fixed, f"model.cache={cache}", f"hydra.run.dir={folder}", *overrides)


@pytest.mark.slow
def test_a_killed_run_resumes_bit_for_bit_and_counts_no_step_twice(tmp_path, cache):
    whole, killed, resumed = tmp_path / "whole", tmp_path / "killed", tmp_path / "resumed"
    assert command(cache, whole).wait().returncode == 0
    process = command(cache, killed)
    log = killed / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and (not log.is_file() or len(log.read_text().splitlines()) < 4):
        time.sleep(0.01)
    process.kill()
    assert process.wait().returncode == -9
    assert not (killed / "result.json").exists()
    assert command(cache, resumed, f"trainer.resume={killed / 'checkpoint'}").wait().returncode == 0
    results = [json.loads((folder / "result.json").read_text()) for folder in (whole, resumed)]
    assert [each["privacy"]["steps"] for each in results] == [12, 12]
    assert results[0]["metrics"] == results[1]["metrics"]
    weights = [load_file(folder / "model" / "model.safetensors") for folder in (whole, resumed)]
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name]), name
    taken = [json.loads(line)["step"] for line in (resumed / "metrics.jsonl").read_text().splitlines()][:-1]
    assert taken == list(range(taken[0], 13))
    assert 1 < taken[0] <= 12  # it resumed after a completed step


@pytest.mark.slow
def test_a_reversible_unet_takes_private_steps_one_patient_at_a_time(tmp_path):
    pytest.importorskip("monai")
    small = ["data.cases=8", "data.size=[48,48,32]", "data.crop_size=[16,16,16]", f"data.root={tmp_path}"]
    short = ["trainer.steps=3", "trainer.batch_size=2", "privacy.noise_multiplier=1.0", "profiler.compare=[]"]
    config = to_objects(compose(["experiment=brats_rev_dp", *small, *short]))
    folder = tmp_path / "run"
    folder.mkdir()
    spent = run_experiment(config, folder, progress=Progress())["privacy"]
    assert spent["steps"] == 3
    assert spent["unit"].startswith("one patient")
    assert spent["epsilon"] > 0


def test_a_resumed_run_with_other_steps_keeps_noise_and_target(tmp_path, cache):
    first = run([*QUICK, "privacy.target_epsilon=5"], tmp_path / "run", cache)["privacy"]
    known = [*QUICK, "privacy.target_epsilon=5", f"trainer.resume={tmp_path / 'run'}"]
    with pytest.raises(
        ConfigError, match=r"5 steps with the checkpoint's noise multiplier .* would spend epsilon 6\.\d+, "
    ):
        run([*known, "trainer.steps=5"], tmp_path / "more", cache)
    more = run([*known, "trainer.steps=5", "privacy.target_epsilon=7"], tmp_path / "more", cache)["privacy"]
    assert more["noise_multiplier"] == first["noise_multiplier"]
    assert (more["steps"], first["epsilon"] < more["epsilon"] < 7) == (5, True)


@pytest.mark.parametrize(
    "more", [[], pytest.param(["privacy.memory_budget=auto"], marks=pytest.mark.slow)], ids=" ".join
)
def test_data_that_cannot_be_read_costs_no_private_step_and_no_epsilon(tmp_path, cache, monkeypatch, more):
    load = Generation.load

    def broken(self, indices):
        if any(index.draw // self.size == 2 for index in indices):  # the third step
            raise DataError("record 3 cannot be read: mend it.")
        return load(self, indices)

    known = [*QUICK, "privacy.noise_multiplier=1.0", "privacy.verify=false", *more]
    monkeypatch.setattr(Generation, "load", broken)
    with pytest.raises(DataError, match="record 3") as failed:
        run(known, tmp_path / "run", cache)
    assert failed.value.outcome["privacy"]["steps"] == 2
    monkeypatch.undo()
    rest = run([*known, f"trainer.resume={tmp_path / 'run'}"], tmp_path / "run", cache)["privacy"]
    assert (rest["steps"], [line["step"] for line in lines_of(tmp_path / "run") if "loss" in line]) == (3, [1, 2, 3])
    mechanism = Mechanism(40, 8, 1.0, 0.1, delta=40**-1.1, accountant="rdp")
    assert rest["epsilon"] == pytest.approx(mechanism.epsilon(3))
