"""`TaskDefinition`: the interface of a task to the rest of memsave; one class per task, named by the task's config.

    @register("task", "regression")
    @dataclass
    class Regression(TaskConfig):
        kind: str = "regression"

        def definition(self, config):
            return RegressionDefinition(config)

A definition belongs to one config and needs no data. It checks the config, builds the model, and describes the shapes
of a batch, the sizes that a plan can vary, and the remedies for missing memory. `make_task` then reads the data and
returns the `memsave.training.task.Task` for the training loop. Code outside of `memsave.tasks` and `memsave.config`
never checks the kind of a task, a data set or a model.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from memsave.config import Config, ConfigError
from memsave.config.fields import closest
from memsave.config.known_keys import listed
from memsave.config.registry import options
from memsave.config.schema import OFFLOADED, DataConfig, GhostPrivacy, ModelConfig, PrivacyConfig
from memsave.data.units import UnitKeys, units_of
from memsave.progress import Progress
from memsave.training.task import Batch, Task
from memsave.training.units import unit_batch, unit_losses, with_units

PLAIN, PER_SAMPLE, GHOST = "plain", "per-example gradients", "ghost"
"""The strategies of a task whose plans compare how gradients are combined."""


@dataclass(frozen=True)
class Variation:
    """A size in the config that a plan varies (`vary=`)."""

    low: int
    high: int | None
    """None for no upper limit: the search ends at the first size that does not fit."""
    multiple: int
    start: int
    """The first size that the search tries: that of the config, or close to it."""
    at: Callable[[int], Config]
    """The config with another size."""
    describe: Callable[[int], str]
    """The size in words."""
    power: float = 1.0
    """Memory grows approximately with this power of the size."""
    architecture: Callable[[int], Mapping[str, Any]] = lambda size: {}
    """The changes of the model's architecture, for `make_fake_model`."""
    limit: str = ""
    """The reason for the limit `high`."""


