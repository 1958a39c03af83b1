"""How label files number their labels, and the regions that are scored.

A scheme is chosen by name, never guessed: one that does not fit gives empty or exchanged regions and no error. Scores
are taken on nested regions:

    WT (whole tumour) = necrosis + edema + enhancing    TC (tumour core) = necrosis + enhancing    ET = enhancing
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

REGIONS = ("wt", "tc", "et")


@dataclass(frozen=True)
class LabelScheme:
    """The integers of a label file, 0 being background, and the regions they make up, outer ones first."""

    name: str
    labels: Mapping[int, str] = field(hash=False)
    regions: Mapping[str, tuple[int, ...]] = field(hash=False)
    any_value: bool = False
    """The one label may be stored as any positive integer, or as 1 and 255 in one file; it is read as 1."""

    @property
    def values(self) -> tuple[int, ...]:
        """Every integer that a label volume may hold once it is read."""
        return (0, *sorted(self.labels))

    @property
    def names(self) -> tuple[str, ...]:
        """The regions, in the order of the masks."""
        return tuple(self.regions)

    def fits(self, found: Iterable[float]) -> bool:
        """Whether a label file may hold these values."""
        foreground = set(found) - {0}
        if not self.any_value:
            return foreground <= set(self.labels)
        whole = all(value > 0 and float(value).is_integer() for value in foreground)
        return whole and (len(foreground) < 2 or foreground == {1, 255})


def _tumour(name: str, *, necrosis: int, edema: int, enhancing: int, cavity: int | None = None) -> LabelScheme:
    labels = {necrosis: "necrosis", edema: "edema", enhancing: "enhancing"}
    if cavity is not None:
        labels[cavity] = "resection cavity"
    core = (necrosis, enhancing)
    return LabelScheme(
        name,
        labels=dict(sorted(labels.items())),
        regions={"wt": tuple(sorted((*core, edema))), "tc": tuple(sorted(core)), "et": (enhancing,)},
    )


BRATS_2021 = _tumour("brats2021", necrosis=1, edema=2, enhancing=4)
BRATS_2023 = _tumour("brats2023", necrosis=1, edema=2, enhancing=3)
BRATS_2024 = _tumour("brats2024", necrosis=1, edema=2, enhancing=3, cavity=4)
BRATS_2024_RC = LabelScheme("brats2024_rc", labels=BRATS_2024.labels, regions={**BRATS_2024.regions, "rc": (4,)})
MSD = _tumour("msd", necrosis=2, edema=1, enhancing=3)
BINARY = LabelScheme("binary", labels={1: "lesion"}, regions={"lesion": (1,)}, any_value=True)

SCHEMES: dict[str, LabelScheme] = {
    **{f"brats{year}": BRATS_2021 for year in range(2018, 2022)},
    **{scheme.name: scheme for scheme in (BRATS_2023, BRATS_2024, BRATS_2024_RC, MSD, BINARY)},
}
"""By name; `brats2024_rc` has the resection cavity as a fourth region, in `brats2024` it belongs to none."""


def fitting(found: Iterable[float]) -> list[str]:
    """The schemes whose label files may hold these values."""
    values = set(found)
    return list(dict.fromkeys(scheme.name for scheme in SCHEMES.values() if scheme.fits(values)))
