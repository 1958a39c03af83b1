"""A run and its budget before training: write a plan (`mode=plan`), or train at the largest size (`vary=`)."""

from pathlib import Path
from typing import Any

import torch

from memsave.config import Config
from memsave.planning.budget import OverBudget
from memsave.planning.plan import Plan, make_plan, variation
from memsave.planning.pretend import plan_alone
from memsave.planning.report import draw, lines, markdown
from memsave.profiler import format_bytes, write_html
from memsave.progress import Progress
from memsave.tasks.definition import definition_of
from memsave.training.result import write_config


def plan_experiment(
    config: Config, folder: Path, device: torch.device, *, strategies: list[str] | None = None, progress: Progress
) -> dict[str, Any]:
    """Write `plan.md`, `plan.png` and `memory.html` into the folder; returns the entry `plan` of `result.json`.

    Raises OverBudget if the config's own strategy does not fit at any size.
    """
    plan = plan_alone(make_plan, config, device, strategies=strategies, folder=folder)
    (folder / "plan.md").write_text(markdown(plan))
    draw(plan, folder / "plan.png")
    steps = {f"{row.strategy} {row.size or ''}".strip(): row.need.report for row in plan.rows}
    write_html(steps, folder / "memory.html", title="Live memory of one training step, predicted on fake tensors")
    for line in lines(plan):
        progress.say(line)
    if plan.own.fits is False:
        raise OverBudget(nothing_fits(plan), plan=plan.as_dict())
    return {"plan": plan.as_dict()}


def fit_to_budget(
    config: Config, folder: Path, device: torch.device, *, progress: Progress
) -> tuple[Config, dict[str, Any]]:
    """(the config to train, the entry `plan` of its result); with `vary`, the config has the largest size that fits.

    `config.yaml` is then rewritten with that size. Raises OverBudget if nothing fits, or if a step whose shapes are
    static would hold more than the budget.
    """
    if config.budget is None or not (config.vary or definition_of(config).has_static_batches):
        return config, {}
    own = [definition_of(config).current_strategy()]
    plan = plan_alone(make_plan, config, device, strategies=own, folder=folder)
    entry = {"plan": plan.as_dict()}
    if plan.vary is None:
        assert plan.budget is not None
        if plan.own.need.exact > plan.budget:  # exact, because training compares live bytes with the budget
            raise OverBudget(nothing_fits(plan, needed=plan.own.need.exact), **entry)
        return config, entry
    if plan.own.answer is None or plan.own.answer.size is None:
        raise OverBudget(nothing_fits(plan), **entry)
    limit = f" ({plan.own.limit})" if plan.own.limit else ""
    progress.say(
        f"training at {plan.own.size}, the largest that fits into {format_bytes(plan.own.answer.budget)}{limit}"
    )
    config = variation(config).at(plan.own.answer.size).changed({"vary": None})
    write_config(config, folder)
    return config, entry


def nothing_fits(plan: Plan, *, needed: int | None = None) -> str:
    """The message: what does not fit, the smallest sufficient budget (`needed`, or that of the plan), what fits."""
    budget, need = format_bytes(plan.budget or 0), format_bytes(plan.own.need.total if needed is None else needed)
    what = "a step" if plan.vary is None else f"the smallest {plan.vary}"
    others = [row.strategy for row in plan.rows if row.fits]
    hint = f"; strategies that fit: {', '.join(others)}" if others else ""
    return f"{what} does not fit into {budget} as {plan.own.strategy}: it needs a budget of {need}, predicted{hint}"
