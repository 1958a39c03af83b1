"""Checks that the steps of a training loop are those that the accountant counts.

The accountant assumes that each step draws one batch, adds the gradients of exactly its examples, and adds
noise before the optimizer reads the sum. `Guard` checks this without access to the data: it tracks the sizes of the
drawn batches, the number of losses, calls of `finish`, and optimizer steps.
"""

import weakref
from collections import deque
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from memsave.privacy.errors import PrivacyError

Version = tuple[nn.Parameter, Tensor, int]
"""(parameter, its gradient, the version counter of the gradient)."""


class Guard:
    """The state of one logical batch, from its draw to `finish`.

    Batches may be drawn in advance, as by a DataLoader with `batch_sampler=private.batches()`. They must be used in the
    order in which they were drawn.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]):
        self.enabled = True
        """False disables all checks, for a step that is neither taken nor counted, such as one on fake tensors."""
        self.rehearsing = False
        """Whether steps are only measured or clipping is paused; an optimizer step is then an error."""
        self.closures_are_empty = False
        """Whether a framework always gives the optimizer a closure, which computes nothing."""
        self._parameters = list(parameters)
        self.reset()
        self._hook = register_optimizer_step_pre_hook(_step_pre_hook(weakref.ref(self)))

    def reset(self) -> None:
        """Discard the drawn batches and the current one."""
        self._drawn: deque[int] = deque()
        self._seen = 0
        self._unnoised = False  # .grad may hold a clipped sum without noise
        self._grad_versions: list[Version] = []  # after the last backward or finish
        self._weight_versions: list[int] = []  # at the first backward of the batch

    def close(self) -> None:
        """Remove the hook on optimizers."""
        self._hook.remove()

    @property
    def unnoised(self) -> bool:
        """Whether `.grad` may hold a clipped sum without noise."""
        return self._unnoised

    def draw(self, size: int) -> bool:
        """Record that a batch of this size was drawn. Returns False in a rehearsal, which records nothing."""
        if self._active:
            self._drawn.append(size)
        return self._active

    def before_backward(self, count: int) -> None:
        """Raise PrivacyError if the losses exceed the drawn batch, or if .grad holds other gradients."""
        if not self._active:
            return
        if not self._drawn:
            raise PrivacyError(
                "backward() got losses, but no batch was drawn: take the examples of each step from "
                "PrivateGradients.batches(), because epsilon is computed for its batches"
            )
        self._check_gradients()
        if self._seen + count > self._drawn[0]:
            raise PrivacyError(
                f"backward() got {self._seen + count} losses since the last finish(), but the batch drawn has "
                f"{self._drawn[0]} examples: give one loss for each drawn index, and call finish() after each batch"
                f"{self._waiting_batches}"
            )
        if not self._unnoised:
            self._weight_versions = [p._version for p in self._parameters]
        self._unnoised = True

    def after_backward(self, count: int) -> None:
        """Record that the clipped gradients of `count` examples were added to `.grad`."""
        if self._active:
            self._seen += count
            self._grad_versions = self._gradients()

    def before_finish(self) -> None:
        """Raise PrivacyError for a step that differs from those of the accountant."""
        if not self._active:
            return
        if not self._drawn:
            raise PrivacyError(
                "finish() was called, but no batch was drawn since the last call: draw one batch per step from "
                "PrivateGradients.batches()"
            )
        self._check_gradients()
        if self._seen != self._drawn[0]:
            raise PrivacyError(
                f"finish() was called after {self._seen} losses, but the batch drawn has {self._drawn[0]} examples: "
                f"give one loss for each drawn index (to leave an example out, multiply its loss by 0)"
                f"{self._waiting_batches}"
            )
        if self._unnoised:
            self._check_weights()

    def after_finish(self) -> bool:
        """Record that `.grad` is private now. Returns False in a rehearsal, which records nothing."""
        if not self._active:
            return False
        self._drawn.popleft()
        self._seen, self._unnoised = 0, False
        self._grad_versions = self._gradients()
        return True

    def refuse_step(self, optimizer: Optimizer, *, closure: bool) -> None:
        """Raise PrivacyError for an optimizer step without noise, within a rehearsal, or with a closure."""
        closure = closure and not self.closures_are_empty
        if not self.enabled or not (self._unnoised or self.rehearsing or closure):
            return
        ours = {id(each) for p in self._parameters for each in ((p, p.grad) if closure or p.grad is not None else ())}
        stepped = [p for group in optimizer.param_groups for p in group["params"]]
        if not any(id(p) in ours or (p.grad is not None and id(p.grad) in ours) for p in stepped):
            return
        if closure:
            raise PrivacyError(
                "optimizer.step(closure) computes gradients within the step, without noise: compute them before, "
                "call finish(), and then optimizer.step() without a closure"
            )
        if self.rehearsing:
            raise PrivacyError("steps of a rehearsal or a pause are not counted: call optimizer.step() outside of it")
        raise PrivacyError(
            "optimizer.step() was called on a clipped sum without noise: call PrivateGradients.finish() once after the "
            "last backward() of a batch, before optimizer.step()"
        )

    @property
    def _waiting_batches(self) -> str:
        more = len(self._drawn) - 1
        return f"; further batches drawn: {more}, to be used in this order" if more else ""

    def _check_weights(self) -> None:
        if self._weight_versions != [p._version for p in self._parameters]:
            raise PrivacyError(
                "parameters changed between backward() and finish(), before the sum had noise: update them after "
                "finish()"
            )

    @property
    def _active(self) -> bool:
        return self.enabled and not self.rehearsing

    def _gradients(self) -> list[Version]:
        return [(p, p.grad, p.grad._version) for p in self._parameters if p.grad is not None]

    def _check_gradients(self) -> None:
        """Check that `.grad` did not change between the backward passes of a batch, and was cleared between batches."""
        unchanged = [p.grad is grad and grad._version == version for p, grad, version in self._grad_versions]
        if not self._unnoised:
            if any(unchanged):
                raise PrivacyError(
                    "the gradients of the last step were not cleared, and new ones would be added to them: call "
                    "optimizer.zero_grad() after optimizer.step(), or model.zero_grad() if it lacks some parameters"
                )
        elif not all(unchanged):
            if any(p.grad is not None and bool(p.grad.any()) for p in self._parameters):
                raise PrivacyError(
                    "gradients were changed between backward() and finish(), before the sum had noise: clip or scale "
                    "them after finish()"
                )
            self._check_weights()
            self._seen = 0  # the gradients were cleared: the batch starts again


def _step_pre_hook(guard: "weakref.ref[Guard]") -> Any:
    """A hook on all optimizers; the weak reference does not keep the guard alive."""

    def hook(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        alive = guard()
        if alive is not None:
            alive.refuse_step(optimizer, closure=any(each is not None for each in (*args[1:], kwargs.get("closure"))))

    return hook
