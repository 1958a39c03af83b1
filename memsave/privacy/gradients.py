"""The private gradient of a logical batch (Abadi et al., 2016):

    g = (sum_{b in batch} c_b grad(loss_b) + sigma C z) / (q n),    z ~ N(0, I)

with the clip factors c_b of `memsave.ghost`, a Poisson batch of expected size q n, and noise once per batch.

In several processes, all draw the same batches from one secret generator, and each takes every W-th example of a batch.
Rank 0 adds the noise to its sum before the sums are added up, so that there is noise once. Where FSDP shards a
parameter, the sum is sharded, too, and each process adds noise to its own shard, from its own secret generator. Both
give the same mechanism, so epsilon does not depend on the number of processes.
"""

import zlib
from array import array
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from memsave.ghost import GhostClipper
from memsave.privacy.audit.canaries import CanaryAudit
from memsave.privacy.errors import PrivacyError
from memsave.privacy.guard import Guard
from memsave.privacy.mechanism import Mechanism
from memsave.privacy.noise import GaussianNoise
from memsave.privacy.noise_check import NoiseCheck
from memsave.privacy.randomness import WORDS, SecretStream
from memsave.privacy.sampling import Sampler
from memsave.processes import (
    agree,
    broadcast,
    gather,
    is_sharded,
    maximum,
    own_seed,
    process_count,
    process_rank,
    share,
    totals,
    without_group,
)


