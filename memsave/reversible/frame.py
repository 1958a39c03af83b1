"""One forward call of a reversible sequence, seen from its backward.

How it works. The forward runs once and builds the ordinary autograd graph. While a branch runs, a saved-tensor hook
replaces every tensor that autograd would save by a `Handle` (frame, branch, place). The first handle of a branch that
backward opens makes the frame rebuild: it takes the stream behind that branch, evaluates the branch once more, keeps
the tensors that this evaluation saves until their handles are opened, and subtracts the branch's value to get the
stream before it. Autograd opens the branches last to first, so each is evaluated exactly once, and only one branch's
tensors are alive at a time. Handles opened in any other order, or again (retain_graph, double backward), are served
too: the frame walks down from the output again.

Who holds whom. Graph nodes hold handles, handles hold the frame, and the frame holds no tensor that has a grad_fn:
otherwise node -> handle -> frame -> tensor -> node would be a cycle through C++ that Python's collector cannot see,
and no activation would ever be freed. Hence the `detach` in `_evaluate`, and hence the output is held by `_Keep`, a
graph node of its own that leads nowhere. Since it holds the output by autograd's own means, whoever redirects saved
tensors (a checkpoint around the sequence, offloading to the CPU) redirects this one, too.

State lives here, in the call, and never on a module: several forwards before one backward do not meet.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from memsave.reversible.coupling import Branch, Stream
from memsave.reversible.replay import Replay


class Handle(NamedTuple):
    """Stands in the graph for a tensor that a branch saved, by its place among them."""

    frame: "Frame"
    branch: int
    place: int


class Record(NamedTuple):
    """One branch of one call: how to evaluate it again, and what it saved the first time."""

    replay: Replay
    requires_grad: bool
    saved: list[tuple[torch.Size, torch.dtype]]


class Frame:
    """What one call of a sequence needs for its backward: its records, its output, and the rebuilt stream."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.kept: Tensor | None = None  # an empty tensor; its grad_fn is the _Keep node that holds the output
        self.dtype = torch.float32
        self.stream: Stream | None = None  # behind the first `stage` branches
        self.stage = 0
        self.rebuilt: list[tuple[Tensor, int] | None] = []  # (tensor, version) of branch `opened`, None once used
        self.opened = -1

    def run(self, branch: Branch, stream: Stream, *, name: str) -> Stream:
        """Take one half-step of the forward, with a handle in the place of every tensor that it saves."""
        replay = Replay(branch, name=name, device=stream.source.device)
        record = Record(replay, stream.source.requires_grad, [])
        number = len(self.records)
        self.records.append(record)

        def pack(tensor: Tensor) -> tuple[Tensor, int] | Handle:
            if isinstance(tensor, nn.Parameter):  # alive anyhow
                return tensor, tensor._version
            record.saved.append((tensor.shape, tensor.dtype))
            return Handle(self, number, len(record.saved) - 1)

        with saved_tensors_hooks(pack, _unpack):
            after = stream.step(branch)
        replay.settle()
        return after

    def keep(self, stream: Stream, output: Tensor) -> None:
        """Hold the end of the stream: the caller's output where that is wide enough, else the stream itself."""
        self.dtype = stream.dtype
        whole = output.dtype == stream.target.dtype
        held = (output.detach(),) if whole else (stream.target.detach(), stream.source.detach())
        self.kept = _Keep.apply(torch.empty(0, requires_grad=True), *held)

    def open(self, branch: int, place: int) -> Tensor:
        """Return the tensor that the branch saved at `place`, rebuilding the branch when needed."""
        if self.opened != branch or self.rebuilt[place] is None:
            self._rebuild(branch)
        entry, self.rebuilt[place] = self.rebuilt[place], None
        assert entry is not None
        tensor, version = entry
        if tensor._version != version:
            raise RuntimeError(
                f"a tensor of shape {tuple(tensor.shape)} that {self.records[branch].replay.name} needs for its "
                f"backward is changed in place later in the same branch; make that layer's operation out of place"
            )
        return tensor

    def _rebuild(self, branch: int) -> None:
        self.rebuilt, self.opened = [], -1  # let go of the last branch before this one grows
        if self.stream is not None and self.stage == branch:
            self._collect(self.stream)  # its input is at hand: it has been rebuilt before, and is wanted again
            return
        if self.stream is None or self.stage < branch:
            self._load()
        while self.stage > branch + 1:
            self._step_back(collect=False)
        self._step_back(collect=True)

    def _load(self) -> None:
        """Start from the output again."""
        assert self.kept is not None and self.kept.grad_fn is not None
        try:
            held = self.kept.grad_fn.saved_tensors  # type: ignore[attr-defined]
        except RuntimeError as error:
            if "modified by an inplace operation" not in str(error):
                raise
            raise RuntimeError(
                f"the output of the reversible sequence was changed in place after {self.records[-1].replay.name}, "
                f"and backward rebuilds the activations from it; use an operation that is not in place there, or pass "
                f"it a clone of the output"
            ) from error
        target, source = held if len(held) == 2 else Stream.split(held[0]).halves()
        self.stream = Stream(target, source, self.dtype)
        self.stage = len(self.records)

    def _step_back(self, *, collect: bool) -> None:
        """Undo the last half-step; with `collect`, keep what its branch saves on the way."""
        assert self.stream is not None
        before = self.stream.rewound()
        self.stage -= 1
        self.stream = None  # until it is whole again, in case the branch raises
        value = self._collect(before) if collect else self._evaluate(before, saved=None)
        with torch.no_grad():
            self.stream = before.subtract(value)

    def _collect(self, stream: Stream) -> Tensor:
        """Evaluate the branch at the source of `stream`, which stands before it, and keep what the branch saves."""
        saved: list[tuple[Tensor, int] | None] = []
        value = self._evaluate(stream, saved=saved)
        _check(self.records[self.stage], saved)
        self.rebuilt, self.opened = saved, self.stage
        return value

    def _evaluate(self, stream: Stream, *, saved: list[tuple[Tensor, int] | None] | None) -> Tensor:
        """The value of branch number `stage` at the source of `stream`."""
        record = self.records[self.stage]
        x = stream.branch_input().detach().requires_grad_(record.requires_grad)

        def pack(tensor: Tensor) -> None:
            if saved is not None and not isinstance(tensor, nn.Parameter):
                saved.append((tensor.detach(), tensor._version))

        # With grad enabled even when nothing is collected: the same kernels then run as in the forward.
        with torch.enable_grad(), saved_tensors_hooks(pack, _never_opened):
            return record.replay.evaluate(x).detach()


