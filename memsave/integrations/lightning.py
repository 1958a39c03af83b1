"""Private training with Lightning, by manual optimisation.

    class Model(PrivateModule):
        def per_example_losses(self, batch):            # (B,)
            inputs, labels = batch
            return F.cross_entropy(self.network(inputs), labels, reduction="none")

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    model = Model(...)
    model.make_private(dataset, batch_size=64, privacy=PrivacyArguments(target_epsilon=3.0))
    Trainer(max_epochs=3).fit(model)

One step of the Trainer is one logical batch, drawn by Poisson sampling and split into micro-batches. The Trainer's
checkpoints hold the secret state, and `fit(ckpt_path=...)` continues from it. In several processes, give the Trainer
`strategy=PrivateDDPStrategy()` and `use_distributed_sampler=False`.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate

from memsave.integrations.private_training import (
    MicroBatch,
    PoissonSampler,
    PrivacyArguments,
    epsilon_spent,
    poisson_loader,
)
from memsave.privacy import PrivacyError, PrivateGradients
from memsave.privacy.monitor import EpsilonMonitor
from memsave.processes import broadcast_model, process_count
from memsave.profiler import memory_page

__all__ = ["MemoryCallback", "PrivacyArguments", "PrivateDDPStrategy", "PrivateModule"]

KEY = "memsave_privacy"
"""In Lightning's checkpoints: counts, mechanism and the secret state of the generators."""


