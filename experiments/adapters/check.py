"""One set-up: a tiny base model with its adapter, plain and with a clipper."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from experiments.adapters.setups import BASES, Setup, mixture
from experiments.models.check import (
    EXACT,
    ROUNDED,
    SPREAD,
    Losses,
    Plain,
    Rounding,
    Row,
    build,
    draws,
    in_float64,
    is_refusal,
    judge,
    run_plainly,
    together,
    told,
)
from experiments.models.tasks import TASKS, Batch, next_tokens
from memsave.ghost import GhostClipper

SEED = 1


def adapted(setup: Setup) -> nn.Module:
    """The base model with its adapter, in float64 and train mode; noise on every trainable parameter."""
    import peft
    import transformers

    name, task, kind = BASES[setup.base]
    base = build(getattr(transformers, name), task)
    if setup.before:
        setup.before(base)
    if setup.single:
        base.float()
        torch.set_default_dtype(torch.float32)
    if setup.kind == "XLora":
        model = mixture(base)
    else:
        config = getattr(peft, f"{setup.kind}Config")(
            task_type=kind, **{key: configured(value) for key, value in setup.options.items()}
        )
        model = peft.get_peft_model(base, config)
    if setup.after:
        setup.after(model)
    model = model.double().train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += SPREAD * torch.randn_like(parameter)
    return model


def configured(option: Any) -> Any:
    """A copy of an option; (name of a configuration of PEFT, its options) becomes that configuration."""
    import peft

    if isinstance(option, tuple):
        name, options = option
        return getattr(peft, name)(**options)
    return copy.deepcopy(option)


def text_losses(model: nn.Module, batch: Batch) -> Tensor:
    """(B,): the mean over each text's own next tokens; the logits of virtual tokens before the text are dropped."""
    ids = batch["input_ids"]
    return next_tokens(model(**batch).logits[:, -ids.shape[1] :], ids)


def check(setup: Setup) -> Row:
    """The verdict on one set-up."""
    task = BASES[setup.base][1]
    row = Row(setup.base, setup.name, task)
    _, make, losses_of = TASKS[task]
    losses_of = text_losses if task == "causal language model" else losses_of
    with in_float64():
        try:
            model = adapted(setup)
            row.parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
            batch = make(base_of(model), task, {})
            batch = setup.change(batch) if setup.change else batch
            if draws(copy.deepcopy(model), batch, losses_of) != setup.random:
                raise ValueError("the set-up is wrong about whether the model draws random numbers in train mode")
            if setup.random:
                row.mode = "train, seeded"
                losses_of = seeded(losses_of)
            plain = (run_seeded if setup.random else run_plainly)(model, batch, losses_of)
        except Exception as error:
            row.message = told(error)
            return row
        if attaches(row, plain, model):
            judge(row, plain, model, batch, losses_of)
    return row


def attaches(row: Row, plain: Plain, model: nn.Module) -> bool:
    """Attach a clipper to the model itself: the copies that `judge` makes lose their gradient hooks."""
    try:
        GhostClipper(model, max_grad_norm=1.0).close()
    except Exception as error:
        row.apart, row.tolerance = plain.apart, plain.tolerance
        row.verdict, row.message = ("refused" if is_refusal(error) else "traceback"), told(error)
        return False
    return True


def base_of(model: nn.Module) -> nn.Module:
    """The model without the wrapper of PEFT, whose forward names its inputs."""
    return model.get_base_model()


def seeded(losses_of: Losses) -> Losses:
    """The same losses, with the same random numbers in each forward."""

    def with_seed(model: nn.Module, batch: Batch) -> Tensor:
        torch.manual_seed(SEED)
        return losses_of(model, batch)

    return with_seed


def run_seeded(model: nn.Module, batch: Batch, losses_of: Losses) -> Plain:
    """Each example in the batch: alone, it would draw other random numbers."""
    with Rounding() as rounding:
        losses_of(copy.deepcopy(model), batch)
    reference = together(copy.deepcopy(model), batch, losses_of)
    return Plain(reference, apart=True, tolerance=ROUNDED if rounding.seen else EXACT)
