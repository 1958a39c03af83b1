"""Sizes in bytes, as text and from text."""

import re


def format_bytes(count: int) -> str:
    """Format a number of bytes, for example `6.30 GiB`."""
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if abs(count) >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} B"


def parse_bytes(text: str) -> int:
    """Parse a size such as `16GiB`, `80 GB` or `1.5e9` into bytes; ValueError for anything else."""
    match = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([KMGT]i?B|B)?\s*", text, flags=re.IGNORECASE)
    if match is None:
        raise ValueError(f"{text!r} is no size; give one such as 16GiB, 80GB or 500MiB")
    number, unit = match[1], (match[2] or "B").upper()
    base = 1024 if "I" in unit else 1000
    try:
        return int(float(number) * base ** "BKMGT".index(unit[0]))
    except ValueError as error:
        raise ValueError(f"{text!r} is no size; give one such as 16GiB, 80GB or 500MiB") from error
