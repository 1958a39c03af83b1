"""What the rest of memsave asks of a task: `TaskDefinition`, registered by name, one class a task.

    @register("task", "regression")
    class Regression(TaskDefinition):
        ...

A definition belongs to one config and answers before any data are read: which configs go together, how the model is
built, what a batch looks like, what a plan may vary, how memory is saved. `make_task` then reads the data and gives the
`memsave.training.task.Task` that the training loop uses. Nothing outside of `memsave.tasks` and `memsave.config` asks
for the kind of a task, of a data set or of a model.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from memsave.config import Config, ConfigError
from memsave.config.fields import closest
from memsave.config.known_keys import listed
from memsave.config.registry import component, options
from memsave.config.schema import DataConfig, GhostPrivacy, ModelConfig, PrivacyConfig
from memsave.progress import Progress
from memsave.training.task import Batch, Task

PLAIN, PER_SAMPLE, GHOST = "plain", "per-example gradients", "ghost"
"""Strategies of a task whose plans compare how gradients are combined."""


@dataclass(frozen=True)
class Variation:
    """A number of a config that a plan varies (`vary=`)."""

    low: int
    high: int | None
    """None: larger sizes are tried until one does not fit."""
    multiple: int
    start: int
    """The config's own size, or near it."""
    at: Callable[[int], Config]
    """The config with another size."""
    describe: Callable[[int], str]
    """The size in words."""
    power: float = 1.0
    """Memory grows about as this power of the size."""
    architecture: Callable[[int], Mapping[str, Any]] = lambda size: {}
    """What changes in a model's architecture, for `make_fake_model`."""
    limit: str = ""
    """Why there is no size above `high`."""
    trainable: bool = True
    """False if the varied model is another one than the pretrained model, so that it can only be planned."""


