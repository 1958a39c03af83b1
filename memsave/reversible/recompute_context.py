"""The state of one forward call of a reversible sequence, from which backward rebuilds the activations.

**Mechanism.** The forward runs once and builds the ordinary autograd graph. While a step runs, a saved-tensor hook
replaces every tensor that autograd would save by a `Handle` (context, step, position). When backward opens the first
handle of a step, the context rebuilds that step: it takes the stream after the step, evaluates the step once more,
stores the tensors that this evaluation saves until their handles are opened, and inverts the step, which gives the
stream before it. Autograd opens the steps from last to first. Therefore each step is evaluated exactly once, and the
tensors of only one step are alive at a time. Handles may also be opened in another order or repeatedly (retain_graph,
double backward): the context then starts again from the output, or from the nearest anchor, and inverts the steps
between.

**Ownership.** Graph nodes hold handles and handles hold the context. The context must not hold a tensor that has a
grad_fn: node -> handle -> context -> tensor -> node would be a reference cycle through C++, which Python's garbage
collector cannot see, and no activation would ever be freed. For this reason steps are rebuilt from detached leaves
(`steps.py`), and the output and the anchors are saved tensors of a separate graph node (`stream_nodes.py`). Because
they are saved tensors, other saved-tensor hooks (a checkpoint around the sequence, offloading to the CPU) apply to
them, too. The node of the output is part of the graph and runs before all steps: the context then takes the output
over, and autograd frees its own reference unless the graph is retained.

Autograd runs the nodes of each device in a thread of its own. A branch that computes partly on another device may
therefore open a handle after autograd has gone on to earlier steps. The context then holds what was kept for it until
the graph is freed, so that it can start again.

Steps of the fused engine (`fused.py`) save nothing. Each has its own node, which calls `differentiate`.

The state belongs to the call and never to a module, so several forwards before one backward are independent.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from threading import RLock
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from memsave.reversible._torch_internals import version_of
from memsave.reversible.coupling import Stream
from memsave.reversible.replay import Replay
from memsave.reversible.stream_nodes import attach_output, keep_tensors, kept_tensors, with_strides

Saved = list[tuple[Tensor, int | None] | None]
"""(tensor, version) of each tensor that a rebuilt step saved; None once its handle was opened."""
GradientFunction = Callable[..., tuple[Stream, Tensor, Sequence[Tensor]]]


class Rebuild(NamedTuple):
    """What a step needs to be evaluated again."""

    restored_state: Callable[[], AbstractContextManager[Any]]
    """Context manager: random numbers, autocast and tensors are those of the forward."""
    saving: Callable[[], AbstractContextManager[Any]]
    """The same with gradients enabled; it also records the tensors that autograd saves."""
    is_incomplete: Callable[[], bool]
    """Whether fewer tensors were saved so far than in the forward."""
    requires_grad: tuple[bool, bool]
    """Whether (target, source) required a gradient in the forward."""


class Step(Protocol):
    """One step of the stream, with the engine that differentiates it."""

    @property
    def name(self) -> str:
        """Its name in error messages."""

    def modules(self) -> Iterator[nn.Module]:
        """All modules that the step reads."""

    def forward(self, stream: Stream) -> Stream:
        """Return the stream after the step."""

    def inverse(self, stream: Stream) -> Stream:
        """Return the stream before the step; random numbers are drawn anew."""

    def record(self, stream: Stream, context: "RecomputeContext", number: int) -> Stream:
        """`forward` as step `number` of the context: backward asks the context for what the step does not save."""

    def rebuild(self, stream: Stream, rebuild: Rebuild, *, undo: bool) -> Stream:
        """Evaluate the step again and return the stream before it.

        `stream` is the stream after the step with `undo`, and the stream before it without.
        """


class Handle(NamedTuple):
    """Takes the place of a saved tensor in the graph: number `position` of those that the step saved."""

    context: "RecomputeContext"
    step: int
    position: int


class StepRecord(NamedTuple):
    """One step of one call: the state for its second evaluation, and the tensors that the first one saved."""

    step: Step
    replay: Replay
    requires_grad: tuple[bool, bool]
    saved: list[tuple[torch.Size, torch.dtype]]


class RecomputeContext:
    """One call of a sequence: its step records, output and anchors, and the rebuilt stream during backward.

    Stage k of the stream is the stream after the first k steps.
    """

    def __init__(self) -> None:
        self.records: list[StepRecord] = []
        self.kept: dict[int, Tensor] = {}  # by stage: an empty tensor whose grad_fn holds the stream
        self.template: Stream | None = None  # has the dtype and grid of the stream, and empty halves
        self.stream: Stream | None = None  # the rebuilt stream at `stage`
        self.stage = 0
        self.is_loaded = False  # whether the stream was kept, not rebuilt
        self.strides: dict[int, list[tuple[int, ...]]] = {}  # of the halves, by stage
        self.rebuilt: Saved = []  # of step `rebuilt_step`
        self.rebuilt_step = -1
        self.reopened = False  # whether a handle of that step was opened twice: no tensor is freed early then
        self.device: torch.device | None = None  # of the stream
        self.several_devices = False  # whether a step saved tensors of another device
        self.held: dict[int, tuple[Tensor, ...]] = {}  # by stage, what was kept, if there are several devices
        self.lock = RLock()  # autograd runs nodes of different devices in different threads

    def run(self, step: Step, stream: Stream) -> Stream:
        """Run one step of the forward; every tensor that it would save is replaced by a handle."""
        replay = Replay(step.modules(), name=step.name, device=stream.source.device)
        number, self.device = len(self.records), stream.source.device
        requires_grad = (stream.target.requires_grad, stream.source.requires_grad)
        self.records.append(StepRecord(step, replay, requires_grad, []))
        self.strides[number] = [half.stride() for half in stream.halves()]
        after = step.record(stream, self, number)
        replay.finalize()
        return after

    def saving_handles(self, number: int) -> saved_tensors_hooks:
        """Context manager: autograd saves handles of step `number` in the place of tensors; parameters are saved."""
        saved = self.records[number].saved

        def pack(tensor: Tensor) -> tuple[Tensor, int | None] | Handle:
            if isinstance(tensor, nn.Parameter):  # it stays alive in any case
                return tensor, version_of(tensor)
            saved.append((tensor.shape, tensor.dtype))
            self.several_devices |= tensor.device != self.device
            return Handle(self, number, len(saved) - 1)

        return saved_tensors_hooks(pack, _unpack)

    def keep(self, stream: Stream, output: Tensor | None = None) -> Tensor:
        """Store the current stream, in the form of the output if that has the stream's dtype; returns the holder."""
        stage = len(self.records)
        self.strides[stage] = [half.stride() for half in stream.halves()]
        empty = torch.empty(0)
        self.template = stream.pair(empty, empty)
        if output is not None and output.dtype == stream.target.dtype:
            tensors = [output.detach()]
        else:
            tensors = [half.detach() for half in stream.halves()]
        kept = self.kept[stage] = keep_tensors(tensors, on_backward=self.load_output)
        return kept

    def merge(self, stream: Stream) -> Tensor:
        """The output of the sequence (B, C, ...): the halves of the last stream, in the dtype of the input."""
        with torch.no_grad():
            output = stream.merge()
        return attach_output(output, self.keep(stream, output), stream)

    def open(self, step: int, position: int) -> Tensor:
        """Return tensor `position` of those that the step saved, rebuilding the step if necessary."""
        record = self.records[step]
        if len(self.records) not in self.kept:
            raise RuntimeError(
                f"{record.step.name} calls backward inside its own forward, before there is an output to rebuild its "
                f"activations from; set recompute=False for that sequence"
            )
        with self.lock:
            if self.rebuilt_step != step:
                self._rebuild(step)
                self.reopened = False
            elif self.rebuilt[position] is None:
                self._rebuild(step)
                self.reopened = True
            entry = self.rebuilt[position]
            assert entry is not None
            if not self.reopened:
                self.rebuilt[position] = None
        tensor, version = entry
        if version_of(tensor) != version:
            raise RuntimeError(
                f"a tensor of shape {tuple(tensor.shape)} that {record.step.name} needs for its backward is changed "
                f"in place later in the same step; make that layer's operation out of place"
            )
        return tensor

    def differentiate(self, step: int, gradients: GradientFunction, grad: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        """Call `gradients(stream, grad, undo=...)` of a step that saves nothing, in the state of its forward.

        `grad` is the gradient of the step's target. Returns the gradients of its source and of its tensors. The stream
        is then at the stage before the step.
        """
        with self.lock:
            self.rebuilt, self.rebuilt_step = [], -1
            undo = not self._has_input(step)
            self._move_to(step + 1 if undo else step)
            assert self.stream is not None
            held = [self.stream]
            if undo:
                self.stream = None  # the step holds the only reference, so that it can free the stream early
            with self.records[step].replay.restored_state():
                before, grad_source, grad_tensors = gradients(held.pop(), grad, undo=undo)
            if undo:
                self.stream, self.stage, self.is_loaded = self._with_first_strides(before, step), step, False
            if step == 0:  # no step is left to be rebuilt, and the graph may live on
                self.stream = None
        return grad_source, grad_tensors

    def rebuilt_streams(self) -> Iterator[tuple[int, Stream]]:
        """Yield (step number, the rebuilt stream before it) from the last step to the first, as backward rebuilds."""
        for step in reversed(range(len(self.records))):
            self._move_to(step + 1)
            self._step_back()
            assert self.stream is not None
            yield step, self.stream

    def load_output(self) -> None:
        """Take the output over when backward begins, so that autograd may free its reference."""
        with self.lock:
            self.rebuilt, self.rebuilt_step = [], -1
            self._load(len(self.records))

    def _rebuild(self, step: int) -> None:
        self.rebuilt, self.rebuilt_step = [], -1  # free the last rebuilt step before this one allocates
        saved: Saved = []
        if self._has_input(step):
            self._move_to(step)
            assert self.stream is not None
            self._evaluate(self.stream, saved=saved, undo=False)
        else:
            self._move_to(step + 1)
            self._step_back(saved=saved)
        _check_saved(self.records[step], saved)
        self.rebuilt, self.rebuilt_step = saved, step

    def _has_input(self, step: int) -> bool:
        """Whether the stream before the step is available: as an anchor, or because it was just rebuilt."""
        return step in self.kept or (self.stream is not None and self.stage == step)

    def _move_to(self, stage: int) -> None:
        """Bring the stream to `stage`, from the current stream or from the nearest one that is kept."""
        nearest = min(kept for kept in self.kept if kept >= stage)
        is_usable = self.stream is not None and stage <= self.stage <= nearest
        if not is_usable or (nearest == stage and not self.is_loaded):
            self._load(nearest)
        while self.stage > stage:
            self._step_back()

    def _load(self, stage: int) -> None:
        """Set the stream to the one that is kept for this stage."""
        try:
            tensors = self.held[stage] if stage in self.held else kept_tensors(self.kept[stage])
        except RuntimeError as error:
            if "modified by an inplace operation" not in str(error):
                raise
            raise RuntimeError(
                f"the output of the reversible sequence was changed in place after {self.records[-1].step.name}, "
                f"and backward rebuilds the activations from it; use an operation that is not in place there, or pass "
                f"it a clone of the output"
            ) from error
        if self.several_devices:
            self.held[stage] = tensors
        assert self.template is not None
        if len(tensors) == 1:  # copies: a view of one half would hold both
            tensors = tuple(half.clone() for half in tensors[0].chunk(2, dim=1))
        self.stream = self._with_first_strides(self.template.pair(*tensors), stage)
        self.stage, self.is_loaded = stage, True

    def _with_first_strides(self, stream: Stream, stage: int) -> Stream:
        """The halves with the strides of the forward: dropout, for example, draws numbers in memory order."""
        halves = zip(stream.halves(), self.strides[stage], strict=True)
        return stream.pair(*(with_strides(half, strides) for half, strides in halves))

    def _step_back(self, *, saved: Saved | None = None) -> None:
        """Invert the last step; with `saved`, append the tensors that its evaluation saves."""
        assert self.stream is not None
        after, self.stream = self.stream, None  # stays None if the step raises
        self.stage, self.is_loaded = self.stage - 1, False
        self.stream = self._with_first_strides(self._evaluate(after, saved=saved, undo=True), self.stage)

    def _evaluate(self, stream: Stream, *, saved: Saved | None, undo: bool) -> Stream:
        """Evaluate step number `stage` again; returns the stream before it."""
        record = self.records[self.stage]
        rebuild = Rebuild(
            restored_state=record.replay.restored_state,
            saving=partial(_saving, record.replay, saved),
            is_incomplete=lambda: saved is not None and len(saved) < len(record.saved),
            requires_grad=record.requires_grad,
        )
        return record.step.rebuild(stream, rebuild, undo=undo)


@contextmanager
def _saving(replay: Replay, saved: Saved | None) -> Iterator[None]:
    def pack(tensor: Tensor) -> None:
        if saved is not None and not isinstance(tensor, nn.Parameter):
            saved.append((tensor.detach(), version_of(tensor)))

    # Gradients are enabled even when nothing is recorded, because the kernels must be those of the forward.
    with torch.enable_grad(), saved_tensors_hooks(pack, _never_opened), replay.restored_state():
        yield


def _unpack(packed: tuple[Tensor, int | None] | Handle) -> Tensor:
    if isinstance(packed, Handle):
        return packed.context.open(packed.step, packed.position)
    parameter, version = packed
    if version_of(parameter) != version:
        raise RuntimeError(
            f"a parameter of shape {tuple(parameter.shape)} was changed in place between forward and backward; run "
            f"backward before the optimizer's step"
        )
    return parameter


def _never_opened(packed: None) -> Tensor:
    raise RuntimeError(
        "backward reached a tensor that a branch stored elsewhere while its activations were rebuilt; return it from "
        "the branch or read it before backward, or set recompute=False"
    )


def _check_saved(record: StepRecord, saved: Saved) -> None:
    again = [(entry[0].shape, entry[0].dtype) for entry in saved if entry is not None]
    if again != record.saved:
        raise RuntimeError(
            f"{record.step.name} saved {len(again)} tensors when rebuilt and {len(record.saved)} or others the first "
            f"time; make it deterministic for equal inputs (no internal state, no change of requires_grad or training "
            f"mode before backward), or set recompute=False"
        )
