"""The two networks, each with one logical batch, the same in every process."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memsave.models import ReversibleUNet3d
from memsave.models.language import causal_lm_losses, fuse_gelu

EXAMPLES = 8


@dataclass(frozen=True)
class Language:
    """GPT-2 with an untied head and with `nn.Linear` layers, because Opacus needs both for ghost clipping."""

    device: torch.device
    layers: int = 6
    width: int = 384
    heads: int = 6
    vocabulary: int = 8192
    length: int = 128

    def __str__(self) -> str:
        return f"GPT-2, {self.layers} layers of width {self.width}, {EXAMPLES} texts of {self.length} tokens"

    @cached_property
    def ids(self) -> Tensor:
        """(EXAMPLES, T) token ids."""
        generator = torch.Generator().manual_seed(1)
        return torch.randint(self.vocabulary, (EXAMPLES, self.length), generator=generator).to(self.device)

    def network(self) -> nn.Module:
        """A new network, always with the same weights."""
        from transformers import GPT2Config, GPT2LMHeadModel

        torch.manual_seed(0)
        sizes = {"n_layer": self.layers, "n_embd": self.width, "n_head": self.heads, "n_positions": self.length}
        off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "tie_word_embeddings": False}
        config = GPT2Config(vocab_size=self.vocabulary, bos_token_id=0, eos_token_id=0, **sizes, **off)
        model = GPT2LMHeadModel(config).train()
        use_linear_layers(model)
        fuse_gelu(model)
        return model.to(self.device)

    def losses(self, model: nn.Module, rows: Sequence[int]) -> Tensor:
        """(B,): each text's mean next-token loss."""
        ids = self.ids[rows]
        return causal_lm_losses(model, ids, ids)

    def logits(self, model: nn.Module, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(logits (B, T - 1, V), targets (B, T - 1)); positions are given for each text, as Opacus needs them."""
        ids = self.ids[rows]
        positions = torch.arange(ids.shape[1], device=ids.device).expand(len(ids), -1).contiguous()
        return model(input_ids=ids, position_ids=positions, use_cache=False).logits[:, :-1], ids[:, 1:]


def use_linear_layers(model: nn.Module) -> None:
    """Replace each Conv1D of transformers by the `nn.Linear` of the same function."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__ == "Conv1D":
                linear = nn.Linear(*child.weight.shape)  # Conv1D: (in, out)
                linear.weight.data.copy_(child.weight.data.T)
                linear.bias.data.copy_(child.bias.data)
                setattr(parent, name, linear)


@dataclass(frozen=True)
class Volumes:
    """A reversible U-Net."""

    device: torch.device
    channels: tuple[int, ...] = (8, 16, 32)
    blocks: int = 2
    side: int = 24

    def __str__(self) -> str:
        return f"U-Net, {len(self.channels)} levels of {self.blocks} blocks, {EXAMPLES} volumes of {self.side}^3 voxels"

    @cached_property
    def data(self) -> tuple[Tensor, Tensor]:
        """(images (EXAMPLES, 4, side, side, side), targets with 3 channels)."""
        generator = torch.Generator().manual_seed(1)
        images = torch.randn(EXAMPLES, 4, *3 * [self.side], generator=generator)
        targets = (torch.rand(EXAMPLES, 3, *3 * [self.side], generator=generator) < 0.3).float()
        return images.to(self.device), targets.to(self.device)

    def network(self) -> nn.Module:
        """A new network, always with the same weights."""
        torch.manual_seed(0)
        return ReversibleUNet3d(4, 3, channels=self.channels, blocks=self.blocks).to(self.device)

    def losses(self, model: nn.Module, rows: Sequence[int]) -> Tensor:
        """(B,): each volume's mean cross-entropy."""
        images, targets = (each[rows] for each in self.data)
        return F.binary_cross_entropy_with_logits(model(images), targets, reduction="none").flatten(1).mean(1)


Problem = Language | Volumes


def problems(device: torch.device, *, quick: bool) -> dict[str, Problem]:
    """By name; `quick`: in sizes that only show that everything runs."""
    if quick:
        small = Language(device, layers=2, width=16, heads=2, vocabulary=64, length=12)
        return {"language": small, "volumes": Volumes(device, channels=(4, 8), blocks=1, side=8)}
    return {"language": Language(device), "volumes": Volumes(device)}
