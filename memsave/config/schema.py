"""The groups that every run has (memory, privacy, audit, trainer, profiler), and `Config`, the config of a whole run.

Hydra composes `conf/`. The YAML file of an option starts from one of the dataclasses below, or from the dataclass that
a data set or a model registers (`memsave.config.registry`): each key has its type, constraint and description in one
place.

A `Config` is immutable after it is composed and checked (`memsave.config.compose`). Derived values, such as the steps
of an epoch or the size that fits into a budget, are computed before anything is built, and stored in a new config:
`config.changed({"trainer.steps": 300})`.
"""

import math
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Self

from omegaconf import MISSING
from torch import nn

from memsave.config.errors import ConfigError
from memsave.config.fields import check_fields, option, sections
from memsave.config.registry import register
from memsave.profiler import parse_bytes

MODES = ("stored", "checkpoint", "reversible")
"""The memory modes that `memory=auto` chooses from."""
OFFLOADED = ("activations", "optimizer")
"""What can be kept in host memory."""


@dataclass
class Section:
    """The base of all configs: a dataclass that can be made immutable."""

    def __setattr__(self, name: str, value: object) -> None:
        if vars(self).get("_frozen"):
            raise AttributeError(f"the config is immutable; make a changed copy by config.changed({{...: {value!r}}})")
        super().__setattr__(name, value)

    def freeze(self) -> Self:
        """Make the config and all nested configs immutable; returns the config."""
        self._mark(frozen=True)
        return self

    def changed(self, changes: Mapping[str, Any]) -> Self:
        """A copy with other values, by dotted key, as in {"trainer.steps": 3}; frozen if this config is frozen.

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
                raise AttributeError(f"{key} is not a key of the config")
            setattr(section, name, deepcopy(value))
        check_fields(copy)
        copy._mark(frozen=frozen)
        return copy

    def _mark(self, *, frozen: bool) -> None:
        for _, section in sections(self):
            object.__setattr__(section, "_frozen", frozen)


@dataclass
class TaskConfig(Section):
    """The base of every task's config."""

    kind: str = MISSING

    def definition(self, config: "Config") -> Any:
        """The `memsave.tasks.TaskDefinition` of this task for a whole config."""
        raise NotImplementedError(f"{type(self).__name__} has no definition")


@dataclass
class DataConfig(Section):
    """The base of every data set's config."""

    kind: str = MISSING
    root: str | None = None
    """Folder of the data files, for data sets that have files."""
    workers: int = option(0, least=0)
    """Threads that load batches in advance; with 0, batches are loaded between the steps."""


@dataclass
class ModelConfig(Section):
    """The base of every model's config."""

    kind: str = MISSING


@register("adapter", "none")
@dataclass
class AdapterConfig(Section):
    """All parameters of the model train. The base of every adapter's config."""

    model_class: ClassVar[type[ModelConfig]] = ModelConfig
    """The base class of the model configs that the adapter fits."""
    memory_modes: ClassVar[tuple[str, ...]] = MODES
    """The memory modes that work with the adapter."""
    ghost_modes: ClassVar[tuple[str, ...]] = MODES
    """Those of them that work with privacy=ghost."""
    kind: str = "none"

    @property
    def added_tokens(self) -> int:
        """Virtual tokens that the adapter puts before each text; they take positions of the model."""
        return 0

    def apply(self, model: nn.Module) -> nn.Module:
        """The model that trains, for example with frozen parameters, or with modules replaced or added.

        Called once, before the optimizer and the clipper are made. Must also run under FakeTensorMode. Raises
        ConfigError if the adapter does not fit the model.
        """
        return model

    def released(self, model: nn.Module) -> nn.Module:
        """The model that `model/` holds, given the trained model: the same one, or one with the adapter merged."""
        return model


