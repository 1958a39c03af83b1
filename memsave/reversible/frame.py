"""One forward call of a reversible sequence, seen from its backward.

How it works. The forward runs once and builds the ordinary autograd graph. While a step runs, a saved-tensor hook
replaces every tensor that autograd would save by a `Handle` (frame, step, place). The first handle of a step that
backward opens makes the frame rebuild: it takes the stream behind that step, evaluates the step once more, keeps the
tensors that this evaluation saves until their handles are opened, and undoes the step to get the stream before it.
Autograd opens the steps last to first, so each is evaluated exactly once, and only one step's tensors are alive at a
time. Handles opened in any other order, or again (retain_graph, double backward), are served too: the frame walks down
from the output, or from the nearest anchor, again.

Who holds whom. Graph nodes hold handles, handles hold the frame, and the frame holds no tensor that has a grad_fn:
otherwise node -> handle -> frame -> tensor -> node would be a cycle through C++ that Python's collector cannot see,
and no activation would ever be freed. Hence the leaves in `steps.py`, and hence output and anchors are held by `_Keep`,
a graph node of its own that leads nowhere. Since it holds them by autograd's own means, whoever redirects saved tensors
(a checkpoint around the sequence, offloading to the CPU) redirects these, too. The node of the output is a part of the
graph: `_Merge` leads to it, so that it is run before all steps; the frame takes the output over there, and then
autograd lets go of it, unless the graph is retained.

Steps of the fused engine (`fused.py`) save nothing and have a node of their own, which asks the frame for gradients.

State lives here, in the call, and never on a module: several forwards before one backward do not meet.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple, cast
from weakref import ref

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from memsave.reversible.coupling import Stream, memory_format
from memsave.reversible.fused import FusedHalfStep
from memsave.reversible.replay import Replay
from memsave.reversible.steps import HookedStep, Rebuild, Step

Saved = list[tuple[Tensor, int] | None]
"""(tensor, version) of what a rebuilt step saved, None once used."""


class Handle(NamedTuple):
    """Stands in the graph for a tensor that a step saved, by its place among them."""

    frame: "Frame"
    step: int
    place: int


class Record(NamedTuple):
    """One step of one call: how to evaluate it again, and what it saved the first time."""

    step: Step
    replay: Replay
    needs: tuple[bool, bool]
    saved: list[tuple[torch.Size, torch.dtype]]


class Frame:
    """What one call of a sequence needs for its backward: its records, output and anchors, and the rebuilt stream."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.kept: dict[int, Tensor] = {}  # by stage: an empty tensor, whose grad_fn is the _Keep node with the stream
        self.like: Stream | None = None  # of the kind of the stream, without halves of its own
        self.stream: Stream | None = None  # behind the first `stage` steps
        self.stage = 0
        self.fresh = False  # whether the stream was loaded, and not rebuilt
        self.strides: dict[int, list[tuple[int, ...]]] = {}  # of the halves, by stage
        self.rebuilt: Saved = []  # of step `opened`
        self.opened = -1
        self.reread = False  # whether a handle of that step was opened twice: nothing is let go of early then

    def run(self, step: Step, stream: Stream) -> Stream:
        """Take one step of the forward, with a handle in the place of every tensor that it saves."""
        replay = Replay(step.modules(), name=step.name, device=stream.source.device)
        record = Record(step, replay, (stream.target.requires_grad, stream.source.requires_grad), [])
        number = len(self.records)
        self.records.append(record)
        self.strides[number] = [half.stride() for half in stream.halves()]
        if isinstance(step, FusedHalfStep):
            after = step.run(stream, self, number)
            replay.settle()
            return after

        def pack(tensor: Tensor) -> tuple[Tensor, int] | Handle:
            if isinstance(tensor, nn.Parameter):  # alive anyhow
                return tensor, tensor._version
            record.saved.append((tensor.shape, tensor.dtype))
            return Handle(self, number, len(record.saved) - 1)

        with saved_tensors_hooks(pack, _unpack):
            after = step.forward(stream)
        replay.settle()
        return after

    def keep(self, stream: Stream, output: Tensor | None = None) -> Tensor:
        """Hold the stream as it is now: by the output where that is given and wide enough. Returns what holds it."""
        self.strides[len(self.records)] = [half.stride() for half in stream.halves()]
        nothing = torch.empty(0)
        self.like = stream.pair(nothing, nothing)
        whole = output is not None and output.dtype == stream.target.dtype
        held = [output.detach()] if whole else [half.detach() for half in stream.halves()]  # type: ignore[union-attr]
        kept = self.kept[len(self.records)] = _Keep.apply(ref(self), torch.empty(0, requires_grad=True), *held)
        return kept

    def merge(self, stream: Stream) -> Tensor:
        """The output: the halves of the last stream joined, in the dtype that came in."""
        with torch.no_grad():
            output = stream.merge()
        return _Merge.apply(output, self.keep(stream, output), *stream.halves())

    def open(self, step: int, place: int) -> Tensor:
        """Return the tensor that the step saved at `place`, rebuilding the step when needed."""
        if len(self.records) not in self.kept:
            raise RuntimeError(
                f"{self.records[step].step.name} differentiates inside its own forward, before there is an output to "
                f"rebuild its activations from; set recompute=False for that sequence"
            )
        if self.opened != step:
            self._rebuild(step)
            self.reread = False
        elif self.rebuilt[place] is None:
            self._rebuild(step)
            self.reread = True
        entry = self.rebuilt[place]
        assert entry is not None
        if not self.reread:
            self.rebuilt[place] = None
        tensor, version = entry
        if tensor._version != version:
            raise RuntimeError(
                f"a tensor of shape {tuple(tensor.shape)} that {self.records[step].step.name} needs for its "
                f"backward is changed in place later in the same step; make that layer's operation out of place"
            )
        return tensor

    def differentiate(self, step: int, grad: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        """The gradients that a fused step passes on, of its source and its branch's tensors, from that of its target.

        The stream goes back past the step.
        """
        self.rebuilt, self.opened = [], -1
        record = self.records[step]
        assert isinstance(record.step, FusedHalfStep)
        undo = not self._has_input(step)
        self._reach(step + 1 if undo else step)
        assert self.stream is not None
        held = [self.stream]
        if undo:
            self.stream = None  # so that the step alone holds it
        with record.replay.again():
            before, by_source, by_tensors = record.step.gradients(held.pop(), grad, undo=undo)
        if undo:
            self.stream, self.stage, self.fresh = self._laid_out(before, step), step, False
        return by_source, by_tensors

    def walk_back(self) -> Iterator[tuple[int, Stream]]:
        """(number of a step, the stream before it) for all steps, last to first, rebuilt as in a backward."""
        for step in reversed(range(len(self.records))):
            self._reach(step + 1)
            self._step_back()
            assert self.stream is not None
            yield step, self.stream

    def _rebuild(self, step: int) -> None:
        self.rebuilt, self.opened = [], -1  # let go of the last step before this one grows
        saved: Saved = []
        if self._has_input(step):
            self._reach(step)
            assert self.stream is not None
            self._evaluate(self.stream, saved=saved, undo=False)
        else:
            self._reach(step + 1)
            self._step_back(saved=saved)
        _check(self.records[step], saved)
        self.rebuilt, self.opened = saved, step

    def _has_input(self, step: int) -> bool:
        """Whether the stream before the step is at hand: an anchor, or rebuilt before and wanted again."""
        return step in self.kept or (self.stream is not None and self.stage == step)

    def _reach(self, stage: int) -> None:
        """Have the stream behind the first `stage` steps: from what is at hand, or from what is kept."""
        nearest = min(kept for kept in self.kept if kept >= stage)
        at_hand = self.stream is not None and stage <= self.stage <= nearest
        if not at_hand or (nearest == stage and not self.fresh):
            self._load(nearest)
        while self.stage > stage:
            self._step_back()

    def load(self) -> None:
        """Take the output over, when backward begins; whoever held it may let go of it."""
        self.rebuilt, self.opened = [], -1
        self._load(len(self.records))

    def _load(self, stage: int) -> None:
        """Start from what is kept of this stage."""
        try:
            held = self.kept[stage].grad_fn.saved_tensors  # type: ignore[union-attr]
        except RuntimeError as error:
            if "modified by an inplace operation" not in str(error):
                raise
            raise RuntimeError(
                f"the output of the reversible sequence was changed in place after {self.records[-1].step.name}, "
                f"and backward rebuilds the activations from it; use an operation that is not in place there, or pass "
                f"it a clone of the output"
            ) from error
        assert self.like is not None
        self.stream = self._laid_out(
            self.like.pair(*(held if len(held) == 2 else Stream.split(held[0]).halves())), stage
        )
        self.stage, self.fresh = stage, True

    def _laid_out(self, stream: Stream, stage: int) -> Stream:
        """The halves with the strides that they had: dropout, for one, draws its numbers in the order of memory."""
        return stream.pair(
            *(_strided(half, stride) for half, stride in zip(stream.halves(), self.strides[stage], strict=True))
        )

    def _step_back(self, *, saved: Saved | None = None) -> None:
        """Undo the last step; with `saved`, keep what it saves on the way."""
        assert self.stream is not None
        after, self.stream = self.stream, None  # until it is whole again, in case the step raises
        self.stage, self.fresh = self.stage - 1, False
        self.stream = self._laid_out(self._evaluate(after, saved=saved, undo=True), self.stage)

    def _evaluate(self, stream: Stream, *, saved: Saved | None, undo: bool) -> Stream:
        """Rebuild step number `stage`; returns the stream before it."""
        record = self.records[self.stage]
        if isinstance(record.step, FusedHalfStep):
            with record.replay.again():
                return record.step.inverse(stream) if undo else stream
        rebuild = Rebuild(
            state=record.replay.again,
            saving=partial(_saving, record.replay, saved),
            wanting=lambda: saved is not None and len(saved) < len(record.saved),
            needs=record.needs,
        )
        return cast(HookedStep, record.step).rebuild(stream, rebuild, undo=undo)


@contextmanager
def _saving(replay: Replay, saved: Saved | None) -> Iterator[None]:
    def pack(tensor: Tensor) -> None:
        if saved is not None and not isinstance(tensor, nn.Parameter):
            saved.append((tensor.detach(), tensor._version))

    # With grad enabled even when nothing is kept: the same kernels then run as in the forward.
    with torch.enable_grad(), saved_tensors_hooks(pack, _never_opened), replay.again():
        yield


class _Keep(torch.autograd.Function):
    """Holds tensors as autograd's saved tensors; when it is run, the frame takes them over."""

    @staticmethod
    def forward(ctx, frame, anchor, *tensors):
        ctx.frame = frame  # weakly: the frame holds this node
        ctx.save_for_backward(*tensors)
        return anchor.clone()

    @staticmethod
    def backward(ctx, *grads):
        frame = ctx.frame()
        if frame is not None:  # or no step is left to be rebuilt
            frame.load()
        return (None,) * len(ctx.needs_input_grad)


class _Merge(torch.autograd.Function):
    """Makes the output a function of the halves, and of `kept`, so that its `_Keep` is run next."""

    @staticmethod
    def forward(ctx, output, kept, target, source):
        ctx.dtype, ctx.layout = target.dtype, memory_format(target)
        return output.detach()  # which keeps the count of in-place changes

    @staticmethod
    def backward(ctx, *grads):
        halves = grads[0].to(ctx.dtype).chunk(2, dim=1)
        return None, torch.empty(0), *(half.contiguous(memory_format=ctx.layout) for half in halves)


def _strided(tensor: Tensor, stride: tuple[int, ...]) -> Tensor:
    """The tensor in memory as these strides say, if they leave no gaps and overlap nowhere."""
    steps = [
        (size, now, then) for size, now, then in zip(tensor.shape, tensor.stride(), stride, strict=True) if size > 1
    ]
    span = 1 + sum((size - 1) * then for size, _, then in steps)
    if all(now == then for _, now, then in steps) or not tensor.numel() or span != tensor.numel():
        return tensor
    return torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def _unpack(packed: tuple[Tensor, int] | Handle) -> Tensor:
    if isinstance(packed, Handle):
        return packed.frame.open(packed.step, packed.place)
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


def _check(record: Record, saved: Saved) -> None:
    again = [(entry[0].shape, entry[0].dtype) for entry in saved if entry is not None]
    if again != record.saved:
        raise RuntimeError(
            f"{record.step.name} saved {len(again)} tensors when rebuilt and {len(record.saved)} "
            f"or others the first time; make it do the same each time it is given the same input (no state of its own, "
            f"no change of requires_grad or training mode before backward), or set recompute=False"
        )
