"""Record what a language model does to its logits after the head, with a stand-in tensor in their place.

An allow-list has the operations and the constants. Casts, copies and sums with zeros are allowed, and operations that
result in

    l' = factor l        or        l' = cap tanh(factor l / cap)

with constants that the model's configuration names. Any other operation raises ValueError. The recorded change is then
verified on the values and on the autograd graph of the stand-in.

Recording is not replaced by a list of configuration keys with a comparison of real logits: a comparison on one text
accepts a change that acts on one row, on large values, on longer texts or in train mode only, and a learned scale that
is still one.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from memsave.ghost.gradients import upcast
from memsave.models._torch_internals import DisableTorchFunction

SAMPLE = (-1024.0, -1.0, 0.0, 0.125, 1.0, 1024.0)
REMEDY = 'give head="logits"'
FACTORS = (
    "logit_scale",
    "logits_scaling",
    "lm_head_multiplier",
    "output_multiplier",
)  # as of Cohere, Granite, Falcon-H1
CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # of Gemma, RecurrentGemma, xLSTM
CASTS = ("to", "type", "type_as", "float", "double", "half", "bfloat16", "contiguous", "clone")
STEPS = {"mul": "mul", "multiply": "mul", "div": "div", "divide": "div", "true_divide": "div", "tanh": "tanh"}
ADDS = ("add", "__add__", "__radd__")  # with a buffer of zeros, such as BART's final_logits_bias
SHAPES = ("shape", "size", "ndim", "dim", "numel", "nelement", "stride", "is_contiguous", "__len__")
PROPERTIES = ("dtype", "device", "layout", "requires_grad", "is_cuda", "is_meta", "is_sparse", "is_nested", "itemsize")
READS = (*PROPERTIES, "is_floating_point", "is_complex", "get_device", "element_size")
NODES = ("MulBackward0", "DivBackward0", "TanhBackward0", "ToCopyBackward0", "CloneBackward0", "AliasBackward0")
Step = tuple[str, float]


@dataclass(frozen=True)
class Change:
    """The map l -> cap tanh(factor l / cap), or l -> factor l without a cap."""

    factor: float = 1.0
    cap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        """Apply the change to logits."""
        logits = logits * self.factor
        return logits if self.cap is None else self.cap * (logits / self.cap).tanh()


class StandIn(Tensor):
    """A tensor (1, 1, len(SAMPLE)) in place of the logits, which records the operations on it.

    Reads of its shape return the shape of the logits, so that a change that depends on the shape is recorded.
    """

    head: str
    logits_shape: torch.Size
    steps: tuple[Step, ...]
    leaf: Tensor
    with_grad: bool
    eps: float
    """The largest machine epsilon of its dtypes so far."""
    hidden: Tensor
    """The head's input."""

    @classmethod
    def of(cls, hidden: Tensor, head: str, *, vocabulary: int) -> "StandIn":
        """A stand-in for the head's output (B, T, vocabulary) at hidden states (B, T, d).

        It requires grad if gradients are enabled.
        """
        leaf = torch.tensor(SAMPLE, dtype=hidden.dtype, device=hidden.device)[None, None]
        leaf.requires_grad_(torch.is_grad_enabled())
        made = leaf.as_subclass(cls)
        made.head, made.steps, made.leaf, made.with_grad = head, (), leaf, leaf.requires_grad
        made.hidden = hidden
        made.eps, made.logits_shape = torch.finfo(hidden.dtype).eps, torch.Size((*hidden.shape[:-1], vocabulary))
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Record the operation, or raise ValueError if it is not allowed."""
        kwargs = kwargs or {}
        mine = next(each for each in tree_leaves((args, kwargs)) if isinstance(each, StandIn))
        name = func.__self__.__name__ if func.__name__ == "__get__" else func.__name__
        with DisableTorchFunction():
            if name in CASTS and args and not isinstance(args[0], StandIn):
                return func(*args, **kwargs)  # a cast of another tensor to the dtype of the stand-in
            if name == "_base":
                return None  # logits are no view
            if name == "register_hook" and _gathers(args[1]):  # the backward goes on from the head's input
                return mine.hidden.register_hook(args[1]) if mine.hidden.requires_grad else None
            if name in SHAPES:
                logits = torch.empty(mine.logits_shape, dtype=mine.dtype, device="meta")
                return func(*tree_map(lambda each: logits if each is mine else each, args), **kwargs)
            if name in ADDS and not kwargs and all(each is mine or _is_zero(each) for each in args):
                return mine
            step = None if name in CASTS or name in READS else mine._step(name, args, kwargs)
            found = func(*args, **kwargs)
            if name in READS or not isinstance(found, Tensor):  # for instance type(), which names the dtype
                return found
            if not found.is_floating_point() or mine.with_grad != torch.is_grad_enabled():
                mine._refuse(f"are changed by `{name}` to {found.dtype}, grad enabled: {torch.is_grad_enabled()}")
            made = found.as_subclass(cls)
            made.head, made.leaf, made.with_grad = mine.head, mine.leaf, mine.with_grad
            made.logits_shape, made.hidden = mine.logits_shape, mine.hidden
            made.steps = mine.steps if step is None else (*mine.steps, step)
            made.eps = max(mine.eps, torch.finfo(found.dtype).eps)
        return made

    def _step(self, name: str, args: Any, kwargs: Any) -> Step:
        """The step that an operation adds."""
        kind = STEPS.get(name)
        if kind is None or kwargs:
            self._refuse(f"are changed by `{name}`")
        if kind == "tanh":
            return kind, math.nan
        (by,) = [each for each in args if each is not self] or [self]
        if not isinstance(by, (int, float)) or isinstance(by, bool):
            what = "a parameter" if isinstance(by, nn.Parameter) else f"a {type(by).__name__}"
            self._refuse(f"are changed by `{name}` with {what} in the place of a number")
        return kind, float(by)

    def _refuse(self, what: str) -> NoReturn:
        raise ValueError(f"the logits after {self.head} {what}; {REMEDY}")

    def change(self, config: Any) -> Change:
        """The change that the recorded operations make, checked against the configuration, the graph and the values."""
        change = self._change(named(config, FACTORS), named(config, CAPS))
        self._check_graph()
        with DisableTorchFunction():
            found, expected = upcast(self.detach()), change(upcast(self.leaf.detach()))
            if found.shape != expected.shape or not bool(close(found, expected, self.eps)):
                self._refuse(f"come out as {found.flatten().tolist()} where {expected.flatten().tolist()} is expected")
        return change

    def _change(self, factors: Iterable[float], caps: Iterable[float]) -> Change:
        steps, cap = list(self.steps), None
        if any(kind == "tanh" for kind, _ in steps):
            last, steps = steps[-3:], steps[:-3]
            cap = last[0][1]
            if [kind for kind, _ in last] != ["div", "tanh", "mul"] or cap != last[2][1] or cap not in caps:
                self._refuse(f"are changed by `tanh` otherwise than by a soft cap of {' or '.join(CAPS)}")
        factor = 1.0
        for kind, by in steps:
            if by != 1 and by not in factors:
                self._refuse(f"are changed by `{kind}` with {by:g}, which is none of {', '.join(FACTORS)}")
            factor = factor * by if kind == "mul" else factor / by
        return Change(factor, cap)

    def _check_graph(self) -> None:
        """Raise ValueError if the autograd graph contains other operations than the recorded ones."""
        if not self.with_grad:
            return
        with DisableTorchFunction():
            node: Any = self.grad_fn
            while node is not None and node.name() != "torch::autograd::AccumulateGrad":
                before = [each for each, _ in node.next_functions if each is not None]
                if node.name() not in NODES or len(before) != 1:
                    self._refuse(f"have the gradient of `{node.name()}`")
                (node,) = before
            if node is None or node.variable is not self.leaf:
                self._refuse("have no gradient")


def _gathers(hook: Any) -> bool:
    """Whether a gradient hook is the one by which FSDP gathers parameters; it returns the gradient unchanged."""
    return type(getattr(hook, "__self__", None)).__module__.startswith("torch.distributed.fsdp.")


def _is_zero(each: Any) -> bool:
    """Whether an operand of a sum is a constant tensor of zeros."""
    return isinstance(each, Tensor) and not isinstance(each, StandIn) and not each.requires_grad and not each.any()


def change_of(logits: Any, model: nn.Module, head: str) -> Change:
    """The change that turned the stand-in into these logits."""
    if not isinstance(logits, StandIn):
        raise ValueError(f"the logits of {type(model).__name__} are not those of {head}; {REMEDY}")
    return logits.change(getattr(model, "config", None))


def named(config: Any, keys: Iterable[str]) -> list[float]:
    """The numbers under these keys in the configuration and in its `text_config`."""
    found = [getattr(each, key, None) for each in (config, getattr(config, "text_config", None)) for key in keys]
    return [float(each) for each in found if isinstance(each, (int, float)) and not isinstance(each, bool)]


def close(one: Tensor, other: Tensor, eps: float) -> Tensor:
    """Whether two tensors agree within rounding (a boolean tensor)."""
    return torch.isclose(one.to(other.dtype), other, rtol=8 * eps, atol=eps / 100, equal_nan=True).all()
