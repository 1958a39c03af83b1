"""Keep the state of an optimizer, such as the moments of AdamW, in host memory between its steps.

    optimizer = torch.optim.AdamW(model.parameters())
    offload_optimizer(optimizer)

A step takes the parameters one after the other: the state of one is copied to the device, its update runs, and the
state is copied back, while the state of the next one arrives (on CUDA). The device thus holds the state of about two
parameters, instead of that of all. The updates are the optimizer's own, bit for bit.

Its class is then a subclass of the same name. Hooks of its steps, schedulers of the learning rate, `GradScaler`,
`state_dict` and `load_state_dict` work as before; the tensors of `state_dict` are in host memory.
"""

import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from memsave.host_bytes import is_in_host_memory
from memsave.offload._torch_internals import PLAIN_TYPES, unobserved, view_of
from memsave.offload.transfers import WAITING_BYTES, Incoming, Transfers

MIN_BYTES = 4 << 10
"""Smaller state tensors stay on the device."""


def offload_optimizer(
    optimizer: Optimizer,
    *,
    min_bytes: int = MIN_BYTES,
    folder: Path | None = None,
    waiting_bytes: int = WAITING_BYTES,
) -> None:
    """Keep the state of the optimizer in host memory from now on; the state that it has is moved at once.

    Call it before a learning rate schedule is made, which wraps the step.

    Args:
        optimizer: updates each parameter from its own gradient and state alone, like those of `torch.optim` except
            LBFGS. All of its parameters are on one device.
        min_bytes: state tensors below this size stay on the device.
        folder, waiting_bytes: see `ActivationOffload`.

    Raises ValueError for LBFGS, for an optimizer that is offloaded already, and for parameters on several devices.
    """
    kind = type(optimizer)
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError("LBFGS updates all parameters together, so its state cannot be offloaded; use another one")
    if isinstance(optimizer, _Offloaded):
        raise ValueError(f"the state of this {kind.__name__} is offloaded already")
    if "step" in vars(optimizer):
        raise ValueError(
            f"the step of this {kind.__name__} is wrapped, by a schedule of the learning rate for example; call "
            f"offload_optimizer before"
        )
    devices = {p.device for group in optimizer.param_groups for p in group["params"]}
    if len(devices) != 1:
        raise ValueError(
            f"the parameters of this {kind.__name__} are on {len(devices)} devices; give one optimizer each"
        )
    transfers = Transfers(devices.pop(), folder=folder, waiting_bytes=waiting_bytes)
    step: Any = kind.step
    one_step = getattr(step, "__wrapped__", step)  # without the hooks, which run once for all parameters
    offloaded = _OffloadedState(optimizer, one_step, transfers, min_bytes=min_bytes)
    optimizer.__class__ = type(kind.__name__, (_Offloaded, kind), {"__module__": kind.__module__})
    vars(optimizer)["_offloaded"] = offloaded
    offloaded.send_all()


def keep_state_offloaded(optimizer: Optimizer, parameter: Tensor) -> None:
    """Move a parameter's state that was assigned on the device to host memory, if the optimizer is offloaded."""
    if isinstance(optimizer, _Offloaded):
        optimizer._offloaded.send(parameter)


def finish_copies(optimizer: Optimizer) -> None:
    """Wait until the state in host memory is complete, if the optimizer is offloaded.

    `state_dict` does it, too. Other code that reads the tensors of `optimizer.state` must call it before, on CUDA.
    """
    if isinstance(optimizer, _Offloaded):
        optimizer._offloaded.transfers.synchronize()


