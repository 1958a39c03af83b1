"""`data=brats`: cases of a challenge, or your own, in one of the layouts of `memsave.data.volumes.layouts`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from memsave.config import ConfigError, option, register
from memsave.data.errors import raise_first
from memsave.data.volumes.config import SegmentationData
from memsave.data.volumes.layouts import LAYOUTS, Case, find_cases
from memsave.data.volumes.schemes import SCHEMES, LabelScheme


@register("data", "brats")
@dataclass
class BratsData(SegmentationData):
    """Cases of a challenge, or your own, in one of the layouts of `memsave.data.volumes.layouts`."""

    kind: str = "brats"
    layout: str = option("brats2021", choices=tuple(LAYOUTS))
    """Names and folders of the files: those of a challenge, or folder for any images with masks."""
    scheme: str | None = option(None, choices=tuple(SCHEMES))
    """Meaning of the labels; null takes the scheme of the layout."""
    modalities: list[str] | None = None
    """Input modalities in order, or for layout=folder the ends of the file names; null takes all of the layout."""
    check: str = option("labels", choices=("labels", "all", "none"))
    """Check before training: labels reads headers and labels of every case, all also reads the images."""
    mask: str | None = None
    """For layout=folder, the end of the mask's file name; null tries seg, label and mask."""

    def validate(self) -> None:
        """Raise ConfigError without a folder."""
        super().validate()
        if not self.root:
            raise ConfigError("data.root is not given; name the folder of the cases, as in data.root=/my/BraTS2021")

    def find_cases(self, *, say: Callable[[str], None]) -> list[Case]:
        """The cases, after the check of their files. Raises DataError for the first fault."""
        kwargs: dict[str, Any] = {"scheme": self.scheme, "modalities": self.modalities, "mask": self.mask}
        found = find_cases(str(self.root), self.layout, **kwargs)
        if self.check == "none":
            return found
        from memsave.data.volumes.check import check_cases

        faults = check_cases(found, images=self.check == "all", workers=max(1, self.workers))
        raise_first(faults, root=self.root, layout=self.layout, **kwargs)
        return found

    def input_modalities(self) -> tuple[str, ...]:
        """`modalities`, or those of the layout."""
        names = tuple(self.modalities or LAYOUTS[self.layout].modalities)
        if not names:
            raise ConfigError("data.layout=folder needs data.modalities, as in data.modalities=[t1ce]")
        return names

    def label_scheme(self) -> LabelScheme:
        """`scheme`, or that of the layout."""
        return LAYOUTS[self.layout].scheme if self.scheme is None else SCHEMES[self.scheme]

    def file_names(self) -> tuple[str, str | None]:
        """(layout, end of the mask's name)."""
        return self.layout, self.mask
