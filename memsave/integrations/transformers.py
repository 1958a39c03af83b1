"""Private training with the Trainer of transformers, or with a class of one's own that is derived from it.

    trainer = PrivateTrainer(
        model=model, args=args, train_dataset=data,
        privacy=PrivacyArguments(target_epsilon=3.0, target_delta=1e-5, max_grad_norm=0.1, micro_batch_size=8),
    )
    trainer.train()

One step of the Trainer is one logical batch, drawn by Poisson sampling, whose expected size is that of the Trainer's
arguments: per_device_train_batch_size x gradient_accumulation_steps x processes. It is split into micro-batches, each
example's gradient is clipped, and noise is added once. `PrivateTrainerMixin` does the same for a subclass:

    class PrivateSFTTrainer(PrivateTrainerMixin, SFTTrainer): ...
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer
from transformers.trainer_callback import EarlyStoppingCallback, TrainerCallback

from memsave.ghost import example_rows
from memsave.integrations.private_training import (
    MicroBatch,
    PoissonSampler,
    PrivacyArguments,
    epsilon_spent,
    losses_of_units,
    poisson_loader,
    rows_of_units,
)
from memsave.models.model_losses import model_losses
from memsave.privacy import PrivacyError, PrivateGradients
from memsave.privacy.monitor import EpsilonMonitor
from memsave.processes import broadcast_model, process_count
from memsave.profiler import memory_page

__all__ = ["MemoryCallback", "PrivacyArguments", "PrivateTrainer", "PrivateTrainerMixin"]

STATE_FILE = "privacy_state.pt"
"""In a checkpoint of the Trainer: counts, mechanism and the secret state of the generators."""

Inputs = dict[str, Any]
PerExampleLosses = Callable[[Any, Tensor | None], Tensor]
"""(outputs of the model, labels) -> (B,)."""


if TYPE_CHECKING:
    Base = Trainer
else:
    Base = object


class PrivateTrainerMixin(Base):
    """Makes a class that is derived from transformers' `Trainer` train privately; list it before that class.

    The loss of each example is that of `memsave.models.model_losses`, for the common heads of transformers. Otherwise
    give `per_example_loss_func`, or override `compute_loss`, which must return one loss for each example, (B,).

    `train` trains once: the accountant plans all steps before the first. The gradient of each step is that of
    `PrivateGradients`; the Trainer's own `max_grad_norm` is not used. After it, the model is an ordinary model again.

    Formal guarantees:
        What an optimizer computes from the gradients of k steps is (epsilon, delta)-differentially private for adding
        or removing one example of `train_dataset`, with the `epsilon` that is logged after step k. An example is a row,
        or with `PrivacyArguments(unit=COLUMN)` all rows of a person. Logged losses and
        gradient norms, and scores on private data, are not private.

    Args:
        privacy: the mechanism.
        per_example_loss_func: (outputs of the model, labels) -> (B,), which takes the place of the model's loss.
        args, kwargs: those of the other class. `train_dataset` must have a length.

    Raises PrivacyError for a setting under which the guarantee would not hold.
    """

    def __init__(
        self,
        *args: Any,
        privacy: PrivacyArguments,
        per_example_loss_func: PerExampleLosses | None = None,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.privacy = privacy
        self.per_example_loss_func = per_example_loss_func
        self.private_gradients: PrivateGradients | None = None
        """Counts, mechanism and clipper of the training; None before `train`."""
        self._in_private_step = False
        self._units: list[list[int]] | None = None
        self._refuse_settings()
        self.expected_batch_size: int = super().get_total_train_batch_size(self.args)
        """The mean number of examples in a step, of all processes."""
        self.args = copy.copy(self.args)  # the user's object stays as it is
        self.args.gradient_accumulation_steps = 1  # a step gets its whole logical batch at once
        self.args.max_grad_norm = 0.0  # would clip the noisy mean
        self.args.ignore_data_skip = False  # the sampler knows where to continue

    @property
    def epsilon(self) -> float:
        """The epsilon spent so far; 0.0 before `train`, infinity with a known seed, which is not private."""
        return epsilon_spent(self.private_gradients)

    # ---- what is refused ----

    def _refuse_settings(self) -> None:
        for broken, sentence in _refusals(self):
            if broken:
                raise PrivacyError(sentence)

    # ---- data: Poisson batches in micro-batches ----

    def get_total_train_batch_size(self, args: Any) -> int:
        """The expected size of a logical batch."""
        return self.expected_batch_size

    def get_train_dataloader(self) -> DataLoader:
        """Batches of `PrivateGradients.batches`, each a list of micro-batches; for `train` alone."""
        if not self.is_in_train or self.private_gradients is None:
            raise PrivacyError("a private Trainer draws its batches while it trains; call train()")
        dataset, collate = self.train_dataset, self.data_collator
        if hasattr(dataset, "column_names"):  # of the package datasets
            dataset = self._remove_unused_columns(dataset, description="Training")
        else:
            collate = self._get_collator_with_removed_columns(collate, description="Training")
        args = self.args
        return poisson_loader(
            dataset,
            self._sampler,
            collate=collate,
            micro_batch_size=self.privacy.micro_batch_size or args.per_device_train_batch_size,
            units=self._units,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            multiprocessing_context=args.dataloader_multiprocessing_context,
            prefetch_factor=args.dataloader_prefetch_factor,
        )

    # ---- training ----

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        before = self.private_gradients
        if before is not None and kwargs.get("resume_from_checkpoint") is None:
            raise PrivacyError(
                f"this trainer has spent epsilon {before.epsilon:.2f} already; create a new one to train again, and "
                f"compose the epsilons of both"
            )
        assert self.model is not None
        if process_count() > 1:
            broadcast_model(self.model)
        self.private_gradients = self._start()
        try:
            return super()._inner_training_loop(*args, **kwargs)
        finally:
            self.private_gradients.close()

    def _start(self) -> PrivateGradients:
        model, data = self.model, self.train_dataset
        assert model is not None and isinstance(data, Sized)
        column = self.privacy.unit
        self._units = None if column is None else rows_of_units(data, column)
        size = len(data if self._units is None else self._units)
        steps_per_epoch = math.ceil(size / self.expected_batch_size)
        steps = (
            self.args.max_steps if self.args.max_steps > 0 else math.ceil(self.args.num_train_epochs * steps_per_epoch)
        )
        private = self.privacy.start(model, size=size, batch_size=self.expected_batch_size, steps=steps)
        self._sampler = PoissonSampler(private, steps=steps_per_epoch, refetched=True)
        self._monitor = EpsilonMonitor(private, steps=steps)
        return private

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer, but DistributedDataParallel does not wrap the model: `PrivateGradients` sums."""
        prepare = self.accelerator.prepare_model
        self.accelerator.prepare_model = partial(prepare, evaluation_mode=True)
        try:
            return super()._prepare_for_training(*args, **kwargs)
        finally:
            self.accelerator.prepare_model = prepare

    def training_step(  # type: ignore[override]
        self, model: nn.Module, inputs: Sequence[MicroBatch], num_items_in_batch: Any = None
    ) -> Tensor:
        """One logical batch: clipped sums of its micro-batches, then noise. Returns the mean loss of the examples."""
        private = self.private_gradients
        assert private is not None
        if self.privacy.target_epsilon is not None and private.steps >= self._monitor.steps:
            raise PrivacyError(
                f"the noise was calibrated for {self._monitor.steps} steps, which are taken; another would spend more "
                f"than target_epsilon={self.privacy.target_epsilon:g}: does a callback unset should_training_stop?"
            )
        model.train()
        to_training = getattr(self.optimizer, "train", None)  # of optimizers without a schedule
        if callable(to_training):
            to_training()
        total, before = torch.zeros((), device=self.args.device), private.examples
        with getattr(self, "maybe_activation_offload_context", nullcontext()):  # of TRL
            for count, micro, rows in inputs:
                losses = self._losses_of_examples(model, micro, count=count, rows=rows)
                private.backward(losses)
                total += losses.detach().nan_to_num(0, 0, 0).sum()
        private.finish()
        # the Trainer averages over the processes
        return total * process_count() / max(1, private.examples - before)

    def _losses_of_examples(self, model: nn.Module, micro: Inputs, *, count: int, rows: Sequence[int] | None) -> Tensor:
        """The losses (count,) of a micro-batch; `rows`: the example of each of its rows, None for one row each."""
        if rows is None:
            return self._of_each(self._losses(model, micro), count)
        with example_rows(rows, examples=count):
            losses = self._of_each(self._losses(model, micro), len(rows))
        return losses_of_units(losses, rows, count=count)

    def _losses(self, model: nn.Module, micro: Inputs) -> Any:
        self._in_private_step = True
        try:
            with self.compute_loss_context_manager():
                return self.compute_loss(model, self._prepare_inputs(micro))
        finally:
            self._in_private_step = False

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Inputs,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The losses (B,) of a training step; in evaluation, what the other class computes."""
        if not self._in_private_step:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self.per_example_loss_func is not None:
            inputs = dict(inputs)
            labels = inputs.pop("labels", None)
            return self.per_example_loss_func(model(**inputs), labels)
        if _defines_loss(type(self)):
            return super().compute_loss(model, inputs)
        return model_losses(model, inputs, head=self.privacy.head)

    def _of_each(self, losses: Any, count: int) -> Tensor:
        """The losses (count,) of a micro-batch; the one loss of a batch of one example is that of the example."""
        alone = count == 1 and self.privacy.passes == "direct"
        if isinstance(losses, Tensor) and (losses.shape == (count,) or (alone and losses.numel() == 1)):
            return losses.view(count)
        source = "per_example_loss_func" if self.per_example_loss_func is not None else "compute_loss"
        shape = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise PrivacyError(
            f"{source} returned {shape} for {count} examples; it must return the loss of each, ({count},), and the "
            f'collator must keep the examples apart. Any loss works with micro_batch_size=1 and passes="direct"'
        )

    # ---- logs ----

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Also logs `epsilon`: an upper bound, at most about 10% above `self.epsilon`, and equal to it at the end."""
        epsilon = 0.0 if self.private_gradients is None else self._monitor.bound()
        super().log({**logs, "epsilon": epsilon}, *args, **kwargs)

    def floating_point_ops(self, inputs: Any) -> int:
        """Those of all micro-batches."""
        if isinstance(inputs, dict):
            return int(super().floating_point_ops(inputs))
        return sum(int(super(PrivateTrainerMixin, self).floating_point_ops(micro)) for _, micro, _ in inputs)

    # ---- checkpoints ----

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        assert self.private_gradients is not None
        state = self.private_gradients.state_dict()  # all processes
        if self.args.should_save:
            torch.save(state, Path(output_dir) / STATE_FILE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        private, path = self.private_gradients, Path(checkpoint) / STATE_FILE
        assert private is not None
        if not path.is_file():
            raise PrivacyError(
                f"{checkpoint} has no {STATE_FILE}, so the epsilon that it has spent is not known; continue from a "
                f"checkpoint of a private trainer"
            )
        try:
            state = torch.load(path, weights_only=True)
        except Exception as error:
            raise PrivacyError(f"{path} cannot be read ({error}); continue from another checkpoint") from error
        private.load_state_dict(state)
        if private.steps != self.state.global_step:
            raise PrivacyError(
                f"{path} is of step {private.steps}, the trainer's state of step {self.state.global_step}; continue "
                f"from another checkpoint"
            )
        self._sampler.done = private.steps % len(self._sampler)

    def hyperparameter_search(self, *args: Any, **kwargs: Any) -> Any:
        """Refused."""
        raise PrivacyError(
            "hyperparameter_search trains many models on the private data, and their choice spends more epsilon than "
            "that of one; train each with a PrivateTrainer of its own and compose their epsilons"
        )


class PrivateTrainer(PrivateTrainerMixin, Trainer):
    """transformers' `Trainer` with differential privacy; see `PrivateTrainerMixin`."""


class MemoryCallback(TrainerCallback):
    """Records one step of any Trainer and writes it as an interactive page.

    trainer = Trainer(..., callbacks=[MemoryCallback("memory.html")])

    Args:
        path: the page.
        step: which step; the first one creates the state of the optimizer.
    """

    def __init__(self, path: str = "memory.html", *, step: int = 2):
        self.path, self.step = path, step
        self._recording = ExitStack()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin before the step."""
        if state.global_step == self.step - 1 and state.is_world_process_zero:
            optimizer = kwargs.get("optimizer")
            optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
            self._recording.enter_context(memory_page(kwargs["model"], self.path, optimizer=optimizer))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the page."""
        self._recording.close()


def _refusals(trainer: Any) -> Iterator[tuple[bool, str]]:
    """(whether it is so, the sentence) of each setting under which the guarantee would not hold."""
    args, data = trainer.args, trainer.train_dataset
    no_length = data is not None and (isinstance(data, IterableDataset) or not isinstance(data, Sized))
    yield (
        no_length,
        "train_dataset has no length, and Poisson sampling needs the number of examples; give a map-style dataset",
    )
    yield (
        trainer.compute_loss_func is not None,
        "compute_loss_func returns one loss for the batch; give per_example_loss_func=, which returns one for each "
        "example",
    )
    sampling = str(args.train_sampling_strategy)
    yield (
        sampling != "random",
        f"train_sampling_strategy={sampling} chooses the examples of a batch, and epsilon is that of Poisson sampling; "
        f"leave it out",
    )
    yield args.dataloader_drop_last, "dataloader_drop_last has no meaning for Poisson batches; leave it out"
    yield (
        bool(args.label_smoothing_factor),
        "label_smoothing_factor makes the loss a mean over the batch; smooth in per_example_loss_func",
    )
    yield (
        args.neftune_noise_alpha is not None,
        "neftune_noise_alpha adds noise that depends on the longest text of the batch; leave it out",
    )
    yield args.auto_find_batch_size, "auto_find_batch_size changes the batch size, and with it epsilon; leave it out"
    yield args.fp16, "fp16 scales the loss, and overflows skip steps; give bf16=True, or train in float32"
    yield args.n_gpu > 1, "the Trainer would use DataParallel; start one process for each GPU with torchrun"
    for name in ("deepspeed", "fsdp", "parallelism_config"):
        yield (
            bool(getattr(args, name, None)),
            f"{name} moves gradients in ways that clipping does not follow; start torchrun without it, or shard the "
            f"model in a loop of your own (docs/distributed.md)",
        )
    yield (
        args.include_num_input_tokens_seen != "no",
        "include_num_input_tokens_seen would communicate in each micro-batch; leave it out",
    )
    yield args.torch_compile, "torch_compile hides the layers from the clipper; leave it out"
    yield args.use_liger_kernel, "use_liger_kernel fuses layers with the loss of the batch; leave it out"
    optim = str(getattr(args.optim, "value", args.optim))
    yield (
        "lomo" in optim or "layerwise" in optim,
        f"optim={optim} updates parameters within the backward, before they have noise; give another",
    )
    for name in ("packing", "padding_free"):
        yield (
            bool(getattr(args, name, False)),
            f"{name} puts several examples into one row, whose gradients cannot be clipped apart; leave it out",
        )
    loss_type = getattr(args, "loss_type", "nll") if _loss_owner(type(trainer)).__name__ == "SFTTrainer" else "nll"
    yield (
        trainer.per_example_loss_func is None
        and (loss_type not in (None, "nll") or bool(getattr(trainer, "aux_loss_enabled", False))),
        f"loss_type={loss_type}, or a loss over experts, is not computed for each example; give loss_type=nll without "
        f"it, or per_example_loss_func",
    )
    yield (
        process_count() > 1 and _defines_loss(type(trainer)) and _loss_owner(type(trainer)).__module__[:4] == "trl.",
        f"{_loss_owner(type(trainer)).__name__} communicates in each micro-batch, and their number differs between "
        f"processes; start one process",
    )
    published = str(getattr(args.hub_strategy, "value", args.hub_strategy))
    yield (
        args.push_to_hub and published in ("checkpoint", "all_checkpoints"),
        f"hub_strategy={published} publishes checkpoints, and they hold the secret state of the noise; give end or "
        f"every_save",
    )
    chooses = args.load_best_model_at_end or any(
        isinstance(each, EarlyStoppingCallback) for each in trainer.callback_handler.callbacks
    )
    yield (
        chooses and trainer.eval_dataset is trainer.train_dataset,
        "early stopping and load_best_model_at_end would choose by scores on train_dataset, which are not private; "
        "give an eval_dataset of other examples",
    )


def _loss_owner(trainer_class: type) -> type:
    """The class after the mixin that defines `compute_loss`."""
    classes = trainer_class.__mro__[trainer_class.__mro__.index(PrivateTrainerMixin) + 1 :]
    return next(each for each in classes if "compute_loss" in vars(each))


def _defines_loss(trainer_class: type) -> bool:
    """Whether the loss is neither that of transformers' Trainer nor of TRL's SFTTrainer, which `model_losses` has."""
    owner = _loss_owner(trainer_class)
    return owner.__module__.partition(".")[0] != "transformers" and owner.__name__ != "SFTTrainer"
