"""The definition of `task=table_to_text`."""

from collections.abc import Callable, Mapping
from itertools import product
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from memsave.config import Config, ConfigError, register
from memsave.data.text.config import TextData
from memsave.progress import Progress
from memsave.tasks.definition import TaskDefinition, Variation, option_of
from memsave.tasks.language.adapters import PeftAdapter
from memsave.tasks.language.pretrained import LanguageModel, with_random_weights
from memsave.training.measure import set_memory
from memsave.training.task import Batch, Task

LENGTH_STEP = 8
"""Multiple of tokens in which a plan varies the length of an example."""
SMALL_LENGTH, SMALL_LAYERS, SMALL_HEADS = 64, 2, 2
"""Sizes of the calibration step."""


@register("task", "table_to_text")
class TableToTextDefinition(TaskDefinition):
    """Sentences generated from tables; see `memsave.tasks.language.table_to_text`."""

    data_class, model_class = TextData, LanguageModel
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

    def make_model(self, *, progress: Progress) -> tuple[nn.Module, Any]:
        """(the pretrained model, its tokenizer)."""
        model, tokenizer = self.model.load(progress=progress)
        torch.manual_seed(self.config.trainer.seed)  # the first load of some models draws random numbers
        model = with_random_weights(model) if self.model.random else model
        set_memory(model, self.config.memory.mode)
        positions = getattr(model.config, "max_position_embeddings", None)
        added = self.config.adapter.added_tokens
        if positions is not None and self.data.max_length + added > positions:
            of_adapter = f", of which adapter.tokens takes {added}; give less of either" if added else ""
            raise ConfigError(
                f"data.max_length is {self.data.max_length}, but the model has {positions} positions{of_adapter}"
            )
        return model.train(), tokenizer

    def make_fake_model(self, *, architecture: Mapping[str, Any] | None = None) -> nn.Module:
        """The model with random weights."""
        model = self.model.make_random(architecture=architecture)
        set_memory(model, self.config.memory.mode)
        return model.train()

    def make_task(self, device: torch.device, tokenizer: Any = None, *, progress: Progress) -> Task:
        """The task with its records."""
        from memsave.tasks.language.table_to_text import TableToText

        train, held_out = self.data.records_by_split()
        options: dict[str, Any] = {"data": self.data, "trainer": self.config.trainer, "head": self.model.head}
        return TableToText(train, held_out, tokenizer, device=device, **options)

    def per_example_losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """(B,) losses: the mean cross-entropy over the target tokens of each example."""
        from memsave.tasks.language.table_to_text import text_losses

        return text_losses(model, batch, head=self.model.head)

    def dummy_batch(self, *, count: int, device: torch.device) -> Batch:
        """Examples of the maximum length in which every token is a target."""
        from memsave.tasks.language.table_to_text import dummy_batch

        return dummy_batch(self.data, count=count, device=device)

    # Planning

    def variations(self) -> dict[str, Callable[[], Variation]]:
        """Length, depth, channels and batch."""
        own = {"length": self._vary_length, "depth": self._vary_depth, "channels": self._vary_width}
        return {**own, **super().variations()}

    def _vary_length(self) -> Variation:
        positions = getattr(self.model.architecture(), "max_position_embeddings", None)
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
        return Variation(
            low=1,
            high=None,
            multiple=1,
            start=self.model.architecture().num_hidden_layers,
            at=lambda size: self.config,
            describe=lambda size: f"{size} layers",
            architecture=lambda size: {"num_hidden_layers": size},
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
        return self.config.changed(changes), {"num_hidden_layers": layers, **with_width(found, width)}

    # memory=auto: a memory mode and a head, and the largest micro-batch that fits

    def memory_choices(self, device: torch.device) -> list[Config]:
        """All pairs of memory mode and head, sorted by the FLOPs that they add to memory=stored with head=logits."""
        with FakeTensorMode(), device, torch.no_grad(), FlopCounterMode(display=False) as flops:
            model: Any = TableToTextDefinition(self._with_choice("stored", "logits")).make_fake_model()
            model(torch.zeros(1, self.data.max_length, dtype=torch.long))
        vocabulary, width = model.get_output_embeddings().weight.shape
        head = 2 * self.data.max_length * vocabulary * width
        layers = flops.get_total_flops() - head
        added = {"stored": 0, "checkpoint": layers, "reversible": layers, "logits": 0, "chunked": head}
        modes = [mode for mode in self.config.adapter_modes if mode != "reversible" or self.model.reversible]
        choices = sorted(product(modes, ("logits", "chunked")), key=lambda pair: sum(added[each] for each in pair))
        return [self._with_choice(mode, head) for mode, head in choices]

    def _with_choice(self, mode: str, head: str) -> Config:
        return self.config.changed({"memory.mode": mode, "model.head": head})

    def describe_memory(self) -> str:
        """Memory mode, head and micro-batch."""
        trainer = self.config.trainer
        return (
            f"memory={self.config.memory.mode} model.head={self.model.head} "
            f"trainer.micro_batch_size={trainer.micro_batch_size}"
        )

    def less_memory(self) -> list[str]:
        """Checkpoints, then the remedies of every task."""
        has_checkpoints = "checkpoint" in self.config.adapter_modes
        done = self.config.memory.mode in ("auto", "checkpoint") or not has_checkpoints
        first = [] if done else ["memory=checkpoint"]
        return [*first, *super().less_memory()]


def with_width(architecture: Any, width: int) -> dict[str, Any]:
    """The attributes of a transformers config for another width, with heads of the same size."""
    names = ("num_attention_heads", "num_key_value_heads", "intermediate_size", "n_inner")
    scaled = {name: getattr(architecture, name, None) for name in names}
    own = architecture.hidden_size
    return {"hidden_size": width, **{name: max(1, each * width // own) for name, each in scaled.items() if each}}
