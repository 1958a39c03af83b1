"""How a trained U-Net is used: `config.json` beside its weights in a run's `model/`.

The file holds what predictions follow from, and no path and no case: it may be handed on with the weights.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from memsave._version import __version__
from memsave.config import ConfigError
from memsave.data.volumes.config import SegmentationData
from memsave.data.volumes.layouts import LAYOUTS
from memsave.data.volumes.schemes import SCHEMES, LabelScheme
from memsave.models import ReversibleUNet3d

CONFIG = "config.json"
KIND = "rev_unet"
PREPARED = {
    "orientation": "LPS: x runs to the patient's left, y to the back, z up",
    "cropping": "to the box around the voxels that are nonzero in at least one modality",
    "normalisation": "z-score of each modality over its nonzero voxels",
    "logits": "one per region, in the order of regions; a voxel belongs to it above 0",
}
"""What every U-Net of a run expects and gives; written for people, and not read."""


@dataclass(frozen=True)
class UNetConfig:
    """What it takes to build a trained U-Net and to segment with it."""

    model: dict[str, Any]
    """The arguments of `ReversibleUNet3d`."""
    modalities: Sequence[str]
    """What the input channels are, in their order."""
    layout: str
    """That of the cases that it was trained on; it says what names of modalities mean."""
    scheme: str
    """Of the labels: its regions are the output channels, in their order."""
    mask: str | None
    """For layout=folder, what the mask's name ends in."""
    spacing: Sequence[float] | None
    """Millimetres of a voxel that volumes are resampled to; None leaves them as they are."""
    crop_size: Sequence[int]
    """Voxels of a training crop, and so of the sliding window."""
    smallest_et: int
    """An enhancing region of fewer predicted voxels is taken for none."""
    precision: str
    """Of autocast: float32, bfloat16 or float16."""

    @classmethod
    def of(cls, data: SegmentationData, *, model: Any, precision: str) -> "UNetConfig":
        """The config of a network that was trained on such data."""
        layout, mask = data.file_names()
        return cls(
            model=model.arguments,
            modalities=data.input_modalities(),
            layout=layout,
            scheme=data.label_scheme().name,
            mask=mask,
            spacing=data.spacing,
            crop_size=data.crop_size,
            smallest_et=data.smallest_et,
            precision=precision,
        )

    @classmethod
    def read(cls, path: Path) -> "UNetConfig":
        """The config that `write` wrote; ConfigError where the file is another one."""
        try:
            content = json.loads(path.read_text())
            if content["kind"] != KIND:
                raise ValueError(f"its kind is {content['kind']!r} and should be {KIND!r}")
            found = cls(**{name: content[name] for name in cls.__dataclass_fields__})
            sizes = found.model["in_channels"], found.model["out_channels"]
            if sizes != (len(found.modalities), len(found.regions.names)) or found.layout not in LAYOUTS:
                raise ValueError("its channels are not its modalities and regions")
            return found
        except KeyError as error:
            raise ConfigError(f"{path} has no usable {error}; copy the model's folder again") from error
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise ConfigError(f"{path} is no config of a U-Net ({error}); copy the model's folder again") from error

    def write(self, path: Path) -> None:
        """Write JSON, with what people want to know beside it."""
        scheme = self.regions
        told = {"regions": scheme.regions, "labels": scheme.labels, **PREPARED}
        content = {"memsave": __version__, "kind": KIND, **asdict(self), **told}
        path.write_text(json.dumps(content, indent=2) + "\n")

    def build(self) -> nn.Module:
        """The network with random weights."""
        try:
            return ReversibleUNet3d(**self.model)
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"{CONFIG} names a U-Net that cannot be built ({error}); copy its folder again"
            ) from error

    @property
    def regions(self) -> LabelScheme:
        """The labels and the regions that they make up."""
        return SCHEMES[self.scheme]
