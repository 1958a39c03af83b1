"""Tensors of a sharded state on disk, by torch.distributed.checkpoint; another number of processes can read them."""

import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memsave.processes import process_count

METADATA = ".metadata"
PLAIN = {
    "torch": ("Size",),
    "torch.serialization": ("_get_layout",),
    "torch.distributed.checkpoint.metadata": (
        "Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata", "MetadataIndex", "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "pathlib": ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"),
    "pathlib._local": ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"),
}  # fmt: skip
"""The names that the pickle of the metadata of tensors contains, by module; all dtypes of torch belong to them."""


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

    All processes call it together. Raises OSError or ValueError if the folder is not complete, and UnpicklingError
    before anything runs that a stranger's folder names.
    """
    from torch.distributed import checkpoint

    _PlainUnpickler(io.BytesIO((folder / METADATA).read_bytes())).load()
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


class _PlainUnpickler(pickle.Unpickler):
    """Reads the metadata, which torch.distributed.checkpoint pickles, if they are those of tensors alone.

    Metadata of other values would let torch unpickle these values without any check.
    """

    def find_class(self, module: str, name: str) -> Any:
        """The class or dtype of this name. Raises UnpicklingError if tensors do not need it."""
        if name in PLAIN.get(module, ()) or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{METADATA} names {module}.{name}, which no checkpoint of memsave holds")
