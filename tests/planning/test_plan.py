"""Plans: the predicted memory of a step against the measured one, and training at the size of a plan."""

import json

import pytest
import torch

pytest.importorskip("monai")
pytest.importorskip("transformers")
pytest.importorskip("opacus")


from memsave.config import ConfigError
from memsave.config.compose import compose, load, to_objects
from memsave.experiment import run_experiment
from memsave.planning import plan as planning
from memsave.planning.budget import OverBudget, free_bytes
from memsave.planning.fake_step import dummy_task, fake_step, whole_batch
from memsave.planning.plan import PER_SAMPLE, Plan, Row, fixed_sizes, make_plan, variation
from memsave.planning.report import draw, lines, markdown
from memsave.profiler import MemoryRecorder, format_bytes, peak_on_fake
from memsave.profiler.calibration import create_state
from memsave.profiler.seconds import OTHER, TimeModel
from memsave.profiler.work import WorkCounter
from memsave.progress import Progress
from tests.support.tiny_configs import TINY_GPT2, TINY_UNET

pytestmark = pytest.mark.usefixtures("cache")
CPU = torch.device("cpu")
TEXT = ["experiment=gpt2_dp", *TINY_GPT2]


def config_of(*overrides, base=TINY_UNET):
    """A config, by default with engine=hooks: fake tensors are slow for the many small operations of a fused step."""
    rebuilt = base is TINY_UNET and not any(
        each.startswith(("memory=stored", "memory=checkpoint")) for each in overrides
    )
    hooks = ["memory.engine=hooks"] if rebuilt else []
    return to_objects(compose([*base, *hooks, *overrides]))


def plan_of(*overrides, base=TINY_UNET):
    return make_plan(config_of(*overrides, base=base), CPU, progress=Progress())