class _Keep(torch.autograd.Function):
    """Holds tensors as autograd's saved tensors, on a node that no loss depends on."""

    @staticmethod
    def forward(ctx, anchor, *tensors):
        ctx.save_for_backward(*tensors)
        return anchor.clone()

    @staticmethod
    def backward(ctx, *grads):
        raise AssertionError("no loss depends on this node")


def _unpack(packed: tuple[Tensor, int] | Handle) -> Tensor:
    if isinstance(packed, Handle):
        return packed.frame.open(packed.branch, packed.place)
    parameter, version = packed
    if parameter._version != version:
        raise RuntimeError(
            f"a parameter of shape {tuple(parameter.shape)} was changed in place between forward and backward; run "
            f"backward before the optimizer's step"
        )
    return parameter


def _never_opened(packed: None) -> Tensor:
    raise RuntimeError(
        "backward reached a tensor that a branch put aside while its activations were rebuilt; return it from the "
        "branch or read it before backward, or set recompute=False"
    )


def _check(record: Record, saved: list[tuple[Tensor, int] | None]) -> None:
    again = [(entry[0].shape, entry[0].dtype) for entry in saved if entry is not None]
    if again != record.saved:
        raise RuntimeError(
            f"{record.replay.name} saved {len(again)} tensors when rebuilt and {len(record.saved)} "
            f"or others the first time; make it do the same each time it is given the same input (no state of its own, "
            f"no change of requires_grad or training mode before backward), or set recompute=False"
        )
