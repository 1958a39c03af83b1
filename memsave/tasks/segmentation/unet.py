"""`model=rev_unet`: the reversible U-Net as a config."""

from dataclasses import asdict, dataclass

from torch import nn

from memsave.config import ConfigError, option, register
from memsave.config.schema import MemoryConfig, ModelConfig
from memsave.data.volumes.config import SegmentationData
from memsave.models import ReversibleUNet3d


@register("model", "rev_unet")
@dataclass
class UNetModel(ModelConfig):
    """`memsave.models.ReversibleUNet3d`."""

    kind: str = "rev_unet"
    channels: list[int] = option([16, 32, 64])
    """Channels of the levels, finest first; even."""
    blocks: list[int] = option([1, 1, 1])
    """Reversible blocks of each level, on the way down and again on the way up."""
    expansion: int = option(4, least=1)
    skip: str = option("add", choices=("add", "concat"))
    """add | concat."""
    squeeze_excitation: float = option(0.0, least=0)
    dropout: float = option(0.0, least=0, most=0.999)
    deep_supervision: bool = False
    """Train the coarser levels of the way up by heads of their own, whose losses count 1/2, 1/4, ... of the finest."""
    grid: float | None = None
    """Round the stream to multiples of it, such as 0.00006103515625 = 2^-14, so that it is rebuilt to the bit."""

    def build(self, data: SegmentationData, *, memory: MemoryConfig) -> nn.Module:
        """The network with random weights, for the modalities and regions of the data. Raises ConfigError."""
        options = {key: value for key, value in asdict(self).items() if key != "kind"}
        options |= {"anchor_every": memory.anchor_every, "engine": memory.engine, "chunks": memory.chunks}
        sizes = len(data.input_modalities()), len(data.label_scheme().names)
        try:
            return ReversibleUNet3d(*sizes, memory=memory.levels or memory.mode, **options)
        except ValueError as error:
            raise ConfigError(f"model: {error}") from error
