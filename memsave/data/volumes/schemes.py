"""Label schemes: the meaning of the integers in label files, and the regions that are scored.

The user names the scheme; it is never guessed, because a wrong scheme gives empty or exchanged regions without an
error. Scores are computed on nested regions:

    WT (whole tumour) = necrosis + edema + enhancing    TC (tumour core) = necrosis + enhancing    ET = enhancing
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

REGIONS = ("wt", "tc", "et")


@dataclass(frozen=True)
class LabelScheme:
    """The nonzero integers of a label file (0 is background), and the regions that they form, outer regions first."""

    name: str
    labels: Mapping[int, str] = field(hash=False)
    regions: Mapping[str, tuple[int, ...]] = field(hash=False)
    any_value: bool = False
    """Whether the only label may be stored as any positive integer, or as 1 and 255 in one file; it is read as 1."""

    @property
    def values(self) -> tuple[int, ...]:
        """All integers of a label volume after reading."""
        return (0, *sorted(self.labels))

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the regions, in the order of the masks."""
        return tuple(self.regions)

    def fits(self, found: Iterable[float]) -> bool:
        """Whether these values may occur in a label file."""
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
"""Schemes by name. The resection cavity is a region in `brats2024_rc`, and belongs to no region in `brats2024`."""


def schemes_with(found: Iterable[float]) -> list[str]:
    """The names of the schemes whose label files may contain these values."""
    values = set(found)
    return list(dict.fromkeys(scheme.name for scheme in SCHEMES.values() if scheme.fits(values)))