class PrivateModule(LightningModule):
    """A LightningModule that trains privately; override `per_example_losses` and `configure_optimizers`.

    Schedulers step once after each step. Logs `loss` and `epsilon`; the loss is not private. A second `fit` is refused,
    because the accountant plans all steps before the first.

    Formal guarantees:
        What the optimizer computes from the gradients of k steps is (epsilon, delta)-differentially private for adding
        or removing one example of the data set, with the `epsilon` after step k.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.automatic_optimization = False
        self.private_gradients: PrivateGradients | None = None
        """Counts, mechanism and clipper of the training; None before `fit`."""
        self._given: tuple[Any, Any] | None = None
        self._losses: Callable[[Any], Tensor] | None = None
        self._loaded: dict[str, Any] | None = None

    def per_example_losses(self, batch: Any) -> Tensor:
        """(B,): the loss of each example of a micro-batch."""
        raise NotImplementedError("override per_example_losses(batch), which returns (B,)")

    def make_private(
        self,
        dataset: Any,
        *,
        batch_size: int,
        privacy: PrivacyArguments,
        collate_fn: Callable[[list[Any]], Any] = default_collate,
        **loader: Any,
    ) -> None:
        """Train privately on the examples of a map-style data set.

        Args:
            dataset: the data set; the unit of privacy is one of its examples.
            batch_size: the expected size of a logical batch, in all processes together.
            privacy: the mechanism.
            collate_fn: makes a batch of a list of examples.
            loader: further options of DataLoader, such as num_workers.
        """
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            raise PrivacyError("the data set has no length, and Poisson sampling needs the number of examples")
        if privacy.unit is not None:
            raise PrivacyError(
                "PrivacyArguments(unit=) is for PrivateTrainer; in Lightning, let an example of the dataset hold all "
                "rows of a person, and fold their losses by memsave.ghost.example_rows"
            )
        self._dataset, self._privacy, self._batch_size = dataset, privacy, batch_size
        self._given = (collate_fn, loader)

    @property
    def epsilon(self) -> float:
        """The epsilon spent so far; 0.0 before `fit`, infinity with a known seed, which is not private."""
        return epsilon_spent(self.private_gradients)

    # ---- hooks of Lightning ----

    def train_dataloader(self) -> DataLoader:
        """Logical batches, each a list of micro-batches."""
        if self._given is None:
            raise PrivacyError("call make_private(dataset, batch_size=, privacy=) before fit(), and give fit() no data")
        if self.private_gradients is None:
            raise PrivacyError("a private module draws its batches while it trains; call fit()")
        collate, loader = self._given
        return poisson_loader(
            self._dataset,
            self._sampler,
            collate=collate,
            micro_batch_size=self._privacy.micro_batch_size or self._batch_size,
            **loader,
        )

    def on_fit_start(self) -> None:
        """Attach the clipper, when the model is on its device."""
        trainer = self.trainer
        if self._given is None:
            raise PrivacyError("call make_private(dataset, batch_size=, privacy=) before fit()")
        before = self.private_gradients
        if before is not None and self._loaded is None:
            raise PrivacyError(
                f"this module has spent epsilon {before.epsilon:.2f} already; train another copy, and compose the "
                f"epsilons of both"
            )
        if process_count() > 1 and not isinstance(trainer.strategy, PrivateDDPStrategy):
            raise PrivacyError(
                "in several processes, give the Trainer strategy=PrivateDDPStrategy() and use_distributed_sampler=False"
            )
        if trainer.accumulate_grad_batches != 1 or trainer.gradient_clip_val is not None:
            raise PrivacyError(
                "a step is one logical batch, and each example is clipped: leave accumulate_grad_batches and "
                "gradient_clip_val out, and give batch_size and micro_batch_size"
            )
        if "16" in str(trainer.precision) and "bf16" not in str(trainer.precision):
            raise PrivacyError("float16 scales the loss, and overflows skip steps; give bf16-mixed, or 32-true")
        size = len(self._dataset)
        per_epoch = math.ceil(size / self._batch_size)
        steps = trainer.max_steps if trainer.max_steps > 0 else per_epoch * (trainer.max_epochs or 0)
        if steps <= 0:
            raise PrivacyError("the Trainer has no end, so that noise cannot be planned; give max_epochs or max_steps")
        network = _LossNetwork(self)
        self._losses = network.__call__  # a method: the network would become a part of this module
        private = self._privacy.start(network, size=size, batch_size=self._batch_size, steps=steps)
        private.guard.closures_are_empty = True  # those of Lightning, under manual optimisation
        self._sampler = PoissonSampler(private, steps=per_epoch, refetched=False)
        self._monitor = EpsilonMonitor(private, steps=steps)
        if self._loaded is not None:
            private.load_state_dict(self._loaded)
            self._sampler.done, self._loaded = private.steps % per_epoch, None
        self.private_gradients = private

    def training_step(self, batch: Sequence[MicroBatch], batch_idx: int) -> None:
        """One logical batch: clipped sums of its micro-batches, noise, and a step of the optimizer."""
        private = self.private_gradients
        assert private is not None and self._losses is not None
        if self._privacy.target_epsilon is not None and private.steps >= self._monitor.steps:
            raise PrivacyError(f"the noise was calibrated for {self._monitor.steps} steps, which are taken")
        optimizers = self.optimizers()
        if isinstance(optimizers, list):
            raise PrivacyError("a private module has one optimizer")
        total, before = torch.zeros((), device=self.device), private.examples
        for count, micro, _ in batch:
            losses = self._losses(micro)
            if losses.shape != (count,):
                raise PrivacyError(
                    f"per_example_losses returned {tuple(losses.shape)} for {count} examples; it must return the loss "
                    f"of each, ({count},)"
                )
            private.backward(losses)
            total += losses.detach().nan_to_num(0, 0, 0).sum()
        private.finish()
        optimizers.step()
        optimizers.zero_grad()
        for scheduler in self._schedulers():
            scheduler.step()
        mean = total * process_count() / max(1, private.examples - before)
        self.log("loss", mean, prog_bar=True, batch_size=1)
        self.log("epsilon", self._monitor.bound(), prog_bar=True, batch_size=1)

    def _schedulers(self) -> list[Any]:
        found = self.lr_schedulers()
        return [] if found is None else found if isinstance(found, list) else [found]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the secret state; in all processes together."""
        super().on_save_checkpoint(checkpoint)
        if self.private_gradients is not None:
            checkpoint[KEY] = self.private_gradients.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores the secret state when `fit` starts."""
        super().on_load_checkpoint(checkpoint)
        self._loaded = checkpoint.get(KEY)
        if self._loaded is None:
            raise PrivacyError(
                "the checkpoint has no privacy state, so the epsilon that it has spent is not known; continue from one "
                "of a private module"
            )

    def on_fit_end(self) -> None:
        """Detach the clipper: the model is an ordinary one again."""
        super().on_fit_end()
        if self.private_gradients is not None:
            self.private_gradients.close()


class _LossNetwork(nn.Module):
    """Calls `per_example_losses` as the forward of a module, to which the clipper is attached."""

    def __init__(self, module: PrivateModule):
        super().__init__()
        self.module = module

    def forward(self, batch: Any) -> Tensor:
        return self.module.per_example_losses(batch)


class PrivateDDPStrategy(DDPStrategy):
    """Several processes without DistributedDataParallel: `PrivateGradients` sums the gradients of all."""

    def configure_ddp(self) -> None:
        """Only gives the model of rank 0 to all processes."""
        assert self.model is not None
        broadcast_model(self.model)


class MemoryCallback(Callback):
    """Records one step of any LightningModule and writes it as an interactive page.

    Trainer(callbacks=[MemoryCallback("memory.html")]).fit(model, loader)

    Args:
        path: the page.
        step: which batch; the first one creates the state of the optimizer.
    """

    def __init__(self, path: str = "memory.html", *, step: int = 2):
        self.path, self.step = path, step
        self._recording = ExitStack()
        self._seen = 0

    def on_train_batch_start(self, trainer: Any, pl_module: LightningModule, *args: Any) -> None:
        """Begin before the batch."""
        self._seen += 1
        if self._seen == self.step and trainer.is_global_zero:
            optimizer = trainer.optimizers[0] if trainer.optimizers else None
            self._recording.enter_context(memory_page(pl_module, self.path, optimizer=optimizer))

    def on_train_batch_end(self, trainer: Any, pl_module: LightningModule, *args: Any) -> None:
        """Write the page."""
        self._recording.close()
