"""The config of a trained U-Net: `config.json`, next to the weights in a run's `model/`.

The file holds all settings that predictions depend on. It names no path and no case, so that it can be released.
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
from memsave.files import parse_json
from memsave.models import ReversibleUNet3d
from memsave.tasks.segmentation.networks import rebuild

CONFIG = "config.json"
KIND = "rev_unet"
PREPARED = {
    "orientation": "LPS: x runs to the patient's left, y to the back, z up",
    "cropping": "to the box around the voxels that are nonzero in at least one modality",
    "normalisation": "z-score of each modality over its nonzero voxels",
    "logits": "one per region, in the order of regions; a voxel belongs to it above 0",
}
"""Description of inputs and outputs for readers of the file; `UNetConfig.read` ignores it."""


@dataclass(frozen=True)
class UNetConfig:
    """Everything that is needed to build a trained U-Net and to segment with it."""

    model: dict[str, Any]
    """The arguments of `ReversibleUNet3d`; of a network of one's own, its class as "target", and its "arguments"."""
    modalities: Sequence[str]
    """The modalities of the input channels, in order."""
    layout: str
    """The layout of the training cases, which defines the names of modalities."""
    scheme: str
    """The label scheme, whose regions are the output channels, in order."""
    mask: str | None
    """For layout=folder, the end of the mask's file name."""
    spacing: Sequence[float] | None
    """Voxel size in millimetres to which volumes are resampled; None does not resample."""
    crop_size: Sequence[int]
    """Voxels of a training crop and of the sliding window."""
    smallest_et: int
    """Predicted enhancing regions with fewer voxels are removed."""
    precision: str
    """The type of autocast: float32, bfloat16 or float16."""

    @classmethod
    def of(cls, data: SegmentationData, *, model: Any, precision: str) -> "UNetConfig":
        """The config of a network that was trained on these data."""
        layout, mask = data.file_names()
        return cls(
            model=getattr(model, "memsave_model", None) or model.arguments,
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
        """Read the file of `write`. Raises ConfigError for any other file."""
        try:
            content = parse_json(path.read_text())
            if content["kind"] != KIND:
                raise ValueError(f"its kind is {content['kind']!r} and should be {KIND!r}")
            found = cls(**{name: content[name] for name in cls.__dataclass_fields__})
            sizes = len(found.modalities), len(found.regions.names)
            own = "target" in found.model  # it may have other names for them
            known = own or (found.model["in_channels"], found.model["out_channels"]) == sizes
            if not known or found.layout not in LAYOUTS:
                raise ValueError("its channels do not match its modalities and regions")
            return found
        except KeyError as error:
            raise ConfigError(f"{path} has no usable {error}; copy the model's folder again") from error
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"{path} is not the config of a U-Net ({error}); copy the model's folder again"
            ) from error

    def write(self, path: Path) -> None:
        """Write JSON, with descriptions for readers."""
        scheme = self.regions
        description = {"regions": scheme.regions, "labels": scheme.labels, **PREPARED}
        content = {"memsave": __version__, "kind": KIND, **asdict(self), **description}
        path.write_text(json.dumps(content, indent=2) + "\n")

    def build(self) -> nn.Module:
        """The network with random weights."""
        try:
            if "target" in self.model:
                return rebuild(self.model)
            return ReversibleUNet3d(**self.model)
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"{CONFIG} names a U-Net that cannot be built ({error}); copy its folder again"
            ) from error

    @property
    def regions(self) -> LabelScheme:
        """The label scheme with its regions."""
        return SCHEMES[self.scheme]