@register("memory", "memory")
@dataclass
class MemoryConfig(Section):
    """What is stored between forward and backward. It changes neither the function nor its random numbers."""

    mode: str = option(choices=(*MODES, "auto"))
    """How activations are kept; auto chooses the fastest plan that fits into the budget, per level of a U-Net."""
    levels: list[str] | None = option(None, choices=MODES)
    """memory=auto: a mode for each level of a U-Net, finest first; null lets auto find them."""
    anchor_every: int | None = option(None, least=1)
    """memory=reversible: store the input of every n-th block to bound drift in deep levels; null stores none."""
    engine: str = option("auto", choices=("auto", "fused", "hooks"))
    """memory=reversible: fused recomputes blocks in chunks; hooks is bitwise exact for any block; auto uses both."""
    chunks: int = option(4, least=1)
    """Chunks of the fused engine; more chunks take less memory, and many chunks take more time."""
    offload: list[str] = option([], choices=OFFLOADED)
    """What is kept in host memory: what any mode stores for backward, and the optimizer's state between steps."""
    offload_folder: str | None = None
    """On the CPU, the folder of the files that are then mapped into memory; null is the folder of the run."""

    @property
    def described(self) -> str:
        """The mode, and what is kept in host memory."""
        return self.mode + (f" with {' and '.join(self.offload)} in host memory" if self.offload else "")

    def validate(self) -> None:
        """Raise ConfigError for keys that this mode does not read."""
        recomputes = self.mode in ("reversible", "auto")
        if self.anchor_every is not None and not recomputes:
            raise ConfigError(f"memory.anchor_every is for memory=reversible; leave it out of memory={self.mode}")
        if self.engine != "auto" and not recomputes:
            raise ConfigError(f"memory.engine is for memory=reversible; leave it out of memory={self.mode}")
        if self.levels is not None and self.mode != "auto":
            raise ConfigError(f"memory.levels is for memory=auto; leave it out of memory={self.mode}")
        if self.offload_folder is not None and not (self.offload or self.mode == "auto"):
            raise ConfigError("memory.offload_folder is for memory.offload; also give memory.offload=[activations]")


@register("privacy", "none")
@dataclass
class PrivacyConfig(Section):
    """Gradients are summed without clipping and noise."""

    kind: str = "none"

    @property
    def option(self) -> str:
        """The name of the option: none, ghost or direct."""
        return "direct" if getattr(self, "passes", None) == "direct" else self.kind


@register("privacy", "ghost")
@dataclass
class GhostPrivacy(PrivacyConfig):
    """Each example is clipped without forming its gradient, and noise is added once per logical batch."""

    kind: str = "ghost"
    target_epsilon: float = option(8.0, least=0.001)
    """Epsilon of the whole run, from which the noise multiplier is computed."""
    target_delta: float | None = None
    """Delta of the whole run; null means n^-1.1 for n training examples."""
    noise_multiplier: float | None = option(None, least=0)
    """Standard deviation of the noise divided by max_grad_norm; replaces target_epsilon."""
    max_grad_norm: float = option(0.1, least=1e-12)
    """C, the clipping bound for the norm of one example's gradient."""
    clipping: str = option("flat", choices=("flat", "automatic", "per_layer"))
    """flat: min(1, C / norm); automatic: C / (norm + 0.01); per_layer: C / sqrt(K) per layer, in one backward."""
    passes: int | str = option("auto", choices=("auto", 1, 2, "direct"))
    """Backward passes per micro-batch; direct clips one example at a time and works for any layer."""
    memory_budget: str = option("0B", choices=("auto",), size=True)
    """Extra memory that saves time, such as 256MiB: for logits of a chunked head, or gradients for Gram matrices.

    auto plans a step and takes what it leaves of the budget, or of four fifths of the free memory.
    """
    accountant: str = option("pld", choices=("pld", "prv", "rdp"))
    """pld is tight and rounds upwards (dp-accounting); prv is nearly exact (Gopi et al., 2021), rdp looser."""
    sampler: str = option(
        "poisson", choices=("poisson", "truncated_poisson", "balls_in_bins", "cyclic", "cyclic_poisson")
    )
    """How batches are drawn; cyclic takes the same examples in every epoch, for correlated noise."""
    largest_batch: int | None = option(None, least=1)
    """Largest batch of sampler=truncated_poisson."""
    noise: str = option("independent", choices=("independent", "banded", "regenerated"))
    """banded and regenerated noise cancels itself over the steps; see docs/privacy.md for when it helps."""
    bands: int = option(4, least=2)
    """Steps over which correlated noise is spread: banded keeps bands - 1 copies, regenerated draws bands times."""
    secure_noise: bool = False
    """Draw four samples per number, against attacks on floating-point noise."""
    verify: bool = True
    """Before training, compare the clipped gradient of the first batch with one backward per example."""
    seed: int | None = option(None, least=0)
    """Only for tests: a run with a known seed is not private; null takes a seed from the operating system."""

    @property
    def kept_bytes(self) -> int:
        """`memory_budget` in bytes; 0 for auto, before a plan has chosen it (`memsave.planning.kept`)."""
        return 0 if self.memory_budget == "auto" else parse_bytes(self.memory_budget)

    def validate(self) -> None:
        """Raise ConfigError for per-layer clipping in two passes, and for a memory budget that nothing uses."""
        if self.passes == "direct" and self.memory_budget == "auto":
            raise ConfigError(
                "privacy.memory_budget=auto is for ghost norms, and privacy.passes=direct keeps nothing; leave it out"
            )
        if self.clipping == "per_layer" and self.passes == 2:
            raise ConfigError("privacy.clipping=per_layer forms its sums in one pass; give privacy.passes=auto")


