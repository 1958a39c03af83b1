"""`model=rev_unet`: the config of the reversible U-Net."""

from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from memsave.config import ConfigError, option, register
from memsave.config.schema import MemoryConfig
from memsave.data.volumes.config import SegmentationData
from memsave.models import ReversibleUNet3d
from memsave.tasks.segmentation.networks import SegmentationModel


@register("model", "rev_unet")
@dataclass
class UNetModel(SegmentationModel):
    """The reversible 3D U-Net `memsave.models.ReversibleUNet3d`."""

    kind: str = "rev_unet"
    channels: list[int] = option([16, 32, 64])
    """Channels of each level, finest first; even numbers."""
    blocks: list[int] = option([1, 1, 1])
    """Reversible blocks of each level, in the encoder and again in the decoder."""
    expansion: int = option(4, least=1)
    """Ratio of the channels inside an MBConv branch to its input channels."""
    skip: str = option("add", choices=("add", "concat"))
    """Skip connections: add to the decoder's features, or concatenate."""
    squeeze_excitation: float = option(0.0, least=0)
    """Ratio of the hidden channels of squeeze-excitation to those of a branch; 0 for none."""
    dropout: float = option(0.0, least=0, most=0.999)
    """Dropout probability at the output of the branches."""
    deep_supervision: bool = False
    """Add an output head to each coarser decoder level, with loss weights 1/2, 1/4, ... of the finest."""
    grid: float | None = None
    """Round the stream to multiples of this number, such as 0.00006103515625 = 2^-14, to recompute it bitwise."""

    @property
    def levels(self) -> int:
        """The number of levels."""
        return len(self.channels)

    def smaller(self) -> dict[str, Any]:
        """One block per level; the channels stay, because kernels depend on them."""
        return {"model.blocks": [1] * len(self.blocks)}

    def family(self) -> str:
        """The kind and its channels."""
        return f"{self.kind} {'-'.join(map(str, self.channels))}"

    def build(self, data: SegmentationData, *, memory: MemoryConfig) -> nn.Module:
        """The network with random weights, for the modalities and regions of the data. Raises ConfigError."""
        options = {key: value for key, value in asdict(self).items() if key != "kind"}
        options |= {"anchor_every": memory.anchor_every, "engine": memory.engine, "chunks": memory.chunks}
        sizes = len(data.input_modalities()), len(data.label_scheme().names)
        try:
            return ReversibleUNet3d(*sizes, memory=memory.levels or memory.mode, **options)
        except ValueError as error:
            raise ConfigError(f"model: {error}") from error
