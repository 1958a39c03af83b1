"""Training and held-out data: by files, or by a fraction of the training file."""

import hashlib
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from memsave.config import option
from memsave.data.errors import DataError, read_each

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
    """Share that is held out if there is no held-out file; equal prompts or texts, or persons, stay together."""
    seed: int = option(0, least=0)
    """Seed of the choice of held-out examples."""
    encoding: str = "utf-8"
    """Encoding of the files."""

    def divided(
        self,
        training: Path,
        held_out: Path | None,
        read: Callable[[Path], list[Item]],
        *,
        key: Callable[[Item], str],
    ) -> tuple[list[Item], list[Item]]:
        """(training, held-out) items of two files, or of one file, of which a part is held out (`hold_out`).

        `read` returns the items of a file. Items of one unit (data.unit) stay together. Raises DataError.
        """
        if held_out is None:
            options: dict[str, Any] = {"fraction": self.held_out_fraction, "seed": self.seed, "source": training}
            return hold_out(read(training), key=key, **options)
        train, out = read_each([training, held_out], read)
        refuse_shared_units(train, out, held_out=held_out)
        return train, out


class HeldOutPart(list[Item]):
    """Held-out items that are a part of the training file."""


def raw_data(train: Sequence[Item], held_out: Sequence[Item]) -> list[Item]:
    """The items of the training file, whose digest identifies the data of a run, whatever part is held out."""
    return [*train, *(held_out if isinstance(held_out, HeldOutPart) else ())]


def unit_of(item: object) -> str | None:
    """The unit of an item, by data.unit; None without it."""
    return getattr(item, "unit", None)


def refuse_shared_units(train: Iterable[object], out: Iterable[object], *, held_out: Path) -> None:
    """Raise DataError if a unit has records in both files: scores of a person seen in training measure memory."""
    shared = {unit_of(each) for each in train}.intersection(map(unit_of, out)) - {None}
    if shared:
        others = f" and {len(shared) - 1} others" if len(shared) > 2 else " and another one" if len(shared) > 1 else ""
        raise DataError(
            f"{held_out} has records of {min(map(str, shared))!r}{others} (data.unit), who also "
            f"{'has' if len(shared) == 1 else 'have'} records in the training file: move all records of a person into "
            f"one of the two files."
        )


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
    """(training, held-out) items; items with the same key stay together. The key of an item with a unit is its unit.

    A hash of (seed, key) decides about each item, so that adding or removing one does not move the others: the unit of
    privacy is one example. The key with the smallest hash is always held out.

    Raises DataError if all items have the same key, or if there are none.
    """
    keys = [key(item) if unit_of(item) is None else str(unit_of(item)) for item in items]
    if not items:
        raise DataError(f"{source} has no example that can be used: correct its lines.")
    places = {each: _place(each, seed=seed) for each in set(keys)}
    if len(places) < 2:
        what = "example" if unit_of(items[0]) is None else "person (data.unit)"
        raise DataError(f"{source} has a single {what} to train on and to hold out: give more, or data.held_out=FILE.")
    first, last = min(places.values()), max(places.values())
    out = {each for each, place in places.items() if (place < fraction or place == first) and place != last}
    train = [each for each, own in zip(items, keys, strict=True) if own not in out]
    return train, HeldOutPart(each for each, own in zip(items, keys, strict=True) if own in out)


def _place(key: str, *, seed: int) -> float:
    """A number in [0, 1) that depends on (seed, key) alone."""
    digest = hashlib.sha256(f"{seed} {key}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:7], "big") / 2**56