@pytest.mark.parametrize(
    "overrides",
    [
        ("memory=stored",),
        ("memory=checkpoint", "data.crops_per_case=2"),
        ("memory=reversible", "trainer.micro_batch_size=1", "trainer.ema=0.9"),
        pytest.param(("memory=reversible", "memory.engine=fused"), marks=pytest.mark.slow),
        pytest.param(
            ("memory=reversible", "trainer.precision=bfloat16", "model.deep_supervision=true",
             "model.channels=[8,8,16]", "model.blocks=[1,1,1]"),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ("memory=stored", "privacy=ghost", "privacy.passes=direct", "trainer.micro_batch_size=1"),
            marks=pytest.mark.slow,
        ),
    ],
    ids=str,
)  # fmt: skip
def test_the_peak_of_a_segmentation_run_is_predicted(overrides, tmp_path):
    config = config_of(*overrides, "trainer.steps=2", "profiler.compare=[]", "privacy.noise_multiplier=1.0"
                       if "privacy=ghost" in overrides else "trainer.seed=1")  # fmt: skip
    predicted = peak_on_fake(lambda: fake_step(config, device=CPU)).peak_bytes
    held = run_experiment(config, tmp_path, progress=Progress())["memory"]["peak_bytes"]
    if "privacy=ghost" in overrides:  # the size of Poisson batches varies
        assert held == pytest.approx(predicted, rel=0.1)
    elif "trainer.precision=bfloat16" in overrides:  # fake GroupNorm stores its statistics in another dtype
        assert 0.999 * held < predicted < 1.03 * held
    else:
        assert held == pytest.approx(predicted, rel=0.005)


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("privacy=none",),
        pytest.param(("memory=checkpoint",), marks=pytest.mark.slow),
        pytest.param(("model=rev_gpt2", "memory=reversible"), marks=pytest.mark.slow),
        pytest.param(("model=rev_gpt2", "memory=stored", "privacy=none"), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_peak_of_a_language_model_step_is_predicted(overrides):
    config = config_of(*overrides, "model.width=64", "model.vocabulary=4000", base=TEXT)
    predicted = peak_on_fake(lambda: fake_step(config, device=CPU))
    made = fake_step(config, device=CPU)
    made.run()
    with MemoryRecorder(made.model, optimizer=made.optimizer) as recorder:
        made.run()
    # on fake tensors, transformers creates two masks that it omits if every token is attended to
    assert predicted.peak_bytes == pytest.approx(recorder.report().peak_bytes, rel=0.015)


def test_the_work_of_a_fake_step_is_that_of_a_real_one_under_autocast():
    config = config_of("memory=stored", "trainer.precision=bfloat16", "profiler.compare=[]")
    fake, real = WorkCounter(), WorkCounter()
    peak_on_fake(lambda: fake_step(config, device=CPU, work=fake))
    made = fake_step(config, device=CPU)
    create_state(made.optimizer)
    with MemoryRecorder(made.model, optimizer=made.optimizer, observe=real):
        made.run()
    flops = {kind: work.flops for kind, work in real.total.items() if work.flops}
    assert {kind: work.flops for kind, work in fake.total.items() if work.flops} == flops
    assert any(kind.startswith("convolution") and kind.endswith("bfloat16") for kind in flops)
    sizes = [sum(work.bytes for work in each.total.values()) for each in (fake, real)]
    assert sizes[1] <= sizes[0] <= 1.2 * sizes[1]  # the backward of a fake GroupNorm returns float32


def test_the_time_of_a_batch_grows_with_its_micro_batches():
    config, work = config_of("trainer.micro_batch_size=2", "privacy=none", base=TEXT), WorkCounter()
    peak_on_fake(lambda: fake_step(config, device=CPU, work=work))
    times = TimeModel({OTHER: (1.0, 0.0, 0.0)})
    batches = [whole_batch(config.changed({"trainer.batch_size": size}), work) for size in (4, 8, 16)]
    seconds = [times.seconds_of(batch.values()) for batch in batches]
    assert seconds[0] == pytest.approx(times.seconds(work.total))
    assert seconds[2] - seconds[1] == pytest.approx(2 * (seconds[1] - seconds[0]))
    assert seconds[1] - seconds[0] > 0.25 * seconds[0]


def test_more_than_two_micro_batches_do_not_raise_the_peak():
    many, two = (config_of("memory=stored", "trainer.micro_batch_size=1", f"trainer.batch_size={n}") for n in (8, 2))
    assert len(dummy_task(many, device=CPU).batch["image"]) == 2
    reports = [peak_on_fake(lambda config=config: fake_step(config, device=CPU)) for config in (many, two)]
    assert reports[0].peak_bytes == reports[1].peak_bytes


def test_per_example_gradients_are_counted():
    config = config_of("trainer.micro_batch_size=null", base=TEXT)
    plain, held = (
        peak_on_fake(lambda each=each: fake_step(config, device=CPU, per_sample_gradients=each))
        for each in (False, True)
    )
    parameters = plain.peak_by_category["parameter"]
    extra = held.peak_bytes - parameters * config.trainer.batch_size
    assert 0 < extra < plain.peak_bytes  # at that peak most of the activations are freed


@pytest.mark.parametrize(
    ("vary", "budget", "base"),
    [
        ("volume", "100MiB", TINY_UNET),
        pytest.param("depth", "20MiB", TINY_UNET, marks=pytest.mark.slow),
        pytest.param("channels", "20MiB", TINY_UNET, marks=pytest.mark.slow),
        ("batch", "10MiB", TINY_UNET),
        pytest.param("batch", "4MiB", TEXT, marks=pytest.mark.slow),
    ],
    ids=["volume", "depth", "channels", "batch of volumes", "batch of texts"],
)
def test_the_largest_size_fits_and_the_next_one_does_not(vary, budget, base):
    strategies = ["memory=stored", "profiler.compare=[]"] if base is TINY_UNET else []
    plan = plan_of(f"vary={vary}", f"budget={budget}", "mode=plan", *strategies, base=base)
    for row in plan.rows:
        assert row.answer.size is not None
        assert row.need.total <= plan.budget
        assert row.answer.above.total > plan.budget
    assert [row.strategy for row in plan.rows] == (["stored"] if base is TINY_UNET else ["plain", PER_SAMPLE, "ghost"])
    assert all(row.step_seconds > 0 for row in plan.rows)
    text = markdown(plan)
    assert all(row.size in text and f"{row.step_seconds:.3g} s" in text for row in plan.rows)
    assert any(plan.rows[0].size in line for line in lines(plan))


@pytest.mark.parametrize(
    ("vary", "sizes", "words"),
    [
        ("depth", (2, 4), "4 layers"),
        pytest.param("channels", (16, 32), "width 32", marks=pytest.mark.slow),
        pytest.param("length", (32, 64), "64 tokens", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("model", ["small_gpt2", pytest.param("rev_gpt2", marks=pytest.mark.slow)])
def test_a_language_model_varies_length_depth_and_channels(model, vary, sizes, words):
    varied = variation(config_of(f"vary={vary}", "budget=1GiB", "mode=plan", f"model={model}", base=TEXT))
    less, more = (
        peak_on_fake(lambda size=size: fake_step(varied.at(size), device=CPU, architecture=varied.architecture(size)))
        for size in sizes
    )
    assert less.peak_bytes < more.peak_bytes
    assert varied.describe(sizes[1]) == words
    assert varied.low <= varied.start
    assert (varied.high, varied.limit) == ((200, "the model has 200 positions") if vary == "length" else (None, ""))


@pytest.mark.slow
def test_a_search_ends_only_when_a_size_does_not_fit():
    (row,) = plan_of("mode=plan", "vary=channels", "budget=8GiB", "memory=stored", "profiler.compare=[]").rows
    assert row.answer.size > 1024
    assert row.answer.above.total > 8 * 2**30
    assert (row.limit, row.as_dict()["timed_out"]) == (None, False)


@pytest.mark.slow
def test_a_limit_of_the_model_is_reported_in_the_plan(tmp_path):
    config = config_of("mode=plan", "vary=length", "budget=1GiB", base=TEXT)
    plan = make_plan(config, CPU, progress=Progress())
    assert [row.described for row in plan.rows] == ["200 tokens"] * 3
    assert plan.rows[0].as_dict()["limit"] == "the model has 200 positions"
    for text in (markdown(plan), "\n".join(lines(plan))):
        assert text.count("not tried: the model has 200 positions") == 3
    draw(plan, tmp_path / "plan.png")


def test_a_search_that_exceeds_its_time_limit_reports_it(tmp_path):
    config = config_of("mode=plan", "vary=depth", "budget=1GiB", "profiler.plan_seconds=0", "profiler.compare=[]")
    content = run_experiment(config, tmp_path, progress=Progress())["plan"]
    assert (content["rows"][0]["size"], content["rows"][0]["timed_out"]) == (1, True)
    text = (tmp_path / "plan.md").read_text()
    assert "at least 1 blocks a level" in text
    assert "not tried: search ended after profiler.plan_seconds=0" in text


@pytest.mark.parametrize(
    ("overrides", "base", "words"),
    [
        (("vary=volume",), TINY_UNET, "2 at once"),
        (("vary=depth", "data.crops_per_case=3"), TINY_UNET, "2 at once, crops of 16x16x16, 3 crops a case"),
        (("vary=batch",), TINY_UNET, "crops of 16x16x16"),
        (("vary=length",), TEXT, "5 at once"),
        (("vary=channels", "trainer.micro_batch_size=null"), TEXT, "8 at once, 60 tokens"),
    ],
    ids=str,
)
def test_a_plan_names_the_sizes_that_it_does_not_vary(overrides, base, words):
    config = config_of("mode=plan", "budget=1GiB", *overrides, base=base)
    assert fixed_sizes(config) == words
    row = Row("stored", None, True, 1.0)
    plan = Plan(config.vary, 2**30, [], row, fixed_sizes(config))
    assert f"Each step: {words}." in markdown(plan)
    assert f"each step: {words}" in list(lines(plan))
    assert plan.as_dict()["fixed"] == words


def test_varied_volumes_keep_their_proportions():
    varied = variation(config_of("vary=volume", "budget=1GiB", "data.crop_size=[240,240,160]"))
    assert varied.describe(240) == "240x240x160"
    assert varied.describe(120) == "128x128x80"
    assert varied.at(48).data.crop_size == [48, 48, 32]
    assert varied.start == 240


@pytest.mark.slow
def test_checkpoint_and_reversible_fit_a_larger_volume_than_stored():
    rows = {row.strategy: row.answer.size for row in plan_of("mode=plan", "vary=volume", "budget=60MiB").rows}
    assert rows == {"stored": 16, "checkpoint": 32, "reversible": 32}


def test_a_plan_without_vary_reports_whether_the_config_fits():
    assert [row.fits for row in plan_of("mode=plan", "budget=100MiB").rows] == [True] * 3
    assert plan_of("mode=plan", "budget=4MiB", "memory=stored", "profiler.compare=[]").own.fits is False
    assert plan_of("mode=plan", "memory=stored", "profiler.compare=[]").own.fits is None


def test_a_plan_leaves_the_reserve_free():
    one, other = (
        plan_of("mode=plan", "vary=batch", "budget=12MiB", f"reserve={size}", "memory=stored", "profiler.compare=[]")
        for size in ("0B", "4MiB")
    )
    assert other.own.answer.size < one.own.answer.size
    assert other.own.need.calibrated <= 8 * 2**20


def test_calibrations_are_measured_once_and_cached(monkeypatch, tmp_path):
    monkeypatch.setenv("MEMSAVE_CACHE", str(tmp_path))
    plan_of("mode=plan", "profiler.compare=[]")
    monkeypatch.setattr(planning, "calibrate", lambda *args, **kwargs: pytest.fail("it was cached"))
    plan_of("mode=plan", "profiler.compare=[]")
    plan_of("mode=plan", "profiler.compare=[]", "data.crop_size=[32,32,32]", "model.blocks=[2,1]")
    for other in ("memory=stored", "model.channels=[4,8]", "trainer.precision=bfloat16"):
        with pytest.raises(pytest.fail.Exception):
            plan_of("mode=plan", other, "profiler.compare=[]")
    newer = {**planning.versions(), "memsave": "99"}
    monkeypatch.setattr(planning, "versions", lambda: newer)
    with pytest.raises(pytest.fail.Exception):
        plan_of("mode=plan", "profiler.compare=[]")


def test_the_calibration_step_has_one_size_for_every_crop_size(monkeypatch, tmp_path):
    monkeypatch.setenv("MEMSAVE_CACHE", str(tmp_path))
    sizes = []

    def calibrate(step, *, device, timed):
        made, shapes = step(), []
        hook = made.model.register_forward_pre_hook(lambda module, given: shapes.append(tuple(given[0].shape)))
        made.run()
        hook.remove()
        sizes.extend(shapes)
        return None  # as without a measurable allocator

    monkeypatch.setattr(planning, "calibrate", calibrate)
    for size in (16, 48):
        crop = [f"data.crop_size=[{size},{size},{size}]", "data.crops_per_case=2"]
        plan_of("mode=plan", "memory=stored", "profiler.compare=[]", *crop)
    assert sizes == [(1, 4, 16, 16, 16)] * 2  # SMALL_CROP, here 16


def test_a_plan_says_that_compilation_is_not_planned():
    plan = plan_of("mode=plan", "memory=stored", "profiler.compare=[]", "trainer.compile=true")
    words = "trainer.compile=true is not planned"
    assert all(words in text for text in (markdown(plan), "\n".join(lines(plan)), plan.as_dict()["notes"][0]))
    assert not plan_of("mode=plan", "memory=stored", "profiler.compare=[]").notes


def test_a_plan_writes_its_files_and_json(tmp_path):
    config = config_of("mode=plan", "vary=volume", "budget=40MiB")
    content = run_experiment(config, tmp_path, progress=Progress())["plan"]
    assert {path.name for path in tmp_path.iterdir()} >= {"plan.md", "plan.png", "memory.html"}
    assert json.loads(json.dumps(content)) == content
    assert content["strategy"] == "reversible"
    assert content["budget_bytes"] == 40 * 2**20
    assert {row["strategy"] for row in content["rows"]} == {"stored", "checkpoint", "reversible"}


def test_if_nothing_fits_the_error_names_a_sufficient_budget(tmp_path):
    config = config_of("mode=plan", "vary=volume", "budget=1MiB")
    with pytest.raises(OverBudget, match=r"the smallest volume does not fit into 1\.00 MiB as reversible") as stop:
        run_experiment(config, tmp_path, progress=Progress())
    rows = stop.value.outcome["plan"]["rows"]
    smallest = next(row["smallest_budget_bytes"] for row in rows if row["strategy"] == "reversible")
    assert format_bytes(smallest) in str(stop.value)
    assert plan_of("mode=plan", "vary=volume", f"budget={smallest}", "profiler.compare=[]").own.answer.size == 16


def test_training_uses_the_largest_size_that_fits_and_stays_within_the_budget(tmp_path):
    config = config_of("vary=volume", "budget=40MiB", "trainer.steps=2", "profiler.compare=[]", "data.size=[48,48,48]")
    result = run_experiment(config, tmp_path, progress=Progress())
    (row,) = result["plan"]["rows"]
    assert row["size"] == 32
    held = result["memory"]["peak_bytes"]
    assert held <= 40 * 2**20
    assert held == pytest.approx(row["exact_bytes"], rel=0.005)
    assert load(tmp_path / "config.yaml").data.crop_size == [row["size"]] * 3


def test_a_budget_does_not_change_losses_and_scores(tmp_path):
    losses = []
    for name, overrides in (("without", ()), ("with", ("budget=1GiB",))):
        (tmp_path / name).mkdir()
        config = config_of("memory=stored", "trainer.steps=2", "profiler.compare=[]", *overrides)
        losses.append(run_experiment(config, tmp_path / name, progress=Progress())["metrics"])
    assert losses[0] == losses[1]


def test_a_run_whose_step_does_not_fit_is_refused_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr("memsave.experiment.make_task", lambda *args, **options: 1 / 0)
    with pytest.raises(OverBudget, match=r"a step does not fit into 2\.00 MiB as stored: it needs") as caught:
        run_experiment(config_of("memory=stored", "budget=2MiB"), tmp_path, progress=Progress())
    (row,) = caught.value.outcome["plan"]["rows"]
    enough = row["exact_bytes"]  # training compares live bytes with the budget
    assert f"it needs a budget of {format_bytes(enough)}" in str(caught.value)
    with pytest.raises(ZeroDivisionError):
        run_experiment(config_of("memory=stored", f"budget={enough}"), tmp_path, progress=Progress())


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["vary=volume"], "vary=volume needs a budget, as in budget=16GiB"),
        (
            ["vary=length", "budget=1GiB"],
            "vary=length is not valid for task=segmentation; give vary=batch, channels, depth or volume",
        ),
        (["vary=volumes", "budget=1GiB"], "did you mean volume"),
        (["mode=plans"], "did you mean plan"),
        (
            ["vary=batch", "budget=1GiB", "privacy=direct", "trainer.micro_batch_size=1"],
            "several examples at once, but privacy=direct processes one",
        ),
        (["budget=much"], "budget: 'much' is no size; give one such as 16GiB"),
        (["reserve=auto"], "reserve: 'auto' is no size"),
    ],
)
def test_invalid_combinations_are_refused(overrides, words):
    with pytest.raises(ConfigError, match=words):
        config_of(*overrides)


@pytest.mark.parametrize("memory", ["memory=stored", pytest.param("memory=auto", marks=pytest.mark.slow)])
def test_direct_privacy_is_planned_as_its_own_strategy(tmp_path, memory, capfd):
    direct = ["privacy=direct", "trainer.micro_batch_size=1", "budget=1GiB", "mode=plan", memory]
    result = run_experiment(config_of(*direct, base=TEXT), tmp_path, progress=Progress())
    assert [row["strategy"] for row in result["plan"]["rows"]] == ["plain", PER_SAMPLE, "direct"]
    assert result["plan"]["strategy"] == "direct" and "planning direct" in capfd.readouterr().err


def test_training_refuses_a_depth_without_pretrained_weights():
    with pytest.raises(ConfigError, match="a model without pretrained weights; give mode=plan"):
        config_of("vary=depth", "budget=1GiB", base=TEXT)


def test_free_bytes_are_plausible():
    assert 2**20 < free_bytes(CPU) < 2**50
    assert free_bytes(CPU, processes=4) == pytest.approx(free_bytes(CPU) / 4, rel=0.2)