class PrivateGradients:
    """Poisson batches, clipped sums, noise and the count of steps, with one common state for checkpoints.

        private = PrivateGradients(model, mechanism)
        for indices in private.batches():                # endless
            for losses in ...:                           # (B,) each: micro-batches of any size, none for an empty batch
                private.backward(losses)
            private.finish()                             # adds noise once; .grad is the private mean
            optimizer.step()
            optimizer.zero_grad()

    Another order raises PrivacyError (see `memsave.privacy.guard`): a number of losses other than that of the drawn
    batch, a batch without `finish`, or an optimizer step before it.

    In several processes (torchrun, with torch.distributed initialised), the same loop runs in each of them: `batches`
    yields the process's share of each batch, which may be empty, and `finish` sums the gradients of all. All processes
    must call the constructor, `finish`, `state_dict`, `load_state_dict` and `rehearsal` together.

    Formal guarantees:
        The gradients of k steps together, and everything computed from them, are (mechanism.epsilon(k),
        mechanism.delta)-differentially private for adding or removing one example, if each loss depends only on its own
        example and the losses are those of the examples `indices`.

    Args:
        model: the model; its trainable parameters are float32 or wider, on one device.
        mechanism: sizes, noise and clipping norm.
        clipping, passes, memory_budget: those of `GhostClipper`.
        secure_noise: that of `GaussianNoise`.
        seed: None draws seeds from the operating system's entropy; a number is for tests and not private.
        audit: inserts canaries and scores them (see `memsave.privacy.audit`); None for no audit.
    """

    def __init__(
        self,
        model: nn.Module,
        mechanism: Mechanism,
        *,
        clipping: str = "flat",
        passes: str | int = "auto",
        memory_budget: int = 0,
        secure_noise: bool = False,
        seed: int | None = None,
        audit: CanaryAudit | None = None,
    ):
        _refuse_without_group()
        parameters = _trainable(model)
        self.model, self.mechanism, self._seed = model, mechanism, seed
        self.seeded = seed is not None
        """Whether this run, or the run that it continues, had a known seed; it is then not private."""
        self.steps = 0
        """The number of steps with noise, which the accountant counts."""
        self.examples = 0
        """The number of examples so far, in all processes. Not private."""
        self.guard = Guard(parameters)
        self.audit = audit
        if audit is not None:
            audit.start(parameters, mechanism)
        self._closed = False
        self._clipped: int | Tensor = 0
        self._nonfinite: int | Tensor = 0
        self._counted = (0, 0, 0)  # what is in the counts of all processes, at the last finish
        self._device = parameters[0].device
        self._sampler = Sampler(mechanism, SecretStream(None if seed is None else 2 * seed))
        self._sampler.set_state(broadcast(self._sampler.get_state()))
        self._digests: deque[int] = deque()
        """A digest of each whole batch that was drawn and has no `finish` yet."""
        self._before_draws: deque[np.ndarray] = deque()
        """States of `_sampler` before each batch that was drawn and has no `finish` yet."""
        self._stream: object = None  # the iterator of `batches` that drew last
        self._several_streams = False  # whether the batches that wait for `finish` are of several iterators
        self.is_sharded = any(map(is_sharded, parameters))
        """Whether the processes share a sharded model, so that they must run the same forwards and backwards."""
        self._is_filler = False  # whether the micro-batch in use only makes the numbers equal
        self._loads = 0  # calls of load_state_dict that discarded drawn batches
        kind: dict[str, Any] = {"noise": mechanism.noise, "bands": mechanism.bands}
        self._noise = GaussianNoise(parameters, stream=self._noise_stream(), secure=secure_noise, **kind)
        options: dict[str, Any] = {"clipping": clipping, "passes": passes, "memory_budget": memory_budget}
        self.clipper = GhostClipper(model, max_grad_norm=mechanism.max_grad_norm, **options)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._noise_check = NoiseCheck(parameters, [names[id(parameter)] for parameter in parameters], **kind)

    def _noise_stream(self) -> SecretStream:
        """A new stream for the noise that this process adds; that of another process is independent of it."""
        return SecretStream(None if self._seed is None else own_seed(2 * self._seed + 1))

    @property
    def epsilon(self) -> float:
        """The epsilon spent so far."""
        return self.mechanism.epsilon(self.steps)

    @property
    def clipped(self) -> int:
        """The number of examples with a clipped gradient so far, in all processes. Not private, like every norm."""
        return int(self._clipped)

    @property
    def nonfinite(self) -> int:
        """The number of examples so far whose gradient was not finite and counted as zero. Not private."""
        return int(self._nonfinite)

    def batches(self) -> Iterator[list[int]]:
        """Endless batches of indices, or this process's share of each; each is drawn when it is requested.

        Batches may be requested ahead of their steps, by a loader that prefetches. `state_dict` holds the state before
        the first batch without `finish`, so that a continued run draws the batches that were requested and not used.
        While batches of several iterators wait, it holds the current state, because a batch that is drawn again might
        have been used. Raises PrivacyError if `load_state_dict` discarded batches that this iterator drew.
        """
        stream, loads = object(), self._loads
        while True:
            if self._loads != loads:
                raise PrivacyError(
                    "load_state_dict() discarded the batches drawn so far, and a loader may still hold some of them: "
                    "iterate over a new PrivateGradients.batches()"
                )
            before = self._sampler.get_state()
            batch = self._sampler.draw()
            indices = share(batch if self.audit is None else self.audit.without_canaries(batch))
            if self.guard.draw(len(indices)):
                if self.audit is not None:
                    self.audit.draw(batch)
                self._digests.append(zlib.crc32(array("q", batch).tobytes()))
                self._several_streams = bool(self._before_draws) and (
                    self._several_streams or self._stream is not stream
                )
                self._stream = stream
                self._before_draws.append(before)
            yield indices

    def micro_batches(self, indices: Sequence[int], size: int | None = None) -> Iterator[list[int]]:
        """Split a batch of `batches` into micro-batches of at most `size` examples; call `backward` once for each.

        Processes that share a sharded model (`fully_shard`) must run the same forwards. Each therefore gets as many
        micro-batches as the one with the most; one that has no more examples gets example 0, which `backward` does not
        count.
        """
        step = max(1, size or len(indices))
        parts = [list(indices[first : first + step]) for first in range(0, len(indices), step)]
        fillers = maximum(len(parts)) - len(parts) if self.is_sharded else 0
        yield from parts
        for _ in range(fillers):
            self._is_filler = True
            yield [0]
            self._is_filler = False

    def backward(self, losses: Tensor, *, counted: Tensor | None = None) -> None:
        """Add the clipped sum of a micro-batch's gradients; `losses` (B,) are those of examples of the current batch.

        `counted`: (B,), False for an example that is not of the batch, but only there so that processes that share a
        sharded model run the same forwards (see `micro_batches`); None counts all.

        Raises PrivacyError if there are more losses than examples in the batch.
        """
        if self._is_filler:
            counted = torch.zeros_like(losses, dtype=torch.bool)
        count = len(losses) if counted is None else int((counted != 0).sum())
        self._refuse_other_parameters()
        self.guard.before_backward(count)
        norms = self.clipper.backward(losses, counted=counted)
        self.guard.after_backward(count)
        self.examples += count
        assert self.clipper.clipped is not None
        self._clipped = self._clipped + self.clipper.clipped.sum()
        nonfinite = ~norms.isfinite() if counted is None else ~norms.isfinite() & (counted != 0)
        self._nonfinite = self._nonfinite + nonfinite.sum()

    def finish(self) -> None:
        """Add noise to the sum, divide it by the expected batch size, and count the step; an empty batch is pure noise.

        In several processes, the sum is that of all of them. Raises PrivacyError unless `backward` got one loss for
        each example of the current batch, or if the processes do not take the same step.
        """
        _refuse_without_group()
        self._refuse_other_parameters()
        if self.clipper.unfinished:
            raise PrivacyError(
                "a backward pass of this logical batch failed, so .grad holds only some of its examples; clear the "
                "gradients (optimizer.zero_grad()) and compute the logical batch again"
            )
        self.guard.before_finish()
        self._count_examples()
        for parameter in self._noise.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        counts = self.guard.enabled and not self.guard.rehearsing
        audit = self.audit if counts else None
        if audit is not None:
            audit.add_gradients()
        self._add_noise(checked=counts)
        self.clipper.sum_gradients()
        if audit is not None:
            audit.observe()
        for parameter in self._noise.parameters:
            assert parameter.grad is not None
            parameter.grad.div_(self.mechanism.batch_size)
        self.steps += 1
        if self.guard.after_finish():
            self._before_draws.popleft()
            self._digests.popleft()

    def _add_noise(self, *, checked: bool) -> None:
        std = self.mechanism.noise_multiplier * self.mechanism.max_grad_norm
        if checked:
            self._noise_check.before()
        self._noise.add_(std=std)
        if checked:
            self._noise_check.after(std)

    def _count_examples(self) -> None:
        """Make the counts those of all processes; PrivacyError if the processes are not at the same step and batch."""
        if process_count() == 1 or not self.guard.enabled:
            return
        if not agree(self.steps, self._digests[0] if self._digests else 0):
            raise PrivacyError(
                "the processes are not at the same step or drew different batches, so examples would be counted twice "
                "or left out: let every process draw the same number of batches and call finish() for each, and load "
                "the same state into all"
            )
        counts = (self.examples, self.clipped, self.nonfinite)
        added = totals([now - before for now, before in zip(counts, self._counted, strict=True)])
        self.examples, self._clipped, self._nonfinite = (
            before + new for before, new in zip(self._counted, added, strict=True)
        )
        self._counted = (self.examples, self.clipped, self.nonfinite)

    @contextmanager
    def rehearsal(self) -> Iterator[None]:
        """Within, steps on any batch may be measured, but not taken; afterwards counts and generators are as before."""
        before = {**self._own_state(), "sampling": _tensor(self._sampler.get_state())}  # drawn batches stay drawn
        counted = self._counted
        outer, self.guard.rehearsing = self.guard.rehearsing, True
        try:
            yield
        finally:
            self.guard.rehearsing = outer
            self._drop_gradients()
            self._restore(before)
            self._counted = counted

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Detach the clipper within the context; gradients of ordinary backward passes are dropped at its end.

        An optimizer step within the context raises PrivacyError: it would have neither clipping nor noise.
        """
        if self._closed:
            raise PrivacyError("this PrivateGradients was closed; create a new one")
        outer, self.guard.rehearsing = self.guard.rehearsing, True
        self.clipper.close()
        try:
            yield
        finally:
            self.guard.rehearsing = outer
            self.clipper.attach()
            self._drop_gradients()

    def close(self) -> None:
        """Detach the clipper from the model; a sum without noise is dropped."""
        if self.guard.unnoised:
            self._drop_gradients()
        self._closed = True
        self.guard.close()
        self.clipper.close()

    def state_dict(self) -> dict[str, Any]:
        """Counts, mechanism and the generators of all processes. As secret as the data: it foretells the noise.

        All processes must call it together, and get the same state; between `finish` and the next `backward`.
        """
        state = self._own_state()
        if process_count() > 1:
            state["noise"] = torch.stack(gather(state["noise"]))
            state["noise_past"] = broadcast(state["noise_past"])
        state["noise_check"] = broadcast(self._noise_check.remembered)
        state["noise_check_past"] = broadcast(self._noise_check.past)
        return state if self.audit is None else state | self.audit.state_dict()

    def _own_state(self) -> dict[str, Any]:
        return {
            "mechanism": asdict(self.mechanism),
            "steps": self.steps,
            "clipped": self.clipped,
            "examples": self.examples,
            "nonfinite": self.nonfinite,
            "seeded": self.seeded,
            "clipping": self.clipper.clipping,
            "secure_noise": self._noise.secure,
            "sampling": _tensor(self._sampling_state()),
            "noise": _tensor(self._noise.stream.get_state()),
            "noise_past": self._noise.get_past(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a saved state; PrivacyError if its mechanism differs, because the accounting would be wrong.

        All processes must load the same state. If there are more processes than when it was saved, the others draw
        their noise from new secret generators.
        """
        refuse_other_generators(state)
        current = {**asdict(self.mechanism), "clipping": self.clipper.clipping, "secure_noise": self._noise.secure}
        found = {**state["mechanism"], **{key: state[key] for key in ("clipping", "secure_noise")}}
        for key, value in current.items():
            if found.get(key) != value:
                raise PrivacyError(
                    f"the checkpoint was made with {key}={found.get(key)}, and this run has {value}; continue with the "
                    f"same, because all steps are accounted for together"
                )
        streams, rank = state["noise"] if state["noise"].dim() > 1 else state["noise"][None], process_rank()
        own = streams[rank] if rank < len(streams) else _tensor(self._noise_stream().get_state())
        if self.guard.unnoised:  # a partial batch, which the state does not contain
            self._drop_gradients()
        self.guard.reset()
        self._loads += bool(self._before_draws)
        self._before_draws.clear()
        self._digests.clear()
        self._restore({**state, "noise": own})
        own_check = (state.get("noise_check"), state.get("noise_check_past")) if rank == 0 else ()
        self._noise_check.reset(*own_check)
        if self.audit is not None:
            self.audit.load_state_dict(state)
        self._counted = (self.examples, self.clipped, self.nonfinite)

    def _sampling_state(self) -> np.ndarray:
        """The sampler's state before the first batch that has not been used."""
        if self._before_draws and not self._several_streams:
            return self._before_draws[0]
        return self._sampler.get_state()

    def _restore(self, state: dict[str, Any]) -> None:
        self.seeded |= state["seeded"]
        self.steps = state["steps"]
        self._clipped, self.examples, self._nonfinite = state["clipped"], state["examples"], state["nonfinite"]
        self._sampler.set_state(_words(state["sampling"]))
        self._noise.stream.set_state(_words(state["noise"]))
        self._noise.set_past(state["noise_past"])

    def _drop_gradients(self) -> None:
        for parameter in self._noise.parameters:
            parameter.grad = None

    def _refuse_other_parameters(self) -> None:
        trainable = self.clipper.parameters
        if len(trainable) != len(self._noise.parameters) or any(
            one is not other for one, other in zip(trainable, self._noise.parameters, strict=True)
        ):
            raise PrivacyError(
                "the trainable parameters changed since the start, and new ones would get no noise; set requires_grad "
                "before you create PrivateGradients"
            )


