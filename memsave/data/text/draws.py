"""Random names, numbers and words for generated texts: functions of a random generator."""

import random
from collections.abc import Callable

Draw = Callable[[random.Random], str]


def words(text: str) -> Draw:
    """One of the comma-separated words."""
    options = [word.strip() for word in text.split(",")]
    return lambda rng: rng.choice(options)


def number(low: int, high: int, pattern: str = "{}") -> Draw:
    """A number from `low` to `high`, in a pattern."""
    return lambda rng: pattern.format(rng.randint(low, high))


def compound(starts: str, ends: str) -> Draw:
    """A name: one of the starts joined with one of the ends, each separated by spaces."""
    first, last = starts.split(), ends.split()
    return lambda rng: rng.choice(first) + rng.choice(last)


def sequence(*draws: Draw) -> Draw:
    """The drawn words, with a space between them."""
    return lambda rng: " ".join(draw(rng) for draw in draws)


def either(*draws: Draw) -> Draw:
    """What one of the functions draws."""
    return lambda rng: rng.choice(draws)(rng)


def clock(low: int, high: int) -> Draw:
    """A time from `low` to `high` o'clock, at a quarter of an hour."""
    return lambda rng: f"{rng.randint(low, high)}:{rng.choice(('00', '15', '30', '45'))}"
