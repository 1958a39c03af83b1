"""Small models, how to shard them by FSDP2, and the comparison of a sharded clipper with one of the whole batch."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

from memsave.ghost import GhostClipper
from memsave.models import causal_lm_losses
from memsave.models.rev_gpt2 import RevGPT2, RevGPT2Config
from memsave.models.unet import ReversibleUNet3d
from memsave.processes import process_count, process_rank

VOCABULARY, LENGTH = 13, 6


def mlp():
    """Layers of uneven sizes, of which some processes hold empty shards; the last one belongs to the root."""
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1), nn.Tanh(), nn.Linear(1, 2, bias=False))


def shard_linears(model):
    """Shard the first two layers, then the rest."""
    for layer in (model[0], model[2], model):
        fully_shard(layer)


class SequenceFirst(nn.Module):
    """Blocks that have the examples in dimension 1, and a parameter that is no layer's."""

    def __init__(self):
        super().__init__()
        self.first, self.positions = nn.Linear(3, 4), nn.Parameter(torch.randn(2, 1, 4))
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(4, 2, 5, dropout=0.0) for _ in range(2))

    def forward(self, x):
        """(B, 3) to (B, 4)."""
        x = self.first(torch.stack((x, -x))) + self.positions
        for layer in self.layers:
            x = layer(x)
        return x.mean(0)


def shard_layers(model):
    """Shard each of the layers, then the rest."""
    for layer in model.layers:
        fully_shard(layer)
    fully_shard(model)


def squares(model, x):
    """(B,) losses of (B, 3)."""
    return model(x).square().sum(1)


def gpt2(**options):
    """A GPT-2 with a tied head."""
    from transformers import GPT2Config, GPT2LMHeadModel

    size = {"n_layer": 2, "n_head": 2, "n_embd": 6, "n_positions": 8, "vocab_size": VOCABULARY}
    without_dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return GPT2LMHeadModel(GPT2Config(**size, **without_dropout, bos_token_id=0, eos_token_id=0, **options))


def checkpointed_gpt2():
    """The same with activation checkpoints."""
    model = gpt2()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def llama_lora():
    """A Llama with adapters on its attention, which alone are trained."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    size = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=8, **size))
    model = get_peft_model(base, LoraConfig(r=3, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return model


def shard_blocks(model):
    """Shard each transformer block, then the rest with its tied embedding."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    inner = getattr(base, "transformer", None) or base.model
    for block in inner.h if hasattr(inner, "h") else inner.layers:
        fully_shard(block)
    fully_shard(model)


def rev_gpt2(memory):
    """memsave's reversible GPT-2."""
    config = RevGPT2Config(
        hidden_size=6, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=8, vocab_size=VOCABULARY
    )
    return RevGPT2(config, memory=memory)


def shard_branches(model):
    """Shard the two branches of each coupling, then the rest."""
    for layer in getattr(model, "layers", ()):
        fully_shard(layer.attention)
        fully_shard(layer.mlp)
    for level in [*getattr(model, "encoder", ()), *getattr(model, "decoder", ())]:
        for block in level.blocks:
            fully_shard(block.f)
            fully_shard(block.g)
    fully_shard(model)


def unet(memory, **options):
    """memsave's U-Net on tiny volumes."""
    return ReversibleUNet3d(1, 2, channels=(2, 4), blocks=(2, 1), expansion=2, memory=memory, **options)


def voxel_losses(model, batch):
    """(B,) cross-entropies."""
    volumes, labels = batch
    return F.cross_entropy(model(volumes), labels, reduction="none").flatten(1).mean(1)


def lm_losses(model, batch, **options):
    """(B,) losses by the chunked head, which reads the head's weight outside of the model's forward."""
    ids, labels, mask = batch
    return causal_lm_losses(model, ids, labels, attention_mask=mask, **options)


def lm_losses_of_logits(model, batch):
    """(B,) losses by the model's own logits."""
    return lm_losses(model, batch, head="logits")


def vectors(count):
    """(B, 3)."""
    return torch.randn(count, 3, dtype=torch.float64)


def texts(count):
    """Token ids, labels and masks of texts of several lengths."""
    ids = torch.randint(VOCABULARY, (count, LENGTH))
    mask = (torch.arange(LENGTH) < torch.randint(2, LENGTH + 1, (count, 1))).long()
    return ids, torch.where(mask.bool(), ids, -100), mask


def volumes(count):
    """Volumes and their labels."""
    return torch.randn(count, 1, 4, 4, 4, dtype=torch.float64), torch.randint(2, (count, 4, 4, 4))


class Case(NamedTuple):
    """One comparison."""

    build: Callable[[], nn.Module]
    shard: Callable[[nn.Module], None]
    losses: Callable[[nn.Module, Any], torch.Tensor]
    batch: Callable[[int], Any]
    counts: tuple[int, ...] = (5, 4)
    """The examples of each micro-batch, over all processes."""
    options: dict[str, Any] = {}  # noqa: RUF012
    dtype: torch.dtype = torch.float64
    autocast: bool = False


def chosen(batch, rows):
    """The rows of a batch of tensors."""
    return batch[rows] if isinstance(batch, torch.Tensor) else tuple(each[rows] for each in batch)


def local_rows(count):
    """(the rows of this process, which of them count): a process without an example takes the first one as padding."""
    rows = list(range(process_rank(), count, process_count()))
    return (rows, None) if rows else ([0], torch.zeros(1))


def whole(tensor):
    """All of a tensor, on every process."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def made(case):
    """A model of the case, with the same values on every call."""
    torch.manual_seed(0)
    return case.build().to(case.dtype)


def errors(case):
    """The largest errors (of norms, of the sums' elements, relative to the largest) of the sharded clipper."""
    plain, sharded = made(case), made(case)
    case.shard(sharded)
    bound = {"max_grad_norm": 0.2, **case.options}
    reference, clipper = GhostClipper(plain, **bound), GhostClipper(sharded, **bound)
    of_norms = 0.0
    torch.manual_seed(1)
    for count in case.counts:
        batch = case.batch(count)
        rows, counted = local_rows(count)
        with torch.autocast("cpu", torch.bfloat16) if case.autocast else nullcontext():
            right = reference.backward(case.losses(plain, batch))[rows]
            ours = clipper.backward(case.losses(sharded, chosen(batch, rows)), counted=counted)
        of_norms = max(of_norms, ((ours - right).abs() / right).max().item())
    of_sums = largest = 0.0
    for one, other in zip(sharded.parameters(), plain.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        if one.grad is not None:
            of_sums = max(of_sums, (whole(one.grad) - other.grad).abs().max().item())
            largest = max(largest, other.grad.abs().max().item())
    assert largest
    clipper.close()
    return of_norms, of_sums / largest