def _refuse_without_group() -> None:
    found = without_group()
    if found is not None:
        raise PrivacyError(
            f"{found}, but they have no process group: each would draw its own batches and noise, and together they "
            f"would spend more than the accountant counts; call torch.distributed.init_process_group() first"
        )


def refuse_other_generators(state: dict[str, Any]) -> None:
    """Raise PrivacyError for the state of a version whose random generators were others."""
    if "noise_past" not in state or state["noise"].shape[-1] != WORDS:
        raise PrivacyError(
            "the checkpoint was made by a version of memsave with other random generators, whose noise cannot be "
            "continued; start a new run, or continue with that version"
        )


def _tensor(words: np.ndarray) -> Tensor:
    return torch.from_numpy(words.view(np.int64))


def _words(state: Tensor) -> np.ndarray:
    return state.cpu().numpy().view(np.uint64)


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not named:
        raise PrivacyError("the model has no trainable parameter; set requires_grad on those to train")
    first = next(iter(named.values()))
    for name, parameter in named.items():
        if parameter.dtype not in (torch.float32, torch.float64):
            raise PrivacyError(
                f"{name} is {parameter.dtype}: rounding its clipped sum would exceed the clipping norm before noise is "
                f"added; train in float32, with bfloat16 by autocast"
            )
        if parameter.device != first.device:
            raise PrivacyError(f"{name} is on {parameter.device}, others on {first.device}; train on one device")
    return list(named.values())
