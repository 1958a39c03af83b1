"""The groups that every run has, whatever its task: memory, privacy, trainer, profiler; and `Config`, the whole run.

Hydra composes `conf/`. Each option's YAML starts from one of the dataclasses below, or from one that a data set or a
model registers (`memsave.config.registry`), so that a key is known, typed, constrained and documented in one place.

A `Config` is immutable once it is composed and checked (`memsave.config.compose`). What follows from it, such as the
steps of an epoch or the size that fits into a budget, is computed before anything is built from it, and stands in a new
config: `config.changed({"trainer.steps": 300})`.
"""

import math
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field, fields
from typing import Any, Self

from omegaconf import MISSING

from memsave.config.errors import ConfigError
from memsave.config.fields import check_fields, option, sections
from memsave.config.registry import register

MODES = ("stored", "checkpoint", "reversible")
"""The memory modes that `memory=auto` chooses from."""


@dataclass
class Section:
    """The base of all configs: a dataclass that can be made immutable."""

    def __setattr__(self, name: str, value: object) -> None:
        if vars(self).get("_frozen"):
            raise AttributeError(f"the config is immutable; make another one by config.changed({{...: {value!r}}})")
        super().__setattr__(name, value)

    def freeze(self) -> Self:
        """Make the config and all nested ones immutable; returns it."""
        self._mark(frozen=True)
        return self

    def changed(self, changes: Mapping[str, Any]) -> Self:
        """A copy with other values, by dotted key, as in {"trainer.steps": 3}; frozen if this one is.

        Raises ConfigError if a value violates the constraint of its field.
        """
        frozen, copy = bool(vars(self).get("_frozen")), deepcopy(self)
        copy._mark(frozen=False)
        for key, value in changes.items():
            path, _, name = key.rpartition(".")
            section: Any = copy
            for part in path.split(".") if path else ():
                section = getattr(section, part)
            if name not in {each.name for each in fields(section)}:
                raise AttributeError(f"{key} is no key of the config")
            setattr(section, name, deepcopy(value))
        check_fields(copy)
        copy._mark(frozen=frozen)
        return copy

    def _mark(self, *, frozen: bool) -> None:
        for _, section in sections(self):
            object.__setattr__(section, "_frozen", frozen)


@dataclass
class DataConfig(Section):
    """The base of every data set's config."""

    kind: str = MISSING
    root: str | None = None
    """Folder of the files, where there are any."""
    workers: int = option(0, least=0)
    """Threads that load batches ahead of training; 0 loads between the steps."""


@dataclass
class ModelConfig(Section):
    """The base of every model's config."""

    kind: str = MISSING


@register("memory", "memory")
@dataclass
class MemoryConfig(Section):
    """What is kept between forward and backward; it changes neither the function nor its random numbers."""

    mode: str = option(choices=(*MODES, "auto"))
    """stored | checkpoint | reversible | auto: the fastest that fits into the budget, level by level."""
    levels: list[str] | None = option(None, choices=MODES)
    """What `auto` finds, and takes as it is when it is given: a mode for each level of a U-Net, finest first."""
    anchor_every: int | None = option(None, least=1)
    """Reversible: the blocks from one kept input to the next, against drift in deep levels; null keeps none."""
    engine: str = option("auto", choices=("auto", "fused", "hooks"))
    """Reversible: fused (blocks recompute themselves in chunks) | hooks (any block, to the bit) | auto (both)."""
    chunks: int = option(4, least=1)
    """Of the fused engine: the more, the less memory and, from some number on, the more time."""

    def validate(self) -> None:
        """Raise ConfigError for keys that another mode reads."""
        recomputes = self.mode in ("reversible", "auto")
        if self.anchor_every is not None and not recomputes:
            raise ConfigError(f"memory.anchor_every is for memory=reversible; leave it out of memory={self.mode}")
        if self.engine != "auto" and not recomputes:
            raise ConfigError(f"memory.engine is for memory=reversible; leave it out of memory={self.mode}")
        if self.levels is not None and self.mode != "auto":
            raise ConfigError(f"memory.levels is for memory=auto; leave it out of memory={self.mode}")


@register("privacy", "none")
@dataclass
class PrivacyConfig(Section):
    """How gradients are combined: here, as they are."""

    kind: str = "none"

    @property
    def option(self) -> str:
        """What the group's option is called: none | ghost | direct."""
        return "direct" if getattr(self, "passes", None) == "direct" else self.kind


@register("privacy", "ghost")
@dataclass
class GhostPrivacy(PrivacyConfig):
    """Clipped by example without forming its gradient, and noised once a logical batch."""

    kind: str = "ghost"
    target_epsilon: float = option(8.0, least=0.001)
    """What the whole run may spend; the noise follows from it."""
    target_delta: float | None = None
    """null: n^-1.1 for n training examples."""
    noise_multiplier: float | None = option(None, least=0)
    """Given, it takes the place of target_epsilon."""
    max_grad_norm: float = option(0.1, least=1e-12)
    """C."""
    clipping: str = option("flat", choices=("flat", "automatic", "per_layer"))
    """flat | automatic | per_layer (each layer to its share of C, its sum formed on the way)."""
    passes: int | str = option("auto", choices=("auto", 1, 2, "direct"))
    """auto | 1 | 2 | direct (one example per micro-batch, any layers)."""
    memory_budget: str = option("0B", size=True)
    """What may be kept to save time, such as 256MiB: logits of a chunked head, gradients in place of Gram matrices."""
    accountant: str = option("prv", choices=("prv", "rdp"))
    """prv | rdp."""
    secure_noise: bool = False
    """Four draws a number, against attacks on floating-point noise."""
    verify: bool = True
    """Compare the first batch with one backward per example before training."""
    seed: int | None = option(None, least=0)
    """For tests: a run with a known seed is not private. null seeds from the operating system."""

    def validate(self) -> None:
        """Raise ConfigError for a clipping that the number of passes rules out."""
        if self.clipping == "per_layer" and self.passes == 2:
            raise ConfigError("privacy.clipping=per_layer forms its sums in one pass; give privacy.passes=auto")


