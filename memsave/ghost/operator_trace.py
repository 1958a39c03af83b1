"""Follows every operator of a forward: which tensors hold examples, and which operators get a trainable parameter.

A layer whose class has a rule ends in a norm hook of its own. Every other use of a parameter is an operator that gets
the parameter, or something computed from it, together with a tensor that depends on the examples: a product, an
addition, a look-up, a concatenation. `OperatorTrace` is a TorchFunctionMode, which sees all operators. It hands such a
use to the operator's rule in `operators/`, which puts a norm hook at it. Which module owns the parameter does not
matter, nor where the examples are in its inputs.

What runs outside of PyTorch's own functions (a `torch.autograd.Function`, a scripted function) is not seen: a parameter
that it uses gets an ordinary gradient, and the backward refuses it.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from memsave.ghost import _torch_internals as internals
from memsave.ghost.backward_context import BackwardContext
from memsave.ghost.gradients import FactoredGrad, Gradient, PerSampleGrad
from memsave.ghost.norm_hook import HookSpec, NormHook, apply_norm_hook
from memsave.ghost.operators import rule_of
from memsave.ghost.operators.lookups import embedding_arguments
from memsave.ghost.operators.rule import Operator, tensors_among
from memsave.ghost.parameter_source import Lookup, Source
from memsave.ghost.refusals import LayerRefused, Refusal
from memsave.ghost.row_follower import MOVING, RowFollower
from memsave.ghost.rows import WHOLE, Lost, Provenance, Rows, RowSplit

KNOWN = "_memsave_known"  # the attribute of a tensor that holds what is known of it: (the trace, the knowledge)
UNFOLLOWED = "code that is not followed"
MOVING_GETTERS = frozenset(("T", "mT", "H", "mH", "real", "imag", "data"))
FACTORIES = frozenset(("new_zeros", "new_ones", "new_empty", "new_full", "new_tensor", "empty_like"))
SHAPED_LIKE = frozenset(("expand_as", "view_as", "reshape_as", "type_as", "to"))  # only the shape or type is read
EXPANDING = frozenset(("expand", "expand_as", "broadcast_to", "repeat", "tile"))


class Constant:
    """Marks a tensor that depends on no example and on no trainable parameter."""


CONSTANT = Constant()
Known = Rows | Lost | Source | Constant


class OperatorTrace(internals.TorchFunctionMode):
    """Follows the operators of one forward, and of its recomputations in the backward.

    Args:
        context: of the forward.
        parameters: the trainable parameters by name.
        followers: by batch size, what earlier forwards found out about operators that depend on shapes alone.
    """

    def __init__(
        self, context: BackwardContext, parameters: Mapping[str, nn.Parameter], followers: dict[int, RowFollower]
    ) -> None:
        super().__init__()
        self.context = context
        self.needed = False
        """Whether some use of a parameter was followed, so that later forwards must be followed, too."""
        self._names = {id(parameter): name for name, parameter in parameters.items()}
        self._parameters = parameters
        self._follower = followers.setdefault(context.batch_size, RowFollower(context.batch_size))
        self._token = object()
        self._operator = ""

    # What is known of a tensor.

    def mark_examples(self, tensors: Iterator[Tensor]) -> None:
        """Mark the arguments of the model: those with one entry per row in dimension 0 hold the examples."""
        for tensor in tensors:
            self.set(tensor, self.context.rows if self.context.has_rows(tensor) else CONSTANT)

    def set(self, tensor: Tensor, known: Known) -> None:
        """Record what is known of a tensor."""
        setattr(tensor, KNOWN, (self._token, known, internals.version(tensor), tensor.requires_grad))

    def known(self, tensor: Tensor) -> Known | None:
        """What is known of a tensor, or None."""
        token, known, version, had_grad = getattr(tensor, KNOWN, (None, None, 0, False))
        if token is not self._token:
            return None
        if tensor.requires_grad and (known is CONSTANT or (isinstance(known, Lost) and not had_grad)):
            return None  # an autograd.Function has made it without gradients, and returned it
        if isinstance(known, Source) and internals.version(tensor) != version:  # a view, whose base was written
            return None
        return known

    def source(self, tensor: Tensor) -> Source | None:
        """The source, if the tensor depends on trainable parameters and on no example."""
        known = self.known(tensor)
        if isinstance(known, Source):
            return known
        name = self._names.get(id(tensor))
        if name is not None:
            if not tensor.requires_grad:  # frozen in the middle of the forward
                return None
            return Source.of_parameter(name, self._parameters[name])
        if known is None and tensor.grad_fn is not None:
            self.set(tensor, self._by_graph(tensor))
            return self.source(tensor)
        return None

    def _by_graph(self, tensor: Tensor) -> Known:
        """What is known of the output of code that is not followed: a source, if its graph reaches parameters alone."""
        names: set[str] = set()
        for leaf in internals.leaves_of(tensor, stop=NormHook):
            name = self._names.get(id(leaf))
            if name is None:
                names.clear()
                break
            names.add(name)
        if names:
            parameters = {name: self._parameters[name] for name in sorted(names)}
            return Source.of_tensor(tensor, parameters)
        return self.context.rows if self.context.has_rows(tensor) else Lost(UNFOLLOWED)

    def provenance(self, tensor: Tensor) -> Provenance | None:
        """The Rows of a tensor that depends on examples; None for a constant."""
        known = self.known(tensor)
        if isinstance(known, (Rows, Lost)):
            return known
        if known is None and tensor.requires_grad and self.source(tensor) is None:
            found = self.known(tensor)
            if found is None:  # a leaf that is no parameter of the model
                return self.context.rows if self.context.has_rows(tensor) else Lost(UNFOLLOWED)
            return found if isinstance(found, (Rows, Lost)) else None
        return None

    def rows(self, tensor: Tensor) -> Rows:
        """The Rows of a tensor that depends on examples; raises LayerRefused if they are not known."""
        if self.context.batch_size == 1:
            return WHOLE
        found = self.provenance(tensor)
        if isinstance(found, Rows):
            return found
        operator = "an operator" if found is None else found.operator
        raise LayerRefused(
            f"is used together with a tensor {tuple(tensor.shape)} whose rows could not be followed to their examples "
            f"(after {operator})",
            "keep the examples apart in one dimension of it, or freeze the parameter",
        )

    # The operators.

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operator, with norm hooks if it uses a trainable parameter; record what is known of its outputs."""
        kwargs = {} if kwargs is None else kwargs
        name = func.__name__ if hasattr(func, "__name__") else type(func).__name__
        if name == "__get__":
            name = func.__self__.__name__  # type: ignore[attr-defined]
            if name not in MOVING_GETTERS:
                return func(*args, **kwargs)
        elif name in ("__set__", "requires_grad_", "size", "dim", "detach_"):
            return func(*args, **kwargs)
        operands = list(tensors_among((*args, *kwargs.values())))
        own_types = internals.unfollowed if types else nullcontext  # a subclass of Tensor would see what is read of it
        with own_types():
            sources = [each for each in operands if self.source(each) is not None]
            given = [(each, found) for each in operands if (found := self.provenance(each)) is not None]
        if name == "multi_head_attention_forward":
            with self:  # its operators are followed one by one
                return internals.without_overrides(func)(*args, **kwargs)
        if name in FACTORIES or (name in SHAPED_LIKE and sources and args and args[0] is sources[0]):
            given = []
        operator = Operator(name, func, args, kwargs)
        has_rule = bool(sources and given) and torch.is_grad_enabled() and name not in ("data", "detach")
        if has_rule:
            combined = self._combine(operator, given)
            output, given = combined if combined is not None else (func(*args, **kwargs), [])
        else:
            output = func(*args, **kwargs)
        with own_types():
            is_recorded = has_rule and isinstance(output, Tensor) and isinstance(self.known(output), Rows)
            if not is_recorded:
                self._record(operator, output, sources, given)
        return output

    def _combine(
        self, operator: Operator, given: list[tuple[Tensor, Provenance]]
    ) -> tuple[Any, list[tuple[Tensor, Provenance]]] | None:
        """The output of an operator that gets a parameter and examples, and the examples.

        None if no gradient flows to the examples and they cannot be separated: they are constants to the derivative, so
        that the output depends on parameters alone.
        """
        without_gradient = not any(each.requires_grad for each, _ in given)
        if without_gradient and operator.name == "__getitem__" and all(each.dim() == 0 for each, _ in given):
            return None  # the number of a slice
        rule, self._operator = rule_of(operator.name), operator.name
        try:
            return rule(self, operator), given
        except LayerRefused as refused:
            if without_gradient and not refused.final:
                return None
            self._refuse(operator, f"{refused.reason}, in {operator.name}", refused.remedy)
            return operator.function(*operator.args, **operator.kwargs), given
        except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError, AssertionError) as error:
            output = operator.function(*operator.args, **operator.kwargs)  # raises if the model itself is at fault
            reason = f"is used by {operator.name} in a way that has no rule ({type(error).__name__}: {error})"
            self._refuse(operator, reason, "freeze the parameter, or use another operator")
            return output, given

    def _refuse(self, operator: Operator, reason: str, remedy: str) -> None:
        """Record a refusal in the name of the first parameter that the operator uses."""
        names = sorted({name for each in operator.tensors() if (s := self.source(each)) for name in s.parameters})
        self.context.refuse(Refusal(names[0], "", reason, remedy))

    def _record(
        self, operator: Operator, output: Any, sources: list[Tensor], given: list[tuple[Tensor, Provenance]]
    ) -> None:
        name, args = operator.name, operator.args
        in_place = bool(args) and (name == "__setitem__" or (name.endswith("_") and not name.endswith("__")))
        outputs = list(tensors_among((args[0],) if in_place else (output,)))
        if not outputs or internals.is_batched(outputs[0]):
            return
        if given:
            for each, found in zip(outputs, self._follow(operator, outputs, given), strict=True):
                if id(each) not in self._names:
                    self.set(each, found)
            return
        for each in outputs:
            if id(each) in self._names or isinstance(self.known(each), (Rows, Lost)):
                continue
            if not in_place and any(each is one for one in sources):  # such as a conversion to the same type
                continue
            if sources and each.grad_fn is not None and torch.is_grad_enabled():
                self.set(each, self._derived(operator, each, sources))
            else:
                self.set(each, CONSTANT)

    def _follow(
        self, operator: Operator, outputs: list[Tensor], given: list[tuple[Tensor, Provenance]]
    ) -> list[Provenance]:
        name, args, kwargs = operator.name, operator.args, operator.kwargs
        try:
            return self._follower.after(name, operator.function, args, kwargs, outputs, given)
        except (RuntimeError, TypeError, ValueError, IndexError, KeyError, NotImplementedError):
            return [Lost(name)] * len(outputs)  # only a use of a parameter with it is then refused

    def _derived(self, operator: Operator, output: Tensor, tensors: list[Tensor]) -> Source:
        name = operator.name
        sources = [found for each in tensors if (found := self.source(each)) is not None]
        parameters = {key: p for each in sources for key, p in each.parameters.items()}
        lookups = tuple(lookup for each in sources for lookup in each.lookups)
        if name == "embedding" and len(sources) == 1 and sources[0].is_parameter:
            index, padding, plain = embedding_arguments(operator.args, operator.kwargs)
            ((table, parameter),) = parameters.items()
            if plain:
                index = index if padding is None else index.masked_fill(index == padding, -1)
                lookups = (Lookup(get_gradient_edge(output), table, index, len(parameter)),)
        base = None
        if name in EXPANDING and len(sources) == 1:
            old, new = sources[0].tensor.shape, output.shape
            kept = zip(reversed(old), reversed(new), strict=False)
            base = sources[0] if all(a in (1, b) for a, b in kept) else None
            # The rule of a layer expands a look-up to the batch, and repeating it then gives more rows than examples.
            self.needed |= bool(lookups) and name in ("repeat", "tile")
        if name in ("contiguous", "clone") and len(sources) == 1:
            base = sources[0].base
        is_view = name in MOVING and len(sources) == 1 and sources[0].is_view
        is_view &= not internals.tensor_hooks(sources[0].tensor) or sources[0].is_parameter
        return Source.of_tensor(output, parameters, lookups=lookups, base=base, is_view=is_view)

    # The operators' rules put norm hooks with these.

    def hook(
        self,
        output: Tensor,
        source: Source,
        rows: Rows,
        saved: tuple[Tensor, ...],
        gradient: Callable[[tuple[Tensor, ...], Tensor, RowSplit], PerSampleGrad | FactoredGrad],
        *,
        optional: bool = False,
    ) -> Tensor:
        """The output of an operator that uses a source, with a norm hook.

        Args:
            output: computed with the detached source.
            source: what the parameters are computed into.
            rows: of the output.
            saved: tensors for `gradient`.
            gradient: (saved, the output's gradient, its split by example) to the source's gradients, (B, *shape).
            optional: whether a layer's rule could do the same, so that following is not needed.
        """
        name = next(iter(source.parameters))
        self.needed |= not optional
        self.context.record_use(name, source.parameters.values(), by=self._operator)

        def per_example_grads(saved: tuple[Tensor, ...], grad: Tensor, split: RowSplit) -> dict[str, Gradient]:
            return source.gradients(gradient(saved, grad, split))

        spec = HookSpec(name, tuple(source.parameters), per_example_grads, rows)
        hooked = apply_norm_hook(output, spec, self.context, saved, list(source.parameters.values()))
        self.set(hooked, rows)
        return hooked

    def copies(self, source: Source, shape: torch.Size | tuple[int, ...], rows: Rows) -> Tensor:
        """The source, broadcast to `shape` with these rows, whose gradient is separated by example."""
        source = source.unexpanded()
        own = tuple(source.tensor.shape)
        is_lookup = len(source.lookups) == 1 and source.lookups[0].edge == source.edge
        optional = is_lookup and len(own) == len(shape) > 1 and own[0] == 1 and rows.standard

        def gradient(saved: tuple[Tensor, ...], grad: Tensor, split: RowSplit) -> PerSampleGrad:
            return PerSampleGrad(split.reduced(grad, own))

        return self.hook(source.tensor.detach().expand(shape), source, rows, (), gradient, optional=optional)


def forget(tensors: Iterator[Tensor]) -> None:
    """Remove what was recorded of tensors that leave the model."""
    for tensor in tensors:
        tensor.__dict__.pop(KNOWN, None)
