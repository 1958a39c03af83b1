"""Conversion of `config.yaml` files of older schema versions.

version 1   no key schema_version, no group adapter
version 2   `task` is a name; the task table_to_text, whose keys were in the group data
version 3   `task` is a group; no group audit
version 4   has a group audit
"""

from typing import Any

from omegaconf import DictConfig, OmegaConf

MOVED_FROM_DATA = ("evaluate", "generate", "beams")
"""Keys of version 2 that moved from the group data to the group task."""


def converted(config: DictConfig, *, version: int) -> DictConfig:
    """The config of a run in the current schema version."""
    found: dict[Any, Any] = OmegaConf.to_container(config)  # type: ignore[assignment]
    if version < 3 and isinstance(found.get("task"), str):
        is_language, data = found["task"] == "table_to_text", found.get("data") or {}
        moved = {key: data.pop(key) for key in MOVED_FROM_DATA if is_language and key in data}
        found["task"] = {"kind": "generation" if is_language else found["task"], **moved}
    if version < 4:
        found.setdefault("audit", {"kind": "none"})
    if version < 2:
        found.setdefault("adapter", {"kind": "none"})
    return OmegaConf.create(found)
