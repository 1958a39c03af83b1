"""Tensors of a sharded state on disk, by torch.distributed.checkpoint; another number of processes can read them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memsave.processes import process_count


def write(tensors: dict[str, Tensor], folder: Path) -> None:
    """Write the tensors, each process its own parts of those that are sharded; all processes call it together.

    Raises OSError if a process cannot write.
    """
    from torch.distributed import checkpoint

    try:
        checkpoint.save(dict(tensors), storage_writer=checkpoint.FileSystemWriter(folder), no_dist=process_count() == 1)
    except checkpoint.api.CheckpointException as error:
        raise _first(error) from error


def read(folder: Path, *, like: dict[str, Tensor], others: Callable[[str, torch.Size], Tensor]) -> dict[str, Tensor]:
    """The tensors in the folder, each with the shards of the tensor of its name in `like`, or of `others(name, shape)`.

    All processes call it together. Raises OSError or ValueError if the folder is not complete.
    """
    from torch.distributed import checkpoint

    reader = checkpoint.FileSystemReader(folder)
    found: dict[str, Any] = {}
    for key, entry in reader.read_metadata().state_dict_metadata.items():
        shape = getattr(entry, "size", torch.Size())
        same = key in like and like[key].shape == shape
        found[key] = torch.empty_like(like[key]) if same else others(key, shape)
    try:
        checkpoint.load(found, storage_reader=reader, no_dist=process_count() == 1)
    except checkpoint.api.CheckpointException as error:
        raise _first(error) from error
    return found


def _first(error: Any) -> BaseException:
    """The first error of a process."""
    return next((each[0] for each in error.failures.values()), error)
