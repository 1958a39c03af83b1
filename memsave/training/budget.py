"""Steps that hold more memory than the run may: `budget=16GiB`."""

from typing import Any

from memsave.profiler import MemoryReport, format_bytes


class OverBudget(RuntimeError):
    """A step exceeded the budget; the message names what grew, and `memory` stands in the run's result."""

    memory: dict[str, Any]


def over_budget(report: MemoryReport, *, first: MemoryReport | None, budget: int, step: int) -> str | None:
    """What to say of a step whose peak of live memory is above the budget (bytes); None where it is not.

    What grew is told against `first`, the report of an earlier step; without one, what is largest is told.
    """
    if report.peak_bytes <= budget:
        return None
    category, module, size = report.growth(first)
    place = "outside of every module" if module is None else f"in {module or 'the model itself'}"
    amount = f"{format_bytes(size)} {place}"
    grew = f"{category} grew, by {amount}" if first else f"{category} takes the most, {amount}"
    return (
        f"step {step} held {format_bytes(report.peak_bytes)} of live memory, more than the budget of "
        f"{format_bytes(budget)}: {grew}"
    )
