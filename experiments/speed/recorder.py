"""What it costs to be recorded: training steps with and without `MemoryRecorder`, in turn.

python -m experiments.speed.recorder
"""

import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import nn

from experiments.record import insert, keep, machine, median, without_options
from memsave.models import ReversibleUNet3d
from memsave.models.language import causal_lm_losses
from memsave.profiler import MemoryRecorder

HERE = Path(__file__).parent
ROUNDS = 7

Program = tuple[nn.Module, torch.optim.Optimizer, Callable[[], torch.Tensor]]


def unet(memory: str) -> Program:
    """The network of `experiment=brats_rev` on a volume of its crops' size."""
    torch.manual_seed(0)
    model = ReversibleUNet3d(channels=(16, 32, 64), memory=memory)
    volume = torch.randn(1, 4, 48, 48, 48)
    return model, optimizer_of(model), lambda: model(volume).square().mean()


def gpt2() -> Program:
    """GPT-2 with 4 layers, 2 x 100 tokens."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=4, use_cache=False)).train()
    ids = torch.randint(50000, (2, 100))
    mask = torch.ones_like(ids)
    return model, optimizer_of(model), lambda: causal_lm_losses(model, ids, ids, attention_mask=mask).mean()


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=False)


PROGRAMS: dict[str, Callable[[], Program]] = {
    "U-Net, stored": lambda: unet("stored"),
    "U-Net, reversible": lambda: unet("reversible"),
    "GPT-2, 4 layers": gpt2,
}


def measure(program: Program) -> dict[str, float]:
    """Seconds of a step alone and of a recorded one, the ratio, and the changes that were recorded."""
    model, optimizer, loss = program
    seconds: dict[bool, list[float]] = {False: [], True: []}
    events = 0
    for _ in range(ROUNDS + 1):
        for recorded in seconds:
            recorder = MemoryRecorder(model, optimizer=optimizer)
            with recorder if recorded else nullcontext():
                started = time.perf_counter()
                loss().backward()
                optimizer.step()
                optimizer.zero_grad()
                seconds[recorded].append(time.perf_counter() - started)
            events = len(recorder.report().timeline) - 1 if recorded else events
    plain, watched = seconds[False][1:], seconds[True][1:]  # without the warm-up
    ratio = median([a / b for a, b in zip(watched, plain, strict=True)])
    return {"plain": median(plain), "recorded": median(watched), "ratio": ratio, "events": events}


def main() -> None:
    results = {}
    for name, make in PROGRAMS.items():
        results[name] = measure(make())
        print(name, results[name], flush=True)
    lines = [f"{machine()}:\n", "| step | alone | recorded | ratio | changes recorded |", "|---|---|---|---|---|"]
    lines += [
        f"| {name} | {row['plain']:.3f} s | {row['recorded']:.3f} s | {row['ratio']:.2f}x | {row['events']} |"
        for name, row in results.items()
    ]
    insert(HERE / "README.md", name="recorder", text="\n".join(lines))
    keep(HERE / "recorder.json", command="python -m experiments.speed.recorder", results=results)


if __name__ == "__main__":
    without_options(__doc__)
    main()