class TaskDefinition:
    """The base of all tasks. A subclass sets the class attributes and implements the methods without a default."""

    data_class: ClassVar[type[DataConfig]]
    """The base class of the data configs of this task."""
    model_class: ClassVar[type[ModelConfig]]
    """The base class of the model configs of this task."""
    pip_extra: ClassVar[str | None] = None
    """The extra of the package memsave that installs the dependencies of the task, if there is one."""
    static_shapes: ClassVar[bool] = True
    """Whether every batch has the shapes of `dummy_batch`; otherwise these shapes are upper bounds."""
    strategy_group: ClassVar[str] = "privacy"
    """The config group whose options a plan compares: memory or privacy."""
    smaller_input: ClassVar[str] = "smaller inputs"
    """The remedy for a step that does not fit into memory, as error messages name it."""

    def __init__(self, config: Config):
        self.config = config

    # Valid configs

    def check_groups(self) -> None:
        """Raise ConfigError if the data or the model belong to another task, or the adapter to another model."""
        for group, base in (("data", self.data_class), ("model", self.model_class)):
            chosen = getattr(self.config, group)
            if not isinstance(chosen, base):
                raise ConfigError(
                    f"task={self.config.task.kind} is not compatible with {group}={option_of(group, chosen)}; give "
                    f"data={listed(options_of('data', self.data_class))}, and "
                    f"model={listed(options_of('model', self.model_class))}"
                )
        model, adapter = self.config.model, self.config.adapter
        if not isinstance(model, adapter.model_class):
            adapters: dict[str, Any] = {**options("adapter")}
            fitting = [name for name, each in adapters.items() if isinstance(model, each.model_class)]
            raise ConfigError(
                f"adapter={adapter.kind} does not fit model={option_of('model', model)}; give adapter={listed(fitting)}"
            )

    def validate(self) -> None:
        """Raise ConfigError for combinations of keys that the task cannot run; the base checks `vary`."""
        vary, valid = self.config.vary, self.variations()
        if vary is not None and vary not in valid:
            names = f"{listed(sorted(valid))}{closest(vary, valid)}"
            raise ConfigError(f"vary={vary} is not valid for task={self.config.task.kind}; give vary={names}")
        self._check_units()

    def _check_units(self) -> None:
        """Raise ConfigError for keys of units that are not valid, or not enough for a plan."""
        config, data = self.config, self.config.data
        if isinstance(data, UnitKeys):
            data.check_units()
        if units_of(data) is None or self._records_per_unit is not None:
            return
        needing = {"mode=plan": config.mode == "plan", f"vary={config.vary}": config.vary is not None}
        needing["memory=auto"] = config.memory.mode == "auto"
        key = next((key for key, found in needing.items() if found), None)
        if key is not None:
            raise ConfigError(
                f"data.records_per_unit is null, so units have no largest size, which {key} needs; give the largest "
                f"number of records of a unit in one step, as in data.records_per_unit=8"
            )

    # The model

    def make_model(self, *, progress: Progress) -> tuple[nn.Module, Any]:
        """(the model on the CPU, in its memory mode and in training mode; its tokenizer or None)."""
        raise NotImplementedError

    def make_fake_model(self, *, architecture: Mapping[str, Any] | None = None) -> nn.Module:
        """The model with random weights. `architecture` overrides its sizes, see `Variation`.

        Must not read files of weights or values of tensors: it also runs under FakeTensorMode.
        """
        raise NotImplementedError

    def compiled_blocks(self, model: nn.Module) -> list[nn.Module]:
        """The modules that `trainer.compile=true` compiles; each takes most of its time in one call."""
        raise ConfigError(f"trainer.compile=true knows no blocks of task={self.config.task.kind}; leave it out")

    # The data

    def make_task(self, device: torch.device, tokenizer: Any = None, *, progress: Progress) -> Task:
        """The task with its data. Raises DataError."""
        raise NotImplementedError

    def per_example_losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """Losses (B,): loss i depends only on example i."""
        raise NotImplementedError

    def dummy_batch(self, *, count: int, device: torch.device) -> Batch:
        """A batch of `count` examples with the shapes of training and arbitrary values."""
        raise NotImplementedError

    # The examples of training: those of the methods above, or units of several (data.unit)

    @property
    def _records_per_unit(self) -> int | None:
        keys = units_of(self.config.data)
        return None if keys is None else keys.records_per_unit

    def training_task(self, device: torch.device, tokenizer: Any = None, *, progress: Progress) -> Task:
        """`make_task`, or the task whose examples are its units. Raises DataError."""
        task, keys = self.make_task(device, tokenizer, progress=progress), units_of(self.config.data)
        return task if keys is None else with_units(task, keys=keys, seed=self.config.trainer.seed)

    @property
    def has_static_batches(self) -> bool:
        """Whether every batch has the shapes of `training_batch`; units have different numbers of records."""
        return self.static_shapes and units_of(self.config.data) is None

    def training_losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """Losses (B,) of a `training_batch`."""
        keys = units_of(self.config.data)
        if keys is None:
            return self.per_example_losses(model, batch)
        return unit_losses(self.per_example_losses, model, batch, reduction=keys.unit_loss)

    def training_batch(self, *, count: int, device: torch.device) -> Batch:
        """`dummy_batch`, or one of `count` units with the largest number of records. Raises ConfigError without one."""
        if units_of(self.config.data) is None:
            return self.dummy_batch(count=count, device=device)
        most = self._records_per_unit
        if most is None:
            raise ConfigError(
                "data.records_per_unit is null, so the size of a batch is unknown; give data.records_per_unit=8"
            )
        return unit_batch(self.dummy_batch(count=count * most, device=device), count=count)

    # Planning

    def variations(self) -> dict[str, Callable[[], Variation]]:
        """The valid values of `vary=`, each with a function that returns its variation."""
        return {"batch": self._vary_batch}

    def fixed_sizes(self) -> list[str]:
        """The sizes of an example that a plan does not vary, in words."""
        return []

    def small_config(self) -> tuple[Config, dict[str, Any]]:
        """(a config whose real step takes about a second, its architecture), for calibrating the planner."""
        return self.config, {}

    def unit_sizes(self) -> list[str]:
        """The records of a unit, in words; empty without units."""
        most = self._records_per_unit
        return [] if most is None else [f"{most} records a unit"]

    def calibration_config(self) -> tuple[Config, dict[str, Any]]:
        """`small_config`, with small units."""
        config, architecture = self.small_config()
        most = self._records_per_unit
        return config if most is None else config.changed({"data.records_per_unit": min(most, 2)}), architecture

    def family(self) -> str:
        """The part of the key of a calibration that depends on the model."""
        return self.config.model.kind

    def strategies(self) -> list[str]:
        """The names of the strategies that a plan compares."""
        return [self.current_strategy() if name == GHOST and self._is_private else name for name in self._gradients]

    def current_strategy(self) -> str:
        """The name of the strategy of the config."""
        return self.config.privacy.option if self._is_private else PLAIN

    def with_strategy(self, name: str) -> Config:
        """The config with another strategy, a name of `strategies`."""
        if name in (PLAIN, PER_SAMPLE):
            return self.config.changed({"privacy": PrivacyConfig()})
        return self.config if self._is_private else self.config.changed({"privacy": GhostPrivacy()})

    # memory=auto

    plans_micro_batch: ClassVar[bool] = False
    """Whether `memory=auto` searches for the largest micro-batch of each choice, and mixes no choices."""

    def memory_choices(self, device: torch.device) -> list[list[Config]]:
        """The configs from which `memory=auto` chooses, in rounds; raises ConfigError if there are none.

        Choices with more work come later; the first one recomputes nothing. A later round is tried only if no choice of
        the earlier ones fits, alone or mixed (`memory_mixtures`). To add a choice, append a config to a round.
        """
        raise ConfigError(f"memory=auto is not available for task={self.config.task.kind}; give memory=stored")

    def offloaded_choices(self, choice: Config) -> list[Config]:
        """A config of `memory_choices` with more in host memory: activations, the optimizer's state, or both."""
        given, sharded = choice.memory.offload, self.config.trainer.parallel == "fsdp"
        sets = [[], *([name] for name in OFFLOADED), list(OFFLOADED)]
        kept = [[name for name in OFFLOADED if name in (*given, *each)] for each in sets]
        more = [each for number, each in enumerate(kept) if each not in kept[:number]][1:]
        return [] if sharded else [choice.changed({"memory.offload": each}) for each in more]

    def memory_part(self, module: str | None) -> str:
        """The part of the model, with a memory mode of its own, to which a module belongs; "" for no such part."""
        return ""

    def memory_mixtures(
        self, choices: Sequence[Config], parts: Sequence[str]
    ) -> Iterator[tuple[Config, Mapping[str, int]]]:
        """Yield (config, index of a choice by part): the configs whose parts have the modes of different choices.

        parts: the names by `memory_part`, and "".
        """
        for index, choice in enumerate(choices):
            yield choice, {part: index for part in parts if part}

    def memory_spent(self, config: Config, left: int) -> list[Config]:
        """Configs that may take `left` more bytes than this one, and compute less for it."""
        return []

    def memory_strategies(self) -> list[str]:
        """The strategies whose calibrations are upper bounds for this config, one of `memory_choices`."""
        return [self.current_strategy()]

    def describe_memory(self) -> str:
        """The choice of `memory=auto` as overrides."""
        return f"memory={self.config.memory.mode}{self.described_offload}"

    @property
    def described_offload(self) -> str:
        """What is kept in host memory, as an override with a space before it; empty if nothing is."""
        offload = self.config.memory.offload
        return f" memory.offload=[{','.join(offload)}]" if offload else ""

    # Remedies

    def less_memory(self) -> list[str]:
        """Remedies for a step that does not fit into memory, the most effective first."""
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
    found: TaskDefinition = config.task.definition(config)
    return found


def options_of(group: str, base: type) -> list[str]:
    """The options of a group whose schemas derive from a class."""
    return [name for name, schema in options(group).items() if issubclass(schema, base)]


def option_of(group: str, chosen: object) -> str:
    """The option of a group whose schema a config has."""
    return next((name for name, schema in options(group).items() if schema is type(chosen)), type(chosen).__name__)
