"""The definition of `task=segmentation`."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, cast

import torch
from torch import Tensor, nn

from memsave.config import Config, ConfigError, register
from memsave.config.schema import TaskConfig
from memsave.data.volumes.config import SegmentationData
from memsave.models.mbconv import MBConv3d
from memsave.progress import Progress
from memsave.tasks.definition import TaskDefinition, Variation
from memsave.tasks.segmentation.networks import SegmentationModel
from memsave.tasks.segmentation.unet import UNetModel
from memsave.training.task import Batch, Task

SIDE_STEP, CHANNEL_STEP = 16, 8
"""Multiples in which a plan varies the sides of a crop and the channels of the finest level."""
SMALL_CROP = 40
"""Side of the crop of the calibration step; smaller crops use other kernels."""


@register("task", "segmentation")
@dataclass
class SegmentationConfig(TaskConfig):
    """Segmentation of lesions in volumes by a U-Net."""

    kind: str = "segmentation"

    def definition(self, config: Config) -> "SegmentationDefinition":
        """The definition for a whole config."""
        return SegmentationDefinition(config)


class SegmentationDefinition(TaskDefinition):
    """Segmentation of lesions in volumes; see `memsave.tasks.segmentation.task`."""

    data_class, model_class = SegmentationData, SegmentationModel
    pip_extra = "brats"
    static_shapes = True
    strategy_group = "memory"
    smaller_input = "smaller crops"

    @property
    def data(self) -> SegmentationData:
        """The config of the data."""
        return cast(SegmentationData, self.config.data)

    @property
    def model(self) -> SegmentationModel:
        """The config of the network."""
        return cast(SegmentationModel, self.config.model)

    @property
    def unet(self) -> UNetModel:
        """The config of the network, if it has levels."""
        assert isinstance(self.config.model, UNetModel)
        return self.config.model

    def validate(self) -> None:
        """Raise ConfigError for combinations that cannot run."""
        super().validate()
        memory = self.config.memory
        if memory.mode == "auto" and self.model.levels is None:
            raise ConfigError(
                f"memory=auto chooses a mode for each level of model=rev_unet; give one of "
                f"{', '.join(self.model.modes())} for model={self.model.kind}"
            )
        if memory.levels is not None and len(memory.levels) != self.model.levels:
            raise ConfigError(f"memory.levels is {memory.levels}; give a mode for each level of a U-Net, finest first")
        if getattr(self.model, "squeeze_excitation", 0) and memory.engine == "fused":
            raise ConfigError(
                "memory.engine=fused cannot recompute squeeze-excitation in chunks; give memory.engine=auto or "
                "model.squeeze_excitation=0"
            )

    def make_model(self, *, progress: Progress) -> tuple[nn.Module, None]:
        """(the U-Net with random weights, None)."""
        return self.model.build(self.data, memory=self.config.memory), None

    def make_fake_model(self, *, architecture: Mapping[str, Any] | None = None) -> nn.Module:
        """The U-Net with random weights; ignores `architecture`, because all sizes are in the config."""
        return self.model.build(self.data, memory=self.config.memory)

    def compiled_blocks(self, model: nn.Module) -> list[nn.Module]:
        """The branches of the couplings."""
        return [module for module in model.modules() if isinstance(module, MBConv3d)] or super().compiled_blocks(model)

    def make_task(self, device: torch.device, tokenizer: Any = None, *, progress: Progress) -> Task:
        """The task with its cases."""
        from memsave.tasks.segmentation.task import Segmentation

        return Segmentation(self.data, trainer=self.config.trainer, device=device, progress=progress)

    def per_example_losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """(B,) losses, one per case over all of its crops."""
        from memsave.tasks.segmentation.losses import case_losses

        return case_losses(model, batch, scheme=self.data.label_scheme())

    def dummy_batch(self, *, count: int, device: torch.device) -> Batch:
        """Crops filled with zeros."""
        from memsave.tasks.segmentation.task import dummy_batch

        return dummy_batch(self.data, count=count, device=device)

    # Planning

    def variations(self) -> dict[str, Callable[[], Variation]]:
        """Volume, depth, channels and batch; a network of one's own has no depth and channels that are known."""
        own = {"volume": self._vary_volume}
        if self.model.levels is not None:
            own |= {"depth": self._vary_depth, "channels": self._vary_channels}
        return {**own, **super().variations()}

    def _vary_volume(self) -> Variation:
        """The longest side of the crop in voxels; the other sides keep their proportions."""
        sides = list(self.data.crop_size)
        longest = max(sides)

        def crop(size: int) -> list[int]:
            return [max(SIDE_STEP, round(size * side / longest / SIDE_STEP) * SIDE_STEP) for side in sides]

        return Variation(
            low=SIDE_STEP,
            high=None,
            multiple=SIDE_STEP,
            start=longest,
            at=lambda size: self.config.changed({"data.crop_size": crop(size)}),
            describe=lambda size: "x".join(map(str, crop(size))),
            power=3.0,
        )

    def _vary_depth(self) -> Variation:
        """Blocks per level, the same for all levels."""
        levels = len(self.unet.channels)
        return Variation(
            low=1,
            high=None,
            multiple=1,
            start=max(self.unet.blocks),
            at=lambda size: self.config.changed({"model.blocks": [size] * levels}),
            describe=lambda size: f"{size} blocks a level",
        )

    def _vary_channels(self) -> Variation:
        """Channels of the finest level; the other levels keep their proportions."""
        own = list(self.unet.channels)

        def channels(size: int) -> list[int]:
            return [round(size * each / own[0] / 2) * 2 for each in own]

        return Variation(
            low=CHANNEL_STEP,
            high=None,
            multiple=CHANNEL_STEP,
            start=own[0],
            at=lambda size: self.config.changed({"model.channels": channels(size)}),
            describe=lambda size: "-".join(map(str, channels(size))),
        )

    def fixed_sizes(self) -> list[str]:
        """Crop size and crops per case."""
        parts = [] if self.config.vary == "volume" else [f"crops of {'x'.join(map(str, self.data.crop_size))}"]
        return parts + ([] if self.data.crops_per_case == 1 else [f"{self.data.crops_per_case} crops a case"])

    def small_config(self) -> tuple[Config, dict[str, Any]]:
        """One small crop and one block per level; the channels stay, because kernels depend on them."""
        private = {"privacy.largest_batch": 1} if self.config.privacy.option == "ghost" else {}  # else a dozen crops
        changes = {
            **private,
            "trainer.batch_size": 1,
            "trainer.micro_batch_size": None,
            "data.crops_per_case": 1,
            "data.crop_size": [SMALL_CROP] * 3,
            **self.model.smaller(),
        }
        return self.config.changed(changes), {}

    def family(self) -> str:
        """The kind of the network and its channels."""
        return self.model.family()

    def strategies(self) -> list[str]:
        """The memory modes of `profiler.compare` that the network has, and that of the config."""
        compared = [mode for mode in self.config.profiler.compare if mode in self.model.modes()]
        return list(dict.fromkeys([*compared, self.config.memory.mode]))

    def current_strategy(self) -> str:
        """The memory mode."""
        return self.config.memory.mode

    def with_strategy(self, name: str) -> Config:
        """The config with another memory mode."""
        if name == self.config.memory.mode:
            return self.config
        engine = self.config.memory.engine if name == "reversible" else "auto"
        return self.config.changed({"memory.mode": name, "memory.levels": None, "memory.engine": engine})

    # memory=auto: each level has a mode

    def memory_choices(self, device: torch.device) -> list[list[Config]]:
        """All levels stored; checkpointed or reversible, by hooks or fused; then fused with more chunks."""
        modes, engine = self.config.adapter_modes, self.config.memory.engine
        rebuilt, more = [], []
        if "checkpoint" in modes:
            rebuilt.append(self._with_levels("checkpoint"))
        if "reversible" in modes and engine != "fused":
            rebuilt.append(self._with_levels("reversible", engine="hooks"))
        if "reversible" in modes and engine != "hooks" and (engine == "fused" or self._can_be_fused):
            chunks = self.config.memory.chunks
            fused, finer = (
                self._with_levels("reversible", engine="fused", chunks=each) for each in (chunks, 4 * chunks)
            )
            rebuilt.append(fused)
            more.append(finer)
        rounds = [[self._with_levels("stored")], rebuilt, more]
        return [each for each in rounds if each]

    def memory_part(self, module: str | None) -> str:
        """One side of a level, such as encoder.0."""
        found = re.match(r"(encoder|decoder)\.\d+", module or "")
        return found[0] if found else ""

    def memory_mixtures(
        self, choices: Sequence[Config], parts: Sequence[str]
    ) -> Iterator[tuple[Config, Mapping[str, int]]]:
        """Every combination of modes of the levels; all reversible levels have one engine and number of chunks."""
        named = [str((each.memory.levels or ("",))[0]) for each in choices]
        rebuilt = [index for index, name in enumerate(named) if name == "reversible"]
        others = [index for index, name in enumerate(named) if name != "reversible"]
        for engine in rebuilt or [0]:
            allowed = dict.fromkeys([*others, engine])
            for picked in product(allowed, repeat=len(self.unet.channels)):
                if engine in picked or engine == (rebuilt or [0])[0]:
                    levels = {"memory.levels": [named[index] for index in picked]}
                    base = choices[engine if engine in picked else 0]
                    by_part = {part: picked[int(part.rpartition(".")[2])] for part in parts if part}
                    yield base.changed(levels), by_part

    @property
    def _can_be_fused(self) -> bool:
        """Whether nothing in the config replaces, hooks or shards the layers that the fused engine reads itself."""
        trainer = self.config.trainer
        hooked = self.config.privacy.option == "ghost" or trainer.compile
        return not (self.unet.squeeze_excitation or hooked or trainer.parallel == "fsdp")

    def _with_levels(self, mode: str, **others: Any) -> Config:
        changes = {f"memory.{key}": value for key, value in others.items()}
        return self.config.changed({"memory.levels": [mode] * len(self.unet.channels), **changes})

    def memory_strategies(self) -> list[str]:
        """The modes of the levels."""
        return list(dict.fromkeys(self.config.memory.levels or [self.config.memory.mode]))

    def describe_memory(self) -> str:
        """The modes of the levels, and how reversible ones are recomputed."""
        memory = self.config.memory
        levels = f"memory.levels=[{','.join(memory.levels or ())}]"
        if "reversible" not in (memory.levels or ()):
            return f"{levels}{self.described_offload}"
        chunks = f" memory.chunks={memory.chunks}" if memory.engine == "fused" else ""
        return f"{levels} memory.engine={memory.engine}{chunks}{self.described_offload}"

    def less_memory(self) -> list[str]:
        """Reversible blocks, then the remedies of every task."""
        has = "reversible" in self.model.modes() and self.config.memory.mode not in ("auto", "reversible")
        first = ["memory=reversible"] if has else []
        return [*first, *super().less_memory()]
