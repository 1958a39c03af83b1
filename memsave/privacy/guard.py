"""Refuses a training loop whose steps are not those that the accountant counts.

The accountant assumes that each step takes one Poisson batch, adds the gradients of all of its examples and of no
others, and adds noise before the optimizer reads the sum. `Guard` follows a loop by what it can see without looking at
data: the sizes of the batches that were drawn, the number of losses, calls of `finish`, and steps of optimizers.
"""

import weakref
from collections import deque
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from memsave.privacy.accounting import PrivacyError

Version = tuple[nn.Parameter, Tensor, int]
"""A parameter, its gradient, and the version counter of that."""


class Guard:
    """The state of one logical batch, from its draw to `finish`.

    Batches may be drawn ahead, as a DataLoader with `batch_sampler=private.batches()` does; they are used in the order
    in which they were drawn.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]):
        self.enabled = True
        """False for a step that is neither taken nor counted, such as one on fake tensors."""
        self.rehearsing = False
        """Whether steps are only measured, or clipping is paused; no optimizer may then take one."""
        self._parameters = list(parameters)
        self.reset()
        self._hook = register_optimizer_step_pre_hook(_refusing(weakref.ref(self)))

    def reset(self) -> None:
        """Forget the batches that were drawn, and the one that is under way."""
        self._drawn: deque[int] = deque()
        self._seen = 0
        self._unnoised = False  # whether .grad may hold a clipped sum without noise
        self._left: list[Version] = []  # .grad after the last backward or finish
        self._weights: list[int] = []  # versions of the parameters at the first backward of the batch

    def close(self) -> None:
        """MemoryMonitor optimizers no longer."""
        self._hook.remove()

    @property
    def unnoised(self) -> bool:
        """Whether `.grad` may hold a clipped sum without noise."""
        return self._unnoised

    def draw(self, size: int) -> bool:
        """Note that a batch of this size was drawn; returns whether it is followed, which it is not in a rehearsal."""
        if self._watching:
            self._drawn.append(size)
        return self._watching

    def before_backward(self, count: int) -> None:
        """Refuse losses that belong to no drawn batch, and gradients that would be added to what they should not."""
        if not self._watching:
            return
        if not self._drawn:
            raise PrivacyError(
                "backward() got losses, but no batch was drawn: take the examples of each step from "
                "PrivateGradients.batches(), because epsilon is computed for its Poisson batches"
            )
        self._check_gradients()
        if self._seen + count > self._drawn[0]:
            raise PrivacyError(
                f"backward() got {self._seen + count} losses since the last finish(), but the batch drawn has "
                f"{self._drawn[0]} examples: give one loss for each drawn index, and call finish() after each batch"
                f"{self._left_over}"
            )
        if not self._unnoised:
            self._weights = [p._version for p in self._parameters]
        self._unnoised = True

    def after_backward(self, count: int) -> None:
        """Note that the clipped gradients of so many examples were added to `.grad`."""
        if self._watching:
            self._seen += count
            self._left = self._gradients()

    def before_finish(self) -> None:
        """Refuse to count a step that the accountant does not describe."""
        if not self._watching:
            return
        if not self._drawn:
            raise PrivacyError(
                "finish() was called, but no batch was drawn since the last one: draw one batch a step from "
                "PrivateGradients.batches()"
            )
        self._check_gradients()
        if self._seen != self._drawn[0]:
            raise PrivacyError(
                f"finish() was called after {self._seen} losses, but the batch drawn has {self._drawn[0]} examples: "
                f"give one loss for each drawn index (to leave an example out, multiply its loss by 0){self._left_over}"
            )
        if self._unnoised:
            self._check_weights()

    def after_finish(self) -> bool:
        """Note that `.grad` is private now; returns whether a batch that was drawn is done with."""
        if not self._watching:
            return False
        self._drawn.popleft()
        self._seen, self._unnoised = 0, False
        self._left = self._gradients()
        return True

    def refuse_step(self, optimizer: Optimizer, *, closure: bool) -> None:
        """Refuse an optimizer's step on gradients without noise, on those of a rehearsal, or on those of a closure."""
        if not self.enabled or not (self._unnoised or self.rehearsing or closure):
            return
        ours = {id(each) for p in self._parameters for each in ((p, p.grad) if closure or p.grad is not None else ())}
        stepped = [p for group in optimizer.param_groups for p in group["params"]]
        if not any(id(p) in ours or (p.grad is not None and id(p.grad) in ours) for p in stepped):
            return
        if closure:
            raise PrivacyError(
                "optimizer.step(closure) computes gradients within the step, where they get no noise: compute them "
                "before, call finish(), and then optimizer.step() without a closure"
            )
        if self.rehearsing:
            raise PrivacyError(
                "steps of a rehearsal or a pause are not accounted for: call optimizer.step() outside of it"
            )
        raise PrivacyError(
            "the optimizer was about to step on a clipped sum without noise: call PrivateGradients.finish() once after "
            "the last backward() of a batch, before optimizer.step()"
        )

    @property
    def _left_over(self) -> str:
        more = len(self._drawn) - 1
        return f"; {more} more were drawn since, and must be used in this order" if more else ""

    def _check_weights(self) -> None:
        if self._weights != [p._version for p in self._parameters]:
            raise PrivacyError(
                "parameters changed between backward() and finish(), when the sum had no noise yet: update them after "
                "finish()"
            )

    @property
    def _watching(self) -> bool:
        return self.enabled and not self.rehearsing

    def _gradients(self) -> list[Version]:
        return [(p, p.grad, p.grad._version) for p in self._parameters if p.grad is not None]

    def _check_gradients(self) -> None:
        """Between backwards of one batch `.grad` must stay as it is; between batches it must be cleared."""
        kept = [p.grad is grad and grad._version == version for p, grad, version in self._left]
        if not self._unnoised:
            if any(kept):
                raise PrivacyError(
                    "the gradients of the last step are still there, and the next ones would be added to them: call "
                    "optimizer.zero_grad() after optimizer.step(), or model.zero_grad() where it has not all parameters"
                )
        elif not all(kept):
            if any(p.grad is not None and bool(p.grad.any()) for p in self._parameters):
                raise PrivacyError(
                    "gradients were changed between backward() and finish(), when the sum had no noise yet: clip or "
                    "scale them after finish()"
                )
            self._check_weights()
            self._seen = 0  # they were cleared: the batch begins anew


def _refusing(guard: "weakref.ref[Guard]") -> Any:
    """A hook on all optimizers that does not keep its guard alive."""

    def hook(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        alive = guard()
        if alive is not None:
            alive.refuse_step(optimizer, closure=any(each is not None for each in (*args[1:], kwargs.get("closure"))))

    return hook
