"""What a plan may vary, and how a size becomes a config.

volume     the longest side of the crop in voxels, in steps of 16; the others keep their proportions
depth      blocks of every level of a U-Net; layers of a language model
channels   channels of a U-Net's finest level, in steps of 8, the others in proportion; a language model's width
batch      examples that pass through the model at once (trainer.micro_batch_size)
length     tokens of an example (data.max_length), in steps of 8
"""

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

from memsave.config.schema import Config, UNetModel

VOXELS, CHANNELS, TOKENS = 16, 8, 8  # the steps


@dataclass(frozen=True)
class Variation:
    """One number of a config that a plan varies."""

    low: int
    high: int | None
    """None: larger sizes are tried until one does not fit."""
    multiple: int
    start: int
    """The config's own size, or near it."""
    at: Callable[[int], Config]
    """The config with another size."""
    describe: Callable[[int], str]
    """The size for people."""
    power: float = 1.0
    """Of the size that memory is about proportional to."""
    architecture: Callable[[int], Mapping[str, Any]] = lambda size: {}
    """What changes in a language model's architecture, by the names of transformers."""
    limit: str = ""
    """Why there is no size above `high`."""


def variation(config: Config) -> Variation:
    """What `vary=` asks for."""
    kinds = {"volume": _volume, "depth": _depth, "channels": _channels, "batch": _batch, "length": _length}
    made = kinds[str(config.vary)](config)
    start = max(made.start, made.low)
    return replace(made, start=start if made.high is None else min(start, made.high))


def what_is_fixed(config: Config) -> str:
    """What a step of the plan holds beside what is varied: examples at once, and the size of one."""
    trainer, data = config.trainer, config.data
    parts = [] if config.vary == "batch" else [f"{trainer.micro_batch_size or trainer.batch_size} at once"]
    if config.task == "segmentation":
        parts += [] if config.vary == "volume" else [f"crops of {'x'.join(map(str, data.crop_size))}"]
        parts += [] if data.crops_per_case == 1 else [f"{data.crops_per_case} crops a case"]
    elif config.vary != "length":
        parts.append(f"{data.max_length} tokens")
    return ", ".join(parts)


def _changed(config: Config, change: Callable[[Config], None]) -> Config:
    config = deepcopy(config)
    change(config)
    return config


def _volume(config: Config) -> Variation:
    sides = list(config.data.crop_size)
    longest = max(sides)

    def crop(size: int) -> list[int]:
        return [max(VOXELS, round(size * side / longest / VOXELS) * VOXELS) for side in sides]

    def at(size: int) -> Config:
        return _changed(config, lambda changed: setattr(changed.data, "crop_size", crop(size)))

    return Variation(VOXELS, None, VOXELS, longest, at, lambda size: "x".join(map(str, crop(size))), 3.0)


def _depth(config: Config) -> Variation:
    if isinstance(config.model, UNetModel):
        levels = len(config.model.channels)

        def at(size: int) -> Config:
            return _changed(config, lambda changed: setattr(changed.model, "blocks", [size] * levels))

        return Variation(1, None, 1, max(config.model.blocks), at, lambda size: f"{size} blocks a level")
    return Variation(
        *(1, None, 1, _architecture(config).num_hidden_layers),
        at=lambda size: config,
        describe=lambda size: f"{size} layers",
        architecture=lambda size: {"num_hidden_layers": size},
    )


def _channels(config: Config) -> Variation:
    if isinstance(config.model, UNetModel):
        own = config.model.channels

        def wide(size: int) -> list[int]:
            return [round(size * each / own[0] / 2) * 2 for each in own]

        def at(size: int) -> Config:
            return _changed(config, lambda changed: setattr(changed.model, "channels", wide(size)))

        return Variation(CHANNELS, None, CHANNELS, own[0], at, lambda size: "-".join(map(str, wide(size))))
    found = _architecture(config)
    head = found.hidden_size // found.num_attention_heads
    return Variation(
        *(head, None, head, found.hidden_size),
        at=lambda size: config,
        describe=lambda size: f"width {size}",
        architecture=lambda size: wider(found, size),
    )


def wider(architecture: Any, width: int) -> dict[str, Any]:
    """An architecture of transformers at another width: heads of the same size, all else in proportion."""
    names = ("num_attention_heads", "num_key_value_heads", "intermediate_size", "n_inner")
    scaled = {name: getattr(architecture, name, None) for name in names}
    own = architecture.hidden_size
    return {"hidden_size": width, **{name: max(1, each * width // own) for name, each in scaled.items() if each}}


def _batch(config: Config) -> Variation:
    def change(changed: Config, size: int) -> None:
        changed.trainer.micro_batch_size = size
        changed.trainer.batch_size = max(changed.trainer.batch_size, size)

    own, most = config.trainer.micro_batch_size, config.trainer.batch_size
    return Variation(
        *(1, None if config.mode == "plan" else most, 1, most if own is None else own),
        at=lambda size: _changed(config, lambda changed: change(changed, size)),
        describe=lambda size: f"{size} at once",
        limit=f"trainer.batch_size is {most}",
    )


def _length(config: Config) -> Variation:
    positions = getattr(_architecture(config), "max_position_embeddings", None)
    return Variation(
        *(TOKENS, None if positions is None else positions // TOKENS * TOKENS, TOKENS, config.data.max_length),
        at=lambda size: _changed(config, lambda changed: setattr(changed.data, "max_length", size)),
        describe=lambda size: f"{size} tokens",
        limit=f"the model has {positions} positions",
    )


def _architecture(config: Config) -> Any:
    from memsave.tasks.language.pretrained import language_config

    return language_config(config.model)
