"""Training and held-out data: by files, or by a fraction of the training file."""

import hashlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from memsave.config import option
from memsave.data.errors import DataError

TRAINING = ("train",)
HELD_OUT = ("test", "validation", "valid", "dev")
"""Names of held-out files without their suffixes; the first one that exists is used."""

Item = TypeVar("Item")


@dataclass
class OwnFiles:
    """The keys of sources that read one's own files: which examples are held out, and the encoding."""

    held_out: str | None = None
    """File of held-out examples; null takes a file of the folder, or held_out_fraction of the training file."""
    held_out_fraction: float = option(0.1, least=0, most=0.9)
    """Share of the examples that is held out if there is no held-out file; equal prompts or texts stay together."""
    seed: int = option(0, least=0)
    """Seed of the choice of held-out examples."""
    encoding: str = "utf-8"
    """Encoding of the files."""


def split_files(
    root: str | Path, *, held_out: str | None, suffixes: Collection[str], names: Sequence[str] = HELD_OUT
) -> tuple[Path, Path | None]:
    """(the training file, the held-out file or None), for a file or for a folder with train.* and a file of `names`.

    Raises DataError if a folder has no file for training, or two files of one name.
    """
    root = Path(root).expanduser()
    given = None if held_out is None else Path(held_out).expanduser()
    if not root.is_dir():
        return root, given
    training = _named(root, TRAINING, suffixes)
    if training is None:
        wanted = " or ".join(f"train{suffix}" for suffix in suffixes)
        raise DataError(f"{root} holds no {wanted}: name the training file, as in data.root={root}/FILE.")
    return training, given or _named(root, names, suffixes)


def _named(folder: Path, names: Sequence[str], suffixes: Collection[str]) -> Path | None:
    """The file of the first name that exists with one of the suffixes."""
    for name in names:
        found = sorted(each for each in folder.glob(f"{name}.*") if each.suffix.lower() in suffixes)
        if len(found) > 1:
            raise DataError(f"{folder} holds {found[0].name} and {found[1].name}: delete or move one of them.")
        if found:
            return found[0]
    return None


def hold_out(
    items: Sequence[Item], *, key: Callable[[Item], str], fraction: float, seed: int, source: str | Path
) -> tuple[list[Item], list[Item]]:
    """(training, held-out) items; items with the same key stay together.

    A hash of (seed, key) decides about each item, so that adding or removing one does not move the others: the unit of
    privacy is one example. The key with the smallest hash is always held out.

    Raises DataError if all items have the same key, or if there are none.
    """
    if not items:
        raise DataError(f"{source} has no example that can be used: correct its lines.")
    places = {each: _place(each, seed=seed) for each in {key(item) for item in items}}
    if len(places) < 2:
        raise DataError(f"{source} has a single example to train on and to hold out: give more, or data.held_out=FILE.")
    first, last = min(places.values()), max(places.values())
    out = {each for each, place in places.items() if (place < fraction or place == first) and place != last}
    return [each for each in items if key(each) not in out], [each for each in items if key(each) in out]


def _place(key: str, *, seed: int) -> float:
    """A number in [0, 1) that depends on (seed, key) alone."""
    digest = hashlib.sha256(f"{seed} {key}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:7], "big") / 2**56