@dataclass
class OptimizerConfig(Section):
    """`torch.optim.AdamW` or `torch.optim.SGD`."""

    name: str = option("adamw", choices=("adamw", "sgd"))
    """adamw | sgd."""
    lr: float = option(3e-3, least=0)
    weight_decay: float = option(1e-5, least=0)
    momentum: float = option(0.9, least=0, most=0.999999)
    """SGD's momentum; AdamW's first beta."""
    schedule: str = option("cosine", choices=("cosine", "constant"))
    """cosine (to zero at the last step) | constant."""
    warmup_steps: int = option(10, least=0)


@register("trainer", "trainer")
@dataclass
class TrainerConfig(Section):
    """The one loop."""

    steps: int = option(150, least=1)
    """Optimizer steps; each sees one logical batch."""
    epochs: float | None = option(None, least=0.001)
    """Given, it takes the place of steps: so many times the training examples, in logical batches."""
    batch_size: int = option(2, least=1)
    """Examples of a logical batch."""
    micro_batch_size: int | None = option(None, least=1)
    """Examples that pass through the model at once (null: the whole batch); changes memory and time alone."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    seed: int = option(0, least=0)
    device: str = "auto"
    """auto (a GPU where there is one) | cpu | cuda | cuda:1 ..."""
    precision: str = option("float32", choices=("float32", "bfloat16", "float16"))
    """float32 | bfloat16 | float16 on CUDA, with loss scaling (autocast; the reversible stream stays in float32)."""
    ema: float = option(0.0, least=0, most=0.999999)
    """Decay of an average of the weights, such as 0.999, which is evaluated and released; 0 keeps none."""
    patience: int = option(0, least=0)
    """Evaluations without a better score after which training stops; 0 never stops early."""
    tensorboard: bool = False
    """Write events for TensorBoard, too, into tensorboard/ (needs the extra tensorboard)."""
    evaluate_every: int = option(0, least=0)
    """Steps between evaluations on what is held out; 0 evaluates at the end."""
    evaluate_first: bool = False
    """Evaluate before the first step, too."""
    checkpoint_every: int = option(50, least=1)
    """Steps between checkpoints; the last step always leaves one."""
    resume: str | None = None
    """A checkpoint/ folder to continue from."""

    def validate(self) -> None:
        """Raise ConfigError for early stopping without evaluations."""
        if self.patience and not self.evaluate_every:
            raise ConfigError("trainer.patience counts evaluations; give trainer.evaluate_every, too")

    def steps_for(self, size: int) -> int:
        """The optimizer steps of a run on `size` training examples: `epochs` where they are given, else `steps`."""
        if self.epochs is None:
            return self.steps
        return max(1, math.ceil(self.epochs * size / self.batch_size))


@register("profiler", "profiler")
@dataclass
class ProfilerConfig(Section):
    """How the run's memory is measured."""

    record_steps: int = option(2, least=1)
    """Training steps, from the first on, that the recorder watches; the others run at full speed."""
    compare: list[str] = option([], choices=MODES)
    """Memory modes that are measured beside the run's own, on its first batch and its own model."""
    compare_seconds: float = option(60.0, least=0)
    """Time for `compare` before training; modes for which it is too short are left out, and named."""
    plan_seconds: float = option(120.0, least=0)
    """CPU time after which a plan with `vary` tries no size above those that fit, for each way to train."""
    process: bool = False
    """Measure the most that the process takes while it trains, malloc returning what is freed at once (Linux)."""


@dataclass
class Config(Section):
    """A whole run."""

    task: str = MISSING
    """segmentation | table_to_text."""
    mode: str = option("train", choices=("train", "plan"))
    """train | plan: find out on fake tensors what fits into the budget, and train nothing."""
    data: DataConfig = MISSING
    model: ModelConfig = MISSING
    memory: MemoryConfig = MISSING
    privacy: PrivacyConfig = MISSING
    trainer: TrainerConfig = MISSING
    profiler: ProfilerConfig = MISSING
    budget: str | None = option(None, choices=("auto",), size=True)
    """Memory that no training step may exceed, such as 16GiB or 80GB, or auto: what is free on this machine.

    In training every step is then recorded, and live tensors count. A plan counts what the allocator takes.
    """
    reserve: str = option("0B", size=True)
    """Of the budget, what a plan leaves free, for a GPU's context and whatever else is no tensor."""
    vary: str | None = None
    """volume | depth | channels | batch | length: a plan finds the largest that fits, and training then takes it."""
