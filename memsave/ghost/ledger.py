"""The ledger of one backward: what each use of a parameter adds to the squared norms, and the clipped sums.

A parameter used several times has a sum of gradients. Each new use adds its own squared norm and twice its inner
product with the earlier uses: |g1 + g2|^2 = |g1|^2 + 2 <g1, g2> + |g2|^2.

Where terms cancel, such a sum of products suffers catastrophic cancellation and could be too small. A bound on its
rounding error is therefore added, ROUNDING eps m^2, where m is the norm that the terms would have without cancellation.
A norm is then never too small, and too large by less than a thousandth even in float32, unless most of it cancels.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from memsave.ghost.gradient_products import ActivationGramCache, cheapest_form, held_bytes, inner_products, magnitude
from memsave.ghost.gradients import FactoredGrad, Gradient, PerSampleGrad, has_values, safe_sqrt
from memsave.ghost.groups import Groups, only_counted

ROUNDING = 4  # rounding error of Gram entries, each a product of two sums, in units of the last digit


class Ledger:
    """The uses of each parameter in one forward, and their per-example gradients in its backward.

    Args:
        probe: (B,); the ledger's tensors have its dtype and device.
        bytes_left: bytes that may be kept beyond (g, a) of each use to save time.
        groups: groups to clip one by one, each as soon as the backward has passed it; None to clip at the end.
        clip_factors_of: the clip factors (B,) from a group's norms (B,).
    """

    def __init__(
        self,
        probe: Tensor,
        *,
        bytes_left: int = 0,
        groups: Groups | None = None,
        clip_factors_of: Callable[[Tensor], Tensor] = torch.ones_like,
    ) -> None:
        self.uses: dict[nn.Parameter, int] = {}
        """How often the forward used each parameter."""
        self.entries: dict[nn.Parameter, list[Gradient]] = {}
        """The gradients that are kept, for inner products between uses or for the clipped sums."""
        self.keep_all = False
        """Whether gradients of parameters used once are kept too, because the sums are formed from the entries."""
        self.bytes_left = bytes_left
        self.plan: dict[str, tuple[str, int]] = {}
        """By use of a parameter, how its norm was found, and the bytes that its sum is formed from."""
        self.groups = groups
        self.lowest_factors = torch.ones_like(probe)
        """The smallest clip factor of any group, (B,)."""
        self.clipped_groups: set[int] = set()
        """The groups whose sums were added to `.grad`."""
        self.counted: Tensor | None = None
        """(B,), zero for an example that contributes nothing; None if all contribute."""
        self._clip_factors_of = clip_factors_of
        self._gram_cache = ActivationGramCache()
        self._magnitudes: dict[nn.Parameter, Tensor] = {}
        self._uses_seen: dict[nn.Parameter, int] = {}
        self._squared_of_group: dict[int, Tensor] = {}
        self._uses_seen_of_group: dict[int, int] = {}

    def count_use(self, parameter: nn.Parameter) -> None:
        """Count a use in the forward."""
        self.uses[parameter] = self.uses.get(parameter, 0) + 1

    def add(self, parameter: nn.Parameter, gradient: Gradient, name: str) -> Tensor:
        """Enter a use's gradient; returns what it adds to the squared norms, (B,)."""
        seen = self._uses_seen[parameter] = self._uses_seen.get(parameter, 0) + 1
        if seen > self.uses.get(parameter, 0):
            raise ValueError(
                f"{name} was used {seen} times in the backward and {self.uses.get(parameter, 0)} times in the forward; "
                f"run the same layers when activations are recomputed"
            )
        gradient = self._choose_form(gradient, name)
        squared = inner_products(gradient, gradient, gram_cache=self._gram_cache)
        for earlier in self.entries.get(parameter, ()):
            squared = squared + 2 * inner_products(gradient, earlier)
        several = self.uses.get(parameter, 0) > 1
        if several or isinstance(gradient, FactoredGrad):
            squared = self._with_rounding_bound(parameter, squared, magnitude(gradient))
        if self.keep_all or several:
            self.entries.setdefault(parameter, []).append(gradient)
        if self.groups is not None:
            self._add_to_group(self.groups, parameter, squared)
        return squared

    def _with_rounding_bound(self, parameter: nn.Parameter, squared: Tensor, added: Tensor) -> Tensor:
        """The squared norms plus ROUNDING eps m^2, less what earlier uses added; `added` is this use's part of m."""
        factor, before = ROUNDING * torch.finfo(squared.dtype).eps, self._magnitudes.get(parameter)
        if before is None:
            self._magnitudes[parameter] = added
            return torch.addcmul(squared, added, added, value=factor)
        after = self._magnitudes[parameter] = before + added
        return squared + factor * (after.square() - before.square())

    def _choose_form(self, gradient: Gradient, name: str) -> Gradient:
        chosen = cheapest_form(gradient, summed=self.keep_all, bytes_left=self.bytes_left)
        if not isinstance(gradient, FactoredGrad):
            return chosen
        kept = held_bytes(chosen) if self.keep_all else 0
        if self.keep_all and isinstance(chosen, PerSampleGrad):  # one of the kept gradients becomes the sum
            self.bytes_left -= max(0, kept - kept // len(chosen.values) - held_bytes(gradient))
        form = "gradients formed" if isinstance(chosen, PerSampleGrad) else "Gram matrices"
        self.plan[name] = (form, kept)
        return chosen

    def _add_to_group(self, groups: Groups, parameter: nn.Parameter, squared: Tensor) -> None:
        """Add to the squared norms of the parameter's group, and clip the group after the last use of its members."""
        group = groups.index[parameter]
        self._squared_of_group[group] = self._squared_of_group.get(group, 0.0) + squared
        self._uses_seen_of_group[group] = self._uses_seen_of_group.get(group, 0) + 1
        if self._uses_seen_of_group[group] == sum(self.uses.get(member, 0) for member in groups.members[group]):
            self._clip_group(groups, group)

    def _clip_group(self, groups: Groups, group: int) -> None:
        self.clipped_groups.add(group)
        factors = only_counted(self._clip_factors_of(safe_sqrt(self._squared_of_group.pop(group))), self.counted)
        self.lowest_factors = torch.minimum(self.lowest_factors, factors)
        kept = factors != 0
        all_kept = not has_values(kept) or bool(kept.all())
        self.add_clipped_sums(groups.members[group], factors, None if all_kept else kept)

    @property
    def has_remaining_groups(self) -> bool:
        """Whether the backward has begun a group, and did not complete it."""
        return bool(self._squared_of_group)

    def clip_remaining_groups(self) -> None:
        """Clip the groups that the backward has not completed, because the losses do not depend on some use."""
        if self.groups is not None:
            for group in list(self._squared_of_group):
                self._clip_group(self.groups, group)

    def add_clipped_sums(self, parameters: Iterable[nn.Parameter], factors: Tensor, kept: Tensor | None) -> None:
        """Add sum_b factors[b] g_b to each `.grad`, smallest parameter first; each sum frees what it was formed from.

        `kept`: the examples (B,) with a factor above zero, or None for all. The others contribute nothing, even where
        their gradient is NaN.
        """
        for parameter in sorted((p for p in parameters if p in self.entries), key=Tensor.numel):
            gradients = sorted(
                self.entries.pop(parameter), key=lambda each: isinstance(each, FactoredGrad) and each.one_hot
            )
            while gradients:
                gradient = gradients.pop(0)
                self.add_clipped_sum(parameter, gradient, factors, kept)

    def add_clipped_sum(
        self, parameter: nn.Parameter, gradient: Gradient, factors: Tensor, kept: Tensor | None
    ) -> None:
        """Add one use's sum to `.grad`; `kept`: the examples (B,) with a factor above zero, or None for all."""
        add_sum(parameter, gradient if kept is None else gradient.masked(kept), factors)

    def free(self) -> None:
        """Free all per-example gradients and products."""
        self.entries.clear()
        self._magnitudes.clear()
        self._gram_cache = ActivationGramCache()


def add_sum(parameter: nn.Parameter, gradient: Gradient, weights: Tensor) -> None:
    """Add sum_b weights[b] g_b to `.grad`, in place if `.grad` is float32 or wider.

    The gradients of a complex parameter are those of its real view.
    """
    before = parameter.grad
    if parameter.is_complex():
        total = torch.view_as_complex(gradient.weighted_sum(weights).contiguous()).to(parameter.dtype)
        parameter.grad = total if before is None else before.add_(total)
        return
    in_place = before is not None and before.dtype not in (torch.float16, torch.bfloat16)
    total = gradient.weighted_sum(weights, add_to=before if in_place else None, overwrite=True)
    if not in_place:
        total = total.to(parameter.dtype)
        parameter.grad = total.contiguous() if before is None else before.add_(total)
