"""The tables of docs/models.md."""

import re
import textwrap
from collections import Counter

from experiments.models.check import Row
from experiments.models.tasks import TASKS

VERDICTS = ("exact", "refused", "traceback", "wrong", "not tried")
REASON = 180  # characters


def summary(rows: list[Row]) -> str:
    """How many classes came to which verdict, by task."""
    lines = ["| task | " + " | ".join(VERDICTS) + " |", "|---" * (len(VERDICTS) + 1) + "|"]
    counts = Counter((row.task, row.verdict) for row in rows)
    for task in TASKS:
        lines.append(f"| {task} | " + " | ".join(str(counts[task, each]) for each in VERDICTS) + " |")
    total = Counter(row.verdict for row in rows)
    return "\n".join([*lines, "| all | " + " | ".join(str(total[each]) for each in VERDICTS) + " |"])


def tables(rows: list[Row]) -> str:
    """By task, a row for each class."""
    parts = []
    for task in TASKS:
        lines = [f"### {task.capitalize()}", "", "| class | verdict |", "|---|---|"]
        lines += [f"| {row.name} | {told(row)} |" for row in rows if row.task == task]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def told(row: Row) -> str:
    """The verdict with its reason; the remedy is in the JSON."""
    text = row.verdict if not row.message else f"{row.verdict}: {reason(row.message)}"
    if row.mode == "eval":
        text += " (eval mode)"
    if not row.apart:
        text += f". Mixes examples in train mode; in eval mode {reason(row.eval) or 'the same'}"
    return text.replace("|", "\\|")


def reason(message: str) -> str:
    """What a message says before its remedy; of several reasons the first."""
    several = re.fullmatch(r"the model cannot be clipped exactly, for (\d+) reasons: - (.*)", message)
    count, message = (int(several[1]), several[2]) if several else (1, message)
    more = f" (and {count - 1} more)" if count > 1 else ""
    return textwrap.shorten(message.split("; ")[0], REASON, placeholder=" ...") + more
