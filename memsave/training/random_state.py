"""The random state of a run: PyTorch's default generators on the CPU and on the model's device."""

import torch
from torch import Tensor, nn

CPU = torch.device("cpu")


def get_random_state(model: nn.Module) -> dict[str, Tensor]:
    """The states by device type, as uint8 tensors on the CPU."""
    device = next(model.parameters()).device
    states = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        states[device.type] = torch.get_device_module(device).get_rng_state(device)
    return states


def set_random_state(model: nn.Module, states: dict[str, Tensor]) -> None:
    """Restore the generators of the CPU and of the model's device from `states`."""
    device = next(model.parameters()).device
    torch.set_rng_state(states["cpu"])
    if device.type != "cpu" and device.type in states:
        torch.get_device_module(device).set_rng_state(states[device.type], device)
