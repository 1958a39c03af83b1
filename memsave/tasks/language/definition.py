"""`LanguageDefinition`: what the definitions of all language tasks have in common."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any, ClassVar, cast

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from memsave.config import Config, ConfigError, option
from memsave.config.schema import DataConfig, GhostPrivacy, TaskConfig
from memsave.data.text.config import TextData
from memsave.models.encoder_decoder import is_encoder_decoder
from memsave.progress import Progress
from memsave.tasks.definition import TaskDefinition, Variation, option_of
from memsave.tasks.language.adapters import PeftAdapter
from memsave.tasks.language.pretrained import LanguageModel, Purpose, usable_positions, with_random_weights
from memsave.training.measure import set_memory

LENGTH_STEP = 8
"""Multiple of tokens in which a plan varies the length of an example."""
SMALL_LENGTH, SMALL_LAYERS, SMALL_HEADS, SMALL_CHUNKS = 64, 2, 2, 2
"""Sizes of the calibration step."""
PAIR_WIDTHS = ("d_ff", "encoder_attention_heads", "decoder_attention_heads", "encoder_ffn_dim", "decoder_ffn_dim")
"""Attributes of encoder-decoders that grow with the width."""


@dataclass
class LanguageTaskConfig(TaskConfig):
    """What every language task has in common."""

    evaluate: int = option(500, least=1)
    """Number of held-out examples for the score of the task; the first ones are taken."""


class LanguageDefinition(TaskDefinition):
    """The base of the language tasks. A subclass sets `data_class` and implements the methods on data and losses."""

    data_class: ClassVar[type[DataConfig]] = TextData
    model_class = LanguageModel
    pip_extra = "lm"
    static_shapes = False  # few examples have the maximum length
    strategy_group = "privacy"
    smaller_input = "a smaller data.max_length"
    plans_micro_batch = True

    @property
    def data(self) -> TextData:
        """The config of the data."""
        return cast(TextData, self.config.data)

    @property
    def model(self) -> LanguageModel:
        """The config of the model."""
        return cast(LanguageModel, self.config.model)

    def validate(self) -> None:
        """Raise ConfigError for combinations that cannot run."""
        super().validate()
        memory, own = self.config.memory, option_of("model", self.model)
        if "reversible" in (memory.mode, *self.config.profiler.compare) and not self.model.reversible:
            raise ConfigError(
                f"model={own} has no reversible mode; give memory=stored or memory=checkpoint, or model=rev_gpt2"
            )
        if self.model.random and isinstance(self.config.adapter, PeftAdapter):
            raise ConfigError(
                f"model.random=true gives a model that no file holds, and adapter={self.config.adapter.kind} releases "
                f"no model; give adapter=none"
            )
        if memory.anchor_every is not None:
            raise ConfigError(f"memory.anchor_every is for model=rev_unet; leave it out of model={own}")
        if memory.engine != "auto":
            raise ConfigError(f"memory.engine is for model=rev_unet; leave it out of model={own}")
        if memory.levels is not None:
            raise ConfigError(f"memory.levels is {memory.levels}; give a mode for each level of a U-Net, finest first")
        if self.config.vary in ("depth", "channels") and self.config.mode == "train":
            raise ConfigError(f"vary={self.config.vary} gives a model without pretrained weights; give mode=plan")

    def purpose(self) -> Purpose:
        """What the model is for, which decides its head: writing text."""
        is_pair = getattr(self.model.architecture(), "is_encoder_decoder", False)
        return Purpose("encoder_decoder" if is_pair else "causal")

    def make_model(self, *, progress: Progress) -> tuple[nn.Module, Any]:
        """(the pretrained model, its tokenizer)."""
        model, tokenizer = self.model.load(self.purpose(), progress=progress)
        torch.manual_seed(self.config.trainer.seed)  # the first load of some models draws random numbers
        model = with_random_weights(model) if self.model.random else model
        set_memory(model, self.config.memory.mode)
        positions = usable_positions(model.config)
        added = self.config.adapter.added_tokens
        if positions is not None and self.data.max_length + added > positions:
            of_adapter = f", of which adapter.tokens takes {added}" if added else ""
            raise ConfigError(
                f"data.max_length is {self.data.max_length}, but the model has {positions} positions{of_adapter}; give "
                f"data.max_length={max(0, positions - added)} or less"
            )
        return model.train(), tokenizer

    def make_fake_model(self, *, architecture: Mapping[str, Any] | None = None) -> nn.Module:
        """The model with random weights."""
        model = self.model.make_random(self.purpose(), architecture=architecture)
        set_memory(model, self.config.memory.mode)
        return model.train()

    # Planning

    def compiled_blocks(self, model: nn.Module) -> list[nn.Module]:
        """The layers, as transformers marks them for checkpoints."""
        from transformers.modeling_layers import GradientCheckpointingLayer

        found: list[nn.Module] = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
        return found or super().compiled_blocks(model)

    def variations(self) -> dict[str, Callable[[], Variation]]:
        """Length, depth, channels and batch."""
        own = {"length": self._vary_length, "depth": self._vary_depth, "channels": self._vary_width}
        return {**own, **super().variations()}

    def _vary_length(self) -> Variation:
        positions = usable_positions(self.model.architecture())
        longest = None if positions is None else positions - self.config.adapter.added_tokens
        return Variation(
            low=LENGTH_STEP,
            high=None if longest is None else longest // LENGTH_STEP * LENGTH_STEP,
            multiple=LENGTH_STEP,
            start=self.data.max_length,
            at=lambda size: self.config.changed({"data.max_length": size}),
            describe=lambda size: f"{size} tokens",
            limit=f"the model has {positions} positions",
        )

    def _vary_depth(self) -> Variation:
        found = self.model.architecture()
        return Variation(
            low=1,
            high=None,
            multiple=1,
            start=found.num_hidden_layers,
            at=lambda size: self.config,
            describe=lambda size: f"{size} layers",
            architecture=lambda size: with_depth(found, size),
        )

    def _vary_width(self) -> Variation:
        found = self.model.architecture()
        head = found.hidden_size // found.num_attention_heads
        return Variation(
            low=head,
            high=None,
            multiple=head,
            start=found.hidden_size,
            at=lambda size: self.config,
            describe=lambda size: f"width {size}",
            architecture=lambda size: with_width(found, size),
        )

    def fixed_sizes(self) -> list[str]:
        """Tokens of an example."""
        return [] if self.config.vary == "length" else [f"{self.data.max_length} tokens"]

    def small_config(self) -> tuple[Config, dict[str, Any]]:
        """Two short examples and two layers with two heads; the heads keep the size of the model's heads."""
        changes = {
            "trainer.batch_size": 2,
            "trainer.micro_batch_size": 1 if self.config.privacy.option == "direct" else None,
            "data.max_length": min(self.data.max_length, SMALL_LENGTH),
        }
        found = self.model.architecture()
        heads = min(SMALL_HEADS, found.num_attention_heads)
        width = heads * (found.hidden_size // found.num_attention_heads)
        layers = min(SMALL_LAYERS, found.num_hidden_layers)
        return self.config.changed(changes), {**with_depth(found, layers), **with_width(found, width)}

    # memory=auto: a memory mode and a head, and the largest micro-batch that fits

    def memory_choices(self, device: torch.device) -> list[list[Config]]:
        """All pairs of memory mode and head, sorted by the FLOPs that they add to memory=stored with head=logits."""
        with FakeTensorMode(), device, torch.no_grad(), FlopCounterMode(display=False) as flops:
            model: Any = type(self)(self._with_choice("stored", "logits")).make_fake_model()
            ids = torch.zeros(1, self.data.max_length, dtype=torch.long)
            model(input_ids=ids, **({"decoder_input_ids": ids} if is_encoder_decoder(model) else {}))
        vocabulary, width = model.get_output_embeddings().weight.shape
        head = 2 * self.data.max_length * vocabulary * width
        layers = flops.get_total_flops() - head
        added = {"stored": 0, "checkpoint": layers, "reversible": layers, "logits": 0, "chunked": head}
        modes = [mode for mode in self.config.adapter_modes if mode != "reversible" or self.model.reversible]
        choices = sorted(product(modes, ("logits", "chunked")), key=lambda pair: sum(added[each] for each in pair))
        return [[self._with_choice(mode, head) for mode, head in choices]]

    def memory_spent(self, config: Config, left: int) -> list[Config]:
        """Ghost clipping may keep logits and gradients in the rest of the budget."""
        privacy = config.privacy
        if not isinstance(privacy, GhostPrivacy) or privacy.option != "ghost":
            return []
        more = privacy.kept_bytes + left
        return [config.changed({"privacy.memory_budget": f"{more}B"})]

    def _with_choice(self, mode: str, head: str) -> Config:
        return self.config.changed({"memory.mode": mode, "model.head": head})

    def describe_memory(self) -> str:
        """Memory mode, head and micro-batch."""
        trainer = self.config.trainer
        return (
            f"memory={self.config.memory.mode}{self.described_offload} model.head={self.model.head} "
            f"trainer.micro_batch_size={trainer.micro_batch_size}{self._described_budget()}"
        )

    def _described_budget(self) -> str:
        extra = getattr(self.config.privacy, "kept_bytes", 0)
        return f" privacy.memory_budget={extra}B" if extra else ""

    def less_memory(self) -> list[str]:
        """Checkpoints, then the remedies of every task."""
        has_checkpoints = "checkpoint" in self.config.adapter_modes
        done = self.config.memory.mode in ("auto", "checkpoint") or not has_checkpoints
        first = [] if done else ["memory=checkpoint"]
        return [*first, *super().less_memory()]


def with_depth(architecture: Any, layers: int) -> dict[str, Any]:
    """The attributes of a transformers config for another depth, of both parts of an encoder-decoder."""
    names = ("encoder_layers", "decoder_layers", "num_decoder_layers")
    return {"num_hidden_layers": layers, **{name: layers for name in names if getattr(architecture, name, None)}}


def with_width(architecture: Any, width: int) -> dict[str, Any]:
    """The attributes of a transformers config for another width, with heads of the same size."""
    names = ("num_attention_heads", "num_key_value_heads", "intermediate_size", "n_inner", *PAIR_WIDTHS)
    scaled = {name: getattr(architecture, name, None) for name in names}
    own = architecture.hidden_size
    return {"hidden_size": width, **{name: max(1, each * width // own) for name, each in scaled.items() if each}}
