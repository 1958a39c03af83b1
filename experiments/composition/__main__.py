"""Peaks of live memory of each model in each of its memory modes, with and without ghost clipping.

    python -m experiments.composition

`MemoryRecorder` counts the bytes of one forward and backward on fake tensors, which take no memory for models of any
size. Language models read 8 texts of 100 tokens and never store their logits; the U-Net reads two volumes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from experiments.record import insert, keep, without_options
from memsave.ghost import GhostClipper
from memsave.models import ReversibleUNet3d
from memsave.models.language import causal_lm_losses, fuse_gelu
from memsave.models.memory import MEMORY_MODES
from memsave.profiler import MemoryRecorder, format_bytes
from memsave.tasks.segmentation.losses import region_losses
from memsave.training.measure import set_memory

BATCH, TOKENS, VOLUMES, SIDE = 8, 100, 2, 64
DEPTHS = (6, 12, 24, 48)
RANK = 8  # of LoRA
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Subject:
    """A model with its loss and memory modes."""

    make: Callable[[], nn.Module]
    losses: Callable[[nn.Module], Tensor]
    modes: tuple[str, ...] = MEMORY_MODES


def text_losses(model: nn.Module) -> Tensor:
    """(BATCH,) losses of texts in which every token is a target."""
    ids = torch.zeros(BATCH, TOKENS, dtype=torch.long)
    return causal_lm_losses(model, ids, ids, attention_mask=torch.ones_like(ids))


def volume_losses(model: nn.Module) -> Tensor:
    """(VOLUMES,) losses."""
    target = torch.zeros(VOLUMES, 3, SIDE, SIDE, SIDE)
    return region_losses(model(torch.zeros(VOLUMES, 4, SIDE, SIDE, SIDE)), target)


def gpt2() -> Any:
    """GPT-2 with 12 layers, 124 million parameters, and a tied head."""
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config())
    fuse_gelu(model)
    return model


def rev_gpt2(layers: int) -> nn.Module:
    """The reversible Transformer at the width of GPT-2."""
    from memsave.models.rev_gpt2 import RevGPT2, RevGPT2Config

    return RevGPT2(RevGPT2Config(num_hidden_layers=layers))


def with_lora() -> nn.Module:
    """GPT-2 with LoRA in its attention; only the adapters are trained (Hu et al., ICLR 2022)."""
    import peft

    config = peft.LoraConfig(r=RANK, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    with unset_fake_temporarily() as mode:  # peft moves its parameters to a device, which fails for fake tensors
        model = peft.get_peft_model(gpt2(), config)
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            tensors.update({key: None if each is None else mode.from_tensor(each) for key, each in tensors.items()})
    return model


def with_bitfit() -> nn.Module:
    """GPT-2 with only its biases trained (Ben Zaken et al., ACL 2022)."""
    model = gpt2()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("bias"))
    return model


SUBJECTS = {
    "GPT-2": Subject(gpt2, text_losses, ("stored", "checkpoint")),
    "GPT-2, LoRA": Subject(with_lora, text_losses, ("stored", "checkpoint")),
    "GPT-2, BiTFiT": Subject(with_bitfit, text_losses, ("stored", "checkpoint")),
    "rev_gpt2, 12 layers": Subject(partial(rev_gpt2, 12), text_losses),
    "rev_unet": Subject(lambda: ReversibleUNet3d(channels=(16, 32, 64)), volume_losses),
    "rev_unet, engine=hooks": Subject(
        lambda: ReversibleUNet3d(channels=(16, 32, 64), engine="hooks"), volume_losses, ("reversible",)
    ),
}


def peak(subject: Subject, mode: str, *, private: bool) -> dict[str, Any]:
    """Bytes at the peak of forward and backward, and the maximum without parameters and gradients."""
    with FakeTensorMode():
        model = subject.make().train()
        set_memory(model, mode)
        clipper = GhostClipper(model, max_grad_norm=1.0) if private else None
        with MemoryRecorder(model) as recorder:
            losses = subject.losses(model)
            clipper.backward(losses) if clipper else losses.sum().backward()
            del losses
    report = recorder.report()
    states = report.timeline.by_category()
    others = [sizes for category, sizes in states.items() if category not in ("parameter", "gradient")]
    passes = {} if clipper is None else {"passes": clipper.chosen_passes}
    return {
        "peak_bytes": report.peak_bytes,
        "parameter_bytes": max(states["parameter"]),
        "most_beside_bytes": max(map(sum, zip(*others, strict=True))),
        **passes,
    }


def measure(subject: Subject) -> dict[str, dict[str, dict[str, Any]]]:
    """The peaks by memory mode and by training (plain or ghost)."""
    both = {"plain": False, "ghost": True}
    found = {
        mode: {training: peak(subject, mode, private=each) for training, each in both.items()} for mode in subject.modes
    }
    for mode, peaks in found.items():
        print(mode, {training: format_bytes(each["peak_bytes"]) for training, each in peaks.items()}, flush=True)
    return found


def main() -> None:
    models, depths = {}, {}
    for name, subject in SUBJECTS.items():
        print(name)
        models[name] = measure(subject)
    for layers in DEPTHS:
        print(f"{layers} layers")
        depths[str(layers)] = measure(Subject(partial(rev_gpt2, layers), text_losses))
    insert(HERE / "README.md", name="models", text=model_table(models))
    insert(HERE / "README.md", name="depths", text=depth_table(depths))
    keep(
        HERE / "results.json",
        command="python -m experiments.composition",
        results={"models": models, "rev_gpt2 by layers": depths},
    )


def model_table(results: dict[str, Any]) -> str:
    rows = [
        "| model | memory= | plain: peak | beside parameters and gradients | ghost: peak | beside | passes |",
        "|" + "---|" * 7,
    ]
    for name, modes in results.items():
        for mode, peaks in modes.items():
            sizes = (format_bytes(each[key]) for each in peaks.values() for key in ("peak_bytes", "most_beside_bytes"))
            rows.append(f"| {name} | {mode} | {' | '.join(sizes)} | {peaks['ghost']['passes']} |")
    return "\n".join(rows)


def depth_table(results: dict[str, Any]) -> str:
    columns = [(mode, training) for mode in MEMORY_MODES for training in ("plain", "ghost")]
    rows = [
        "| layers | parameters | " + " | ".join(f"{mode}, {training}" for mode, training in columns) + " |",
        "|---" * (len(columns) + 2) + "|",
    ]
    for layers, modes in results.items():
        parameters = modes["stored"]["plain"]["parameter_bytes"]
        cells = (format_bytes(modes[mode][training]["most_beside_bytes"]) for mode, training in columns)
        rows.append(f"| {layers} | {format_bytes(parameters)} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


if __name__ == "__main__":
    without_options(__doc__)
    main()
