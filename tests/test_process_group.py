"""Processes of torchrun, mpirun and srun: which of them form a group, and the device of each."""

import pytest
import torch

from memsave import process_group
from memsave.config import ConfigError
from memsave.process_group import own_device, start_group

TORCHRUN = {"RANK": "0", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1", "WORLD_SIZE": "2"}


@pytest.fixture
def launched(monkeypatch):
    """Start the group with these variables; returns the arguments of `init_process_group`, or None."""
    started = []

    def init(backend, **options):
        started.append((backend, options))

    def call(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        return start_group(), started

    monkeypatch.setattr(process_group.distributed, "init_process_group", init)
    return call


@pytest.mark.parametrize("variables", [{}, {**TORCHRUN, "WORLD_SIZE": "1"}, {"OMPI_COMM_WORLD_SIZE": "1"}])
def test_a_single_process_needs_no_group(launched, variables):
    assert launched(**variables) == (False, [])


@pytest.mark.parametrize(("cuda", "backend"), [(False, "gloo"), (True, "cpu:gloo,cuda:nccl")])
def test_torchrun_starts_a_group(launched, monkeypatch, cuda, backend):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(process_group.distributed, "is_nccl_available", lambda: True)
    assert launched(**TORCHRUN, SLURM_STEP_NUM_TASKS="2") == (True, [(backend, {"timeout": process_group.TIMEOUT})])


@pytest.mark.parametrize(
    "variables",
    [
        {"OMPI_COMM_WORLD_SIZE": "2"},
        {"SLURM_STEP_NUM_TASKS": "2"},
        {"WORLD_SIZE": "2", "RANK": "0"},
        {**TORCHRUN, "WORLD_SIZE": "1", "SLURM_STEP_NUM_TASKS": "2"},  # each task of srun has a torchrun of its own
    ],
)
def test_processes_of_another_launcher_are_refused(launched, variables):
    with pytest.raises(
        ConfigError, match=r"one of several \(\w+=2\) without torchrun, .* start one, or several by torc"
    ):
        launched(**variables)


def test_each_process_has_the_gpu_of_its_number(monkeypatch):
    cuda, chosen = torch.device("cuda"), []
    assert own_device(cuda) == cuda  # a single process
    monkeypatch.setattr(process_group, "process_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert own_device(torch.device("cpu")) == torch.device("cpu")
    assert own_device(cuda) == torch.device("cuda", 1) and chosen == [1]
    with pytest.raises(
        ConfigError, match=r"trainer\.device=cuda:1 is one GPU for 3 processes; give trainer\.device=cuda"
    ):
        own_device(torch.device("cuda:1"), key="trainer.device")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ConfigError, match="process 2 of this computer finds no GPU of its own among 2; start"):
        own_device(cuda)