@register("audit", "none")
@dataclass
class AuditConfig(Section):
    """No audit."""

    kind: str = "none"


@register("audit", "canaries")
@dataclass
class CanariesAudit(AuditConfig):
    """Canaries in the training data, each included with probability 1/2, bound epsilon from below."""

    kind: str = "canaries"
    canaries: int = option(1000, least=16)
    """Number of canaries of each kind; more of them show larger epsilons."""
    canary: str = option("gradient", choices=("gradient", "input", "both"))
    """gradient: vectors of norm C, added before the noise; input: records that the model learns."""
    confidence: float = option(0.95, least=0.5, most=0.9999)
    """The lower bound holds with this probability."""
    seed: int | None = option(None, least=0)
    """Only for tests: the seed of the inclusion; null takes it from the operating system."""


@dataclass
class OptimizerConfig(Section):
    """`torch.optim.AdamW` or `torch.optim.SGD`."""

    name: str = option("adamw", choices=("adamw", "sgd"))
    """The optimizer."""
    lr: float = option(3e-3, least=0)
    """Learning rate after the warm-up."""
    weight_decay: float = option(1e-5, least=0)
    """Weight decay; norms and biases have none."""
    momentum: float = option(0.9, least=0, most=0.999999)
    """Momentum of SGD, or first beta of AdamW."""
    schedule: str = option("cosine", choices=("cosine", "linear", "constant"))
    """Learning rate after the warm-up; cosine and linear reach zero after the last step."""
    warmup_steps: int = option(10, least=0)
    """Steps of linear warm-up."""


