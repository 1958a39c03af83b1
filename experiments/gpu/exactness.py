"""Exactness on the GPU: both backends against their plain twins, by precision."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from experiments.gpu.measure import DEVICE, free
from memsave.ghost import GhostClipper
from memsave.models import ReversibleUNet3d
from memsave.models.language import causal_lm_losses

PRECISIONS = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float32, TF32": torch.float32,
    "bfloat16 autocast": torch.float32,
}
ENGINES = ("hooks", "fused")
BATCH, PLACES = 6, 48


def precision(name: str) -> AbstractContextManager:
    """The context of a precision, which also sets whether matrix products may round to TF32."""
    allowed = name == "float32, TF32"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed
    return torch.autocast(DEVICE.type, torch.bfloat16) if name == "bfloat16 autocast" else nullcontext()


def exactness() -> dict[str, dict[str, Any]]:
    """By precision: the largest relative errors of gradients, norms and clipped sums."""
    rows: dict[str, dict[str, Any]] = {}
    for name, dtype in PRECISIONS.items():
        rows[name] = {**reversible(name, dtype), **ghost(name, dtype)}
        print(f"  {name}: {rows[name]}", flush=True)
    precision("float32")
    free()
    return rows


def reversible(name: str, dtype: torch.dtype) -> dict[str, float]:
    """The error of the gradient of all parameters, by engine, against the same network with stored activations."""
    torch.manual_seed(0)
    model = ReversibleUNet3d(channels=(16, 32), blocks=2, memory="stored").to(DEVICE, dtype)
    x = torch.randn(2, 4, 24, 24, 24, device=DEVICE, dtype=dtype)

    def gradient() -> Tensor:
        model.zero_grad()
        with precision(name):
            loss = model(x).float().square().mean() if dtype != torch.float64 else model(x).square().mean()
        loss.backward()
        return torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])

    stored, found = gradient(), {}
    for engine in ENGINES:
        set_engine(model, engine)
        found[f"reversible, {engine}"] = off(gradient(), stored)
    return found


def set_engine(model: ReversibleUNet3d, engine: str) -> None:
    """Recompute activations, with this engine."""
    model.memory = "reversible"
    for level in (*model.encoder, *model.decoder):
        level.engine = engine


def ghost(name: str, dtype: torch.dtype) -> dict[str, float]:
    """The errors of norms and clipped sum of a tied GPT-2 with the chunked head, against each example alone."""
    model, ids, mask = language_model(dtype)
    labels = ids.masked_fill(mask == 0, -100)
    parameters = list(model.parameters())
    norms, total, bound = [], None, 0.0
    for row in range(BATCH):
        model.zero_grad()
        size = int(mask[row].sum())
        with precision(name):
            loss = causal_lm_losses(model, ids[row : row + 1, :size], labels[row : row + 1, :size], head="logits")
        loss.sum().backward()
        own = torch.cat([p.grad.flatten().double() for p in parameters if p.grad is not None])
        norms.append(own.norm())
        bound = bound or float(own.norm())
        clipped = own * min(1.0, bound / float(own.norm()))
        total = clipped if total is None else total + clipped
    assert total is not None
    model.zero_grad()
    clipper = GhostClipper(model, max_grad_norm=bound)
    with precision(name):
        losses = causal_lm_losses(model, ids, labels, attention_mask=mask)
    ours = clipper.backward(losses).double()
    clipper.close()
    summed = torch.cat([p.grad.flatten().double() for p in parameters if p.grad is not None])
    alone = torch.stack(norms)
    return {"ghost norms": float(((ours - alone).abs() / alone).max()), "ghost clipped sum": off(summed, total)}


def language_model(dtype: torch.dtype) -> tuple[nn.Module, Tensor, Tensor]:
    """(small GPT-2, token ids, mask of examples of different lengths)."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"n_layer": 3, "n_head": 4, "n_embd": 128, "vocab_size": 5000, "n_positions": 64}
    config = GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    model = GPT2LMHeadModel(config).to(DEVICE, dtype).train()
    ids = torch.randint(5000, (BATCH, PLACES), device=DEVICE)
    lengths = torch.linspace(PLACES // 4, PLACES, BATCH, device=DEVICE).long()
    return model, ids, (torch.arange(PLACES, device=DEVICE) < lengths[:, None]).long()


def off(found: Tensor, expected: Tensor) -> float:
    """The relative error in the Euclidean norm."""
    return float((found - expected).norm() / expected.norm())