class TaskDefinition:
    """The base of all tasks. A subclass sets the class attributes and implements what raises NotImplementedError."""

    data_class: ClassVar[type[DataConfig]]
    """Base of the data configs that the task takes."""
    model_class: ClassVar[type[ModelConfig]]
    """Base of the model configs that the task takes."""
    pip_extra: ClassVar[str | None] = None
    """The extra of the package memsave that installs what the task imports, if there is one."""
    static_shapes: ClassVar[bool] = True
    """Whether every batch has the shapes of `dummy_batch`; if not, those are the largest possible ones."""
    strategy_group: ClassVar[str] = "privacy"
    """The config group whose options a plan compares: memory or privacy."""
    smaller_input: ClassVar[str] = "smaller inputs"
    """What to try when a step does not fit into memory."""

    def __init__(self, config: Config):
        self.config = config

    # Valid configs

    def check_groups(self) -> None:
        """Raise ConfigError if data or model are those of another task."""
        for group, base in (("data", self.data_class), ("model", self.model_class)):
            chosen = getattr(self.config, group)
            if not isinstance(chosen, base):
                raise ConfigError(
                    f"task={self.config.task} does not go with {group}={option_of(group, chosen)}; give "
                    f"data={listed(options_of('data', self.data_class))}, and "
                    f"model={listed(options_of('model', self.model_class))}"
                )

    def validate(self) -> None:
        """Raise ConfigError for combinations of keys that the task cannot run; the base checks `vary`."""
        vary, known = self.config.vary, self.variations()
        if vary is None:
            return
        if vary not in known:
            given = f"{listed(sorted(known))}{closest(vary, known)}"
            raise ConfigError(f"vary={vary} is not of task={self.config.task}; give vary={given}")

    # The model

    def make_model(self, *, progress: Progress) -> tuple[nn.Module, Any]:
        """(the model in its memory mode and in training mode, on the CPU; its tokenizer or None)."""
        raise NotImplementedError

    def make_fake_model(self, *, architecture: Mapping[str, Any] | None = None) -> nn.Module:
        """The model with random weights. `architecture` overrides its sizes, see `Variation`.

        Must not read weights or values of tensors: it also runs under FakeTensorMode.
        """
        raise NotImplementedError

    # The data

    def make_task(self, device: torch.device, tokenizer: Any = None, *, progress: Progress) -> Task:
        """The task with its data. Raises DataError."""
        raise NotImplementedError

    def per_example_losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """Losses (B,): the loss of example i depends on example i alone."""
        raise NotImplementedError

    def dummy_batch(self, *, count: int, device: torch.device) -> Batch:
        """A batch of `count` examples with the shapes of training and no content."""
        raise NotImplementedError

    # Planning

    def variations(self) -> dict[str, Callable[[], Variation]]:
        """What `vary=` may name."""
        return {"batch": self._vary_batch}

    def fixed_sizes(self) -> list[str]:
        """The sizes of one example that a plan keeps, in words."""
        return []

    def small_config(self) -> tuple[Config, dict[str, Any]]:
        """(the config at a size whose real step takes about a second, architecture), for calibrating the planner."""
        return self.config, {}

    def family(self) -> str:
        """What the calibration of the planner depends on beside machine and memory mode."""
        return self.config.model.kind

    def strategies(self) -> list[str]:
        """The strategies that a plan compares, by name."""
        return [self.current_strategy() if name == GHOST and self._is_private else name for name in self._gradients]

    def current_strategy(self) -> str:
        """The name of the config's own strategy."""
        return self.config.privacy.option if self._is_private else PLAIN

    def with_strategy(self, name: str) -> Config:
        """The config with a strategy of `strategies`."""
        if name in (PLAIN, PER_SAMPLE):
            return self.config.changed({"privacy": PrivacyConfig()})
        return self.config if self._is_private else self.config.changed({"privacy": GhostPrivacy()})

    # memory=auto

    plans_micro_batch: ClassVar[bool] = False
    """Whether `memory=auto` also looks for the largest micro-batch that fits."""

    def memory_choices(self, device: torch.device) -> list[Config]:
        """Every config that `memory=auto` may choose, fastest first."""
        raise ConfigError(f"memory=auto is not available for task={self.config.task}; give memory=stored")

    def memory_strategies(self) -> list[str]:
        """The strategies whose calibrations bound a config of `memory_choices`."""
        return [self.current_strategy()]

    def describe_memory(self) -> str:
        """What `memory=auto` chose, as overrides."""
        return f"memory={self.config.memory.mode}"

    # Remedies

    def less_memory(self) -> list[str]:
        """What to try when a step does not fit into memory, the best first."""
        return ["trainer.micro_batch_size=1", self.smaller_input]

    _gradients: Sequence[str] = (PLAIN, PER_SAMPLE, GHOST)

    @property
    def _is_private(self) -> bool:
        return isinstance(self.config.privacy, GhostPrivacy)

    def _vary_batch(self) -> Variation:
        trainer = self.config.trainer
        most = trainer.batch_size

        def at(size: int) -> Config:
            return self.config.changed({"trainer.micro_batch_size": size, "trainer.batch_size": max(most, size)})

        return Variation(
            low=1,
            high=None if self.config.mode == "plan" else most,
            multiple=1,
            start=trainer.micro_batch_size or most,
            at=at,
            describe=lambda size: f"{size} at once",
            limit=f"trainer.batch_size is {most}",
        )


def definition_of(config: Config) -> TaskDefinition:
    """The definition of the config's task."""
    found: type[TaskDefinition] = component("task", config.task)
    return found(config)


def options_of(group: str, base: type) -> list[str]:
    """The options of a group whose schemas derive from a class."""
    return [name for name, schema in options(group).items() if issubclass(schema, base)]


def option_of(group: str, chosen: object) -> str:
    """The option of a group whose schema a config has."""
    return next((name for name, schema in options(group).items() if schema is type(chosen)), type(chosen).__name__)
