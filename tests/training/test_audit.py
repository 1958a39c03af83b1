"""`audit=canaries` in a run: files, entries of the result, resumption, refusals, and a refuted promise."""

import json

import pytest

from memsave.config import ConfigError
from memsave.config.compose import compose, to_objects
from memsave.experiment import run_experiment
from memsave.privacy.audit import AuditReport, CanaryGroup
from memsave.privacy.sampling import Sampler
from memsave.progress import Progress
from memsave.run import execute
from memsave.training.audit import AuditBreach, audit_result, describe_breach, make_audit, write_audit
from tests.support.tiny_configs import TINY_GPT2_DP, TINY_UNET

pytest.importorskip("opacus")
pytest.importorskip("transformers")
FAST = ["profiler.compare=[]", "trainer.evaluate_first=false", "privacy.verify=false", "privacy.accountant=rdp"]
AUDIT = [*TINY_GPT2_DP, *FAST, "audit=canaries", "audit.canaries=40", "trainer.batch_size=80"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("MEMSAVE_CACHE", str(tmp_path_factory.getbasetemp() / "audit-cache"))


@pytest.mark.slow
def test_a_run_reports_the_bounds_of_both_kinds_of_canaries(tmp_path):
    code = execute(compose([*AUDIT, "audit.canary=both", "trainer.batch_size=120"]), tmp_path, experiment="gpt2_dp")
    result = json.loads((tmp_path / "result.json").read_text())
    assert code == 0
    assert result["privacy"]["size"] == 40 + 2 * 40
    assert result["data"]["examples"] == 40
    assert "80 of them are canaries of an audit" in (tmp_path / "privacy.md").read_text()
    audit = result["audit"]
    assert [(group["kind"], group["canaries"]) for group in audit["groups"]] == [("input", 40), ("gradient", 40)]
    assert audit["epsilon"] <= audit["promised"] == pytest.approx(result["privacy"]["epsilon"])
    assert audit["most"] > 0
    assert not audit["breach"]
    scores = json.loads((tmp_path / "audit.json").read_text())["groups"][1]["scores"]
    assert len(set(scores)) == 40
    assert "The promise is not refuted." in (tmp_path / "audit.md").read_text()
    assert (tmp_path / "audit.png").stat().st_size > 5000


@pytest.mark.slow
def test_a_resumed_run_continues_its_canaries(tmp_path):
    first = execute(compose([*AUDIT, "trainer.steps=2"]), tmp_path / "first", experiment="gpt2_dp")
    state = json.loads((tmp_path / "first" / "audit.json").read_text())["groups"][0]
    again = [*AUDIT, f"trainer.resume={tmp_path / 'first'}", "trainer.steps=3", "privacy.target_epsilon=20"]
    second = execute(compose(again), tmp_path / "second", experiment="gpt2_dp")
    assert (first, second) == (0, 0)
    after = json.loads((tmp_path / "second" / "audit.json").read_text())
    assert after["steps"] == 3
    assert after["groups"][0]["truth"] == state["truth"]
    assert after["groups"][0]["scores"] != state["scores"]


@pytest.mark.slow
def test_a_refuted_promise_ends_the_run_after_its_files(tmp_path, monkeypatch):
    original = Sampler._poisson
    monkeypatch.setattr(Sampler, "_poisson", lambda self, members, rate: original(self, members, rate / 4))
    config = to_objects(compose([*AUDIT, "trainer.batch_size=40", "trainer.steps=8"]))
    with pytest.raises(
        AuditBreach, match=r"0\.2.* times as often as the sample rate 0\.5 says.*do not release"
    ) as breach:
        run_experiment(config, tmp_path, progress=Progress(silent=True))
    assert breach.value.outcome["audit"]["breach"]
    assert breach.value.outcome["metrics"]["perplexity"] > 1
    assert "**The promise is refuted.**" in (tmp_path / "audit.md").read_text()


def report_of(*, bound, findings=()):
    scores, truth = [0.1 * n for n in range(40)], [n % 2 == 0 for n in range(40)]
    groups = [
        CanaryGroup("input", 40, 20, {"one_run": 0.0, "f_dp": 0.5}, {"one_run": 2.0, "f_dp": 3.0}, scores, truth),
        CanaryGroup("gradient", 40, 20, {"one_run": bound}, {"one_run": 9.0}, scores, truth),
    ]
    return AuditReport(4.0, 1e-5, 0.95, 3, groups, list(findings))


def test_the_files_of_a_report_have_its_bounds_and_limits(tmp_path):
    report = report_of(bound=1.5)
    write_audit(report, tmp_path)
    text = (tmp_path / "audit.md").read_text()
    assert "at least epsilon = 1.50" in text
    assert "| gradient | 40 | one_run | 1.50 | 9.00 |" in text
    assert "The promise is not refuted." in text
    assert json.loads((tmp_path / "audit.json").read_text())["groups"][1]["scores"] == report.groups[1].scores
    assert (tmp_path / "audit.png").stat().st_size > 5000
    found = audit_result(report)["audit"]
    assert (found["epsilon"], found["promised"], found["most"], found["breach"]) == (1.5, 4.0, 9.0, False)
    assert "scores" not in found["groups"][0]
    assert audit_result(None) == {}


def test_a_bound_above_the_promise_and_another_sampler_are_breaches(tmp_path):
    above, sampler = report_of(bound=4.5), report_of(bound=0.0, findings=["batches were drawn in another way"])
    assert above.breach
    assert sampler.breach
    assert "epsilon is at least 4.50, and 4.00 was promised; do not release model/" in describe_breach(above)
    assert "confidence: batches were drawn in another way; do not release" in describe_breach(sampler)
    write_audit(sampler, tmp_path)
    assert "- batches were drawn in another way." in (tmp_path / "audit.md").read_text()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["privacy=none", "audit=canaries"], "give privacy=ghost, or audit=none"),
        (["audit=canaries", "trainer.parallel=fsdp"], "give trainer.parallel=ddp"),
        (["audit=canaries", "audit.canaries=3"], "audit.canaries is 3; it must be at least 16"),
        (["audit=canaries", "audit.canary=record"], "choose one of gradient, input, both"),
    ],
)
def test_invalid_configs_are_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        compose([*TINY_GPT2_DP, "profiler.compare=[]", *overrides])


def test_a_task_without_canaries_is_refused_with_the_remedy():
    class Plain:
        size = 10

    config = to_objects(compose([*AUDIT, "audit.canary=input"]))
    with pytest.raises(ConfigError, match=r"needs records that this task cannot make; give audit\.canary=gradient"):
        make_audit(config, Plain(), progress=Progress(silent=True))


@pytest.mark.slow
def test_canaries_of_segmentation_are_cases_with_masks_of_their_own():
    pytest.importorskip("monai")
    import torch

    from memsave.data.loader import Index
    from memsave.experiment import make_task

    config = to_objects(compose([*TINY_UNET, "privacy=ghost", "trainer.batch_size=2", "profiler.compare=[]"]))
    task = make_task(config, torch.device("cpu"), progress=Progress(silent=True))
    size, counts = task.size, task.counts
    task.add_canaries(3, seed=0)
    assert (task.size, task.counts) == (size + 3, counts)
    (first, other) = (task.load([Index(size + n, 0)] * 2)["label"] for n in (0, 1))
    assert torch.equal(first[0], first[1])
    assert not torch.equal(first[0], other[0])
    assert set(first.unique().tolist()) == set(task.scheme.values)