@register("trainer", "trainer")
@dataclass
class TrainerConfig(Section):
    """The training loop."""

    steps: int = option(150, least=1)
    """Optimizer steps, one per logical batch."""
    epochs: float | None = option(None, least=0.001)
    """Passes over the training examples; replaces steps."""
    batch_size: int = option(2, least=1)
    """Examples per logical batch."""
    micro_batch_size: int | None = option(None, least=1)
    """Examples per forward and backward; it changes only memory and time. null means the whole batch."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    seed: int = option(0, least=0)
    """Seed of the initial weights, of dropout and of the order of the examples."""
    processes: int | None = option(None, least=1)
    """Processes that the run starts, each with a share of every batch; null under torchrun; a plan is for them."""
    parallel: str = option("auto", choices=("auto", "ddp", "fsdp"))
    """With several processes, ddp keeps the whole model in each, and fsdp a part of it; auto means ddp."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda, or cuda:NUMBER."""
    precision: str = option("float32", choices=("float32", "bfloat16", "float16"))
    """Type of autocast; the reversible stream stays in float32. float16 needs CUDA and scales the loss."""
    tf32: bool = False
    """CUDA: multiply float32 numbers with 10 bits of their fractions, which is faster; norms are then less exact."""
    compile: bool = False
    """Compile the blocks of the model by torch.compile, which takes minutes at the start; not for privacy=ghost."""
    ema: float = option(0.0, least=0, most=0.999999)
    """Decay of an average of the weights, such as 0.999, which is evaluated and released; 0 for no average."""
    patience: int = option(0, least=0)
    """Stop after this number of evaluations without a better score; 0 never stops early."""
    tensorboard: bool = False
    """Also write TensorBoard events to tensorboard/ (needs the extra tensorboard)."""
    evaluate_every: int = option(0, least=0)
    """Steps between evaluations on the held-out data; 0 evaluates only at the end."""
    evaluate_first: bool = False
    """Also evaluate before the first step."""
    checkpoint_every: int = option(50, least=1)
    """Steps between checkpoints; the last step always writes one."""
    resume: str | None = None
    """The folder of a run, or its checkpoint/, to continue from."""

    def validate(self) -> None:
        """Raise ConfigError for early stopping without evaluations during training."""
        if self.patience and not self.evaluate_every:
            raise ConfigError("trainer.patience counts evaluations; also give trainer.evaluate_every")

    def steps_for(self, size: int) -> int:
        """The optimizer steps of a run on `size` training examples, from `epochs` if given, otherwise from `steps`."""
        if self.epochs is None:
            return self.steps
        return max(1, math.ceil(self.epochs * size / self.batch_size))


@register("profiler", "profiler")
@dataclass
class ProfilerConfig(Section):
    """Measurement of memory."""

    record_steps: int = option(2, least=1)
    """Number of training steps to record, from the first one; the other steps run at full speed."""
    compare: list[str] = option([], choices=MODES)
    """Memory modes to measure on the first batch of the run, before training."""
    compare_seconds: float = option(60.0, least=0)
    """Time limit of `compare`; modes that would exceed it are not measured, and a message names them."""
    plan_seconds: float = option(120.0, least=0)
    """CPU time per strategy after which a plan with `vary` tries no larger size."""
    process: bool = False
    """Measure the peak memory of the process during training (Linux); malloc then returns freed memory at once."""


@dataclass
class Config(Section):
    """The config of a whole run."""

    mode: str = option("train", choices=("train", "plan"))
    """plan predicts on fake tensors what fits into the budget, and trains nothing."""
    task: TaskConfig = MISSING
    data: DataConfig = MISSING
    model: ModelConfig = MISSING
    adapter: AdapterConfig = MISSING
    memory: MemoryConfig = MISSING
    privacy: PrivacyConfig = MISSING
    audit: AuditConfig = MISSING
    trainer: TrainerConfig = MISSING
    profiler: ProfilerConfig = MISSING
    budget: str | None = option(None, choices=("auto",), size=True)
    """Memory that no training step may exceed; auto means the free memory of this machine.

    Training records every step and compares its live tensors with the budget. A plan compares the predicted allocation.
    """
    reserve: str = option("0B", size=True)
    """Part of the budget that a plan leaves free for memory outside of tensors, such as the context of a GPU."""
    vary: str | None = None
    """The size to maximise within the budget; with mode=train the run then trains at that size.

    A U-Net has volume, depth, channels and batch; a language model has length, depth, channels and batch.
    """

    @property
    def adapter_modes(self) -> list[str]:
        """The memory modes that work with the adapter and the privacy of this run."""
        adapter, is_ghost = self.adapter, self.privacy.option == "ghost"
        return [mode for mode in adapter.memory_modes if not is_ghost or mode in adapter.ghost_modes]
