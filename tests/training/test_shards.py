"""Sharded tensors on disk: what is read is data alone, whoever wrote the folder."""

import os
import pickle

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from memsave.training import shards

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(7), "c": torch.ones(4, dtype=torch.bfloat16)}


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def read(folder):
    like = {key: torch.zeros_like(each) for key, each in TENSORS.items()}
    return shards.read(folder, like=like, others=lambda key, shape: torch.zeros(shape))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_tensors_are_read_and_no_code_of_a_stranger_runs(tmp_path):
    shards.write(TENSORS, tmp_path / "shards")
    assert all(torch.equal(each, TENSORS[key]) for key, each in read(tmp_path / "shards").items())
    path, canary = tmp_path / "shards" / ".metadata", tmp_path / "canary"
    metadata = pickle.loads(path.read_bytes())
    path.write_bytes(pickle.dumps(Bomb(canary)))
    with pytest.raises(pickle.UnpicklingError, match="which no checkpoint of memsave holds"):
        read(tmp_path / "shards")
    metadata.state_dict_metadata["a"] = BytesStorageMetadata()  # torch would unpickle its value without any check
    path.write_bytes(pickle.dumps(metadata))
    with pytest.raises(pickle.UnpicklingError, match="BytesStorageMetadata"):
        read(tmp_path / "shards")
    assert not canary.exists()