class _Offloaded(Optimizer):
    """The methods that the class of an offloaded optimizer overrides."""

    _offloaded: "_OffloadedState"

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update the parameters one after the other."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._offloaded.step(self)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The state, with tensors in host memory."""
        self._offloaded.transfers.synchronize()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of one parameter after the other, so that the device never holds all of it."""
        entries, loaded = state_dict["state"], dict[Any, Any]()
        super().load_state_dict({**state_dict, "state": {}})
        for key in entries:
            super().load_state_dict({**state_dict, "state": {key: entries[key]}})
            self._offloaded.send_all()
            loaded.update(self.state)
        self.state.clear()  # so that the order is that of the parameters
        self.state.update(loaded)

    def __reduce__(self) -> Any:
        raise TypeError("an optimizer with offloaded state cannot be copied or pickled; use its state_dict()")


_Offloaded.step = Optimizer.profile_hook_step(_Offloaded.step)  # type: ignore[method-assign]
_Offloaded.step.hooked = True  # type: ignore[attr-defined]


class _OffloadedState:
    """Moves the state of one optimizer.

    Args:
        optimizer: the optimizer.
        one_step: its step without hooks, called with the optimizer.
        transfers: of the device of its parameters.
        min_bytes: smaller tensors stay on the device.
    """

    def __init__(
        self, optimizer: Optimizer, one_step: Callable[[Any], object], transfers: Transfers, *, min_bytes: int
    ) -> None:
        self.optimizer = weakref.ref(optimizer)
        self.one_step, self.transfers, self.min_bytes = one_step, transfers, min_bytes

    def step(self, optimizer: Any) -> None:
        """Update each parameter that has a gradient."""
        groups = optimizer.param_groups
        work = [(group, p) for group in groups for p in group["params"] if p.grad is not None]
        arriving: dict[str, Incoming] = {}
        for number, (group, parameter) in enumerate(work):
            state = optimizer.state.get(parameter, {})
            arriving = arriving or self._request(state, parameter)
            blocks = {key: state[key] for key in arriving}
            for key, incoming in arriving.items():
                state[key] = _typed(incoming.wait(), like=state[key])
            arriving = {}
            if self.transfers.is_asynchronous and number + 1 < len(work):
                following = work[number + 1][1]
                arriving = self._request(optimizer.state.get(following, {}), following)
            alone = {**group, "params": [parameter]}
            optimizer.param_groups = [alone]
            try:
                self.one_step(optimizer)
            finally:
                optimizer.param_groups = groups
                self._send(optimizer.state.get(parameter, {}), parameter, blocks)
            _refuse_changed(alone, group)
        self.transfers.release_all()

    def send_all(self) -> None:
        """Move all state that is on the device to the host."""
        optimizer = self.optimizer()
        assert optimizer is not None
        for parameter in optimizer.state:
            self.send(parameter)

    def send(self, parameter: Tensor) -> None:
        """Move the state of one parameter that is on the device to the host."""
        optimizer = self.optimizer()
        assert optimizer is not None
        self._send(optimizer.state[parameter], parameter, {})
        self.transfers.release_all()

    def _request(self, state: dict[str, Any], parameter: Tensor) -> dict[str, Incoming]:
        """Start to copy the tensors of one parameter's state to the device."""
        return {
            key: self.transfers.to_device(_bytes(value), like=parameter)
            for key, value in state.items()
            if isinstance(value, Tensor) and is_in_host_memory(value.untyped_storage())
        }

    def _send(self, state: dict[str, Any], parameter: Tensor, blocks: dict[str, Tensor]) -> None:
        """Copy the tensors of one parameter's state to the host, into the blocks that they came from or new ones."""
        for key, value in self._movable(state, parameter):
            source = _bytes(value)
            host = blocks.get(key)
            if host is None or host.dtype != value.dtype or host.stride() != value.stride():
                host = _typed(self.transfers.allocate(source), like=value)
            self.transfers.to_host(source, _bytes(host))
            state[key] = host

    def _movable(self, state: dict[str, Any], parameter: Tensor) -> Iterator[tuple[str, Tensor]]:
        for key, value in list(state.items()):
            if (
                isinstance(value, Tensor)
                and type(value) in PLAIN_TYPES
                and value.numel() > 1  # the optimizer reads a number, such as that of its steps, on the host
                and value.device == parameter.device
                and value.untyped_storage().nbytes() == value.numel() * value.element_size() >= self.min_bytes
                and not is_in_host_memory(value.untyped_storage())
            ):
                yield key, value


def _refuse_changed(after: dict[str, Any], before: dict[str, Any]) -> None:
    """Raise ValueError if the update of one parameter changed what the parameters of a group share."""
    changed = [key for key, value in after.items() if key != "params" and value is not before.get(key)]
    if changed:
        raise ValueError(
            f"the optimizer's step changes {changed[0]!r} of its parameter groups, which it would do for each "
            f"parameter alone; its state cannot be offloaded"
        )


def _bytes(tensor: Tensor) -> Tensor:
    """The bytes of a tensor that fills its storage, uint8."""
    storage = tensor.untyped_storage()
    with unobserved():
        return view_of(storage, tensor, dtype=torch.uint8, offset=0, size=(storage.nbytes(),), stride=(1,))


def _typed(block: Tensor, *, like: Tensor) -> Tensor:
    """The bytes as a tensor with the dtype and strides of `like`, on its own device."""
    with unobserved():
        return view_of(
            block.untyped_storage(), block, dtype=like.dtype, offset=0, size=like.shape, stride=like.stride()
        )
