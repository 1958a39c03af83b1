"""`audit=canaries`: canaries in a private run, and the report of the audit at its end.

audit.json   scores and inclusion of each canary
audit.md     the lower bound of epsilon beside the promise, and what the audit cannot show
audit.png    the scores of included and excluded canaries, and the bounds
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from memsave.config import ConfigError
from memsave.config.schema import CanariesAudit, Config, TrainerConfig
from memsave.data.loader import Index
from memsave.files import write_json
from memsave.privacy.audit import AuditReport, CanaryAudit, audit_report
from memsave.progress import Progress
from memsave.training.audit_picture import draw_audit
from memsave.training.loop import State, TrainingError, autocast, averaged, evaluating
from memsave.training.task import AcceptsCanaries, Task, split

LOSS_BATCH = 32


class AuditBreach(TrainingError):
    """The audit refutes the promised epsilon; `outcome` has the result of the run."""


def make_audit(config: Config, task: Task, *, progress: Progress) -> CanaryAudit | None:
    """The audit of the run, whose input-space canaries are added to the task; None without one."""
    audit = config.audit
    if not isinstance(audit, CanariesAudit):
        return None
    examples, kinds = task.size, ("gradient", "input") if audit.canary == "both" else (audit.canary,)
    if "input" in kinds:
        if not isinstance(task, AcceptsCanaries):
            raise ConfigError(
                f"audit.canary={audit.canary} needs records that this task cannot make; give "
                f"audit.canary=gradient, or add the method add_canaries to the task"
            )
        task.add_canaries(audit.canaries, seed=config.trainer.seed)
    numbers = {"gradient": 0, "inputs": 0}
    numbers |= {"gradient": audit.canaries} if "gradient" in kinds else {}
    numbers |= {"inputs": audit.canaries} if "input" in kinds else {}
    progress.say(
        f"audit: {audit.canaries} canaries in {' and '.join(kinds)} space, each included with probability 1/2; the "
        f"mechanism samples them beside {examples} examples"
    )
    return CanaryAudit(examples=examples, seed=audit.seed, **numbers)


def prepare_audit(state: State, task: Task, config: TrainerConfig) -> None:
    """Compute the losses of the input-space canaries before the first step."""
    audit = None if state.private is None else state.private.audit
    if audit is not None and audit.inputs and audit.initial_losses is None:
        audit.initial_losses = canary_losses(state.model, task, audit, config)


def canary_losses(model: nn.Module, task: Task, audit: CanaryAudit, config: TrainerConfig) -> Tensor:
    """(inputs,): the losses of the input-space canaries, in evaluation mode, in float64 on the CPU."""
    found = []
    with evaluating(model), autocast(model, config.precision):
        for first in range(0, audit.inputs, LOSS_BATCH):
            numbers = range(audit.examples + first, audit.examples + min(first + LOSS_BATCH, audit.inputs))
            batch = task.place(task.load([Index(number, number) for number in numbers]))
            losses = [task.per_example_losses(model, part) for part in split(batch, config.micro_batch_size)]
            found.append(torch.cat(losses).double().cpu())
    return torch.cat(found)


def finish_audit(config: Config, state: State, task: Task) -> AuditReport | None:
    """The report of the steps taken; None without an audit."""
    private, audit = state.private, config.audit
    if private is None or private.audit is None or not isinstance(audit, CanariesAudit) or not private.steps:
        return None
    scores = None
    if private.audit.inputs:
        assert private.audit.initial_losses is not None
        with averaged(state):
            scores = private.audit.initial_losses - canary_losses(state.model, task, private.audit, config.trainer)
    return audit_report(private, input_scores=scores, confidence=audit.confidence)


def write_audit(report: AuditReport | None, folder: Path) -> None:
    """Write `audit.json`, `audit.md` and `audit.png`; nothing without an audit."""
    if report is not None:
        write_json(folder / "audit.json", report.as_dict())
        (folder / "audit.md").write_text(_statement(report))
        draw_audit(report, folder / "audit.png")


def audit_result(report: AuditReport | None) -> dict[str, Any]:
    """The entry `audit` of `result.json`, without the score of each canary; empty without an audit."""
    if report is None:
        return {}
    content = report.as_dict()
    groups = [
        {key: value for key, value in group.items() if key not in ("scores", "truth")} for group in content["groups"]
    ]
    return {"audit": {**content, "groups": groups}}


def describe_breach(report: AuditReport) -> str:
    """One sentence about an audit that refutes the promise."""
    reasons = list(report.findings)
    if report.epsilon > report.promised:
        reasons.insert(0, f"epsilon is at least {report.epsilon:.2f}, and {report.promised:.2f} was promised")
    return (
        f"the audit refutes the privacy of this run with {report.confidence:.0%} confidence: {'; '.join(reasons)}; do "
        f"not release model/"
    )


def _statement(report: AuditReport) -> str:
    rows = [
        f"| {group.kind} | {group.canaries} | {method} | {bound:.2f} | {group.most[method]:.2f} |"
        for group in report.groups
        for method, bound in group.bounds.items()
    ]
    promised = "none" if report.promised == float("inf") else f"{report.promised:.2f}"
    findings = "".join(f"\n- {each}." for each in report.findings) or "\n- Batches look like Poisson samples."
    verdict = "**The promise is refuted.**" if report.breach else "The promise is not refuted."
    return f"""# Audit of this run

With {report.confidence:.0%} confidence, {report.steps} steps spent at least epsilon = {report.epsilon:.2f} at
delta = {report.delta:.2e}. The accountant promises {promised}. {verdict}

| canaries | number | method | epsilon at least | without noise it would be |
|---|---|---|---|---|
{chr(10).join(rows)}

The last column is the largest number that this audit could have shown. It grows with the number of canaries.
{findings}

**What it does not show.** The bound is a lower one, and most audits stay far below the true epsilon. A promise that is
not refuted is no proof: `privacy.md` states the guarantee. An honest run is refuted with a probability of at most
{1 - report.confidence:.0%}.

Canaries were a part of the training data. Release the model of a run without an audit.
"""
