"""One class: built tiny, run plainly, example by example and with a clipper."""

import copy
import re
import textwrap
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from experiments.models.overrides import OVERRIDES
from experiments.models.shrink import tiny_config
from experiments.models.tasks import TASKS, Batch
from memsave.ghost import GhostClipper

EXACT, ROUNDED, LOOSEST = 1e-8, 1e-6, 1e-4  # ROUNDED: for models that compute in float32 inside
STEP = 1e-6  # of finite differences
SPREAD = 0.1  # of the noise that is added to every parameter: gates and biases that start at zero hide errors
MESSAGE = 300  # characters
PARAMETERS = 5_000_000  # a larger model is not tiny
Losses = Callable[[nn.Module, Batch], Tensor]


@dataclass
class Row:
    """What came of one class."""

    family: str
    name: str
    task: str
    verdict: str = "not tried"
    """exact, wrong, refused, traceback, or not tried"""
    message: str = ""
    mode: str = "train"
    """train; eval where the model draws random numbers in training"""
    apart: bool = True
    """Whether the plain model keeps examples apart."""
    tolerance: float | None = None
    error: float | None = None
    """The largest relative error of norms and sums, over both passes."""
    eval: str = ""
    """The verdict in eval mode, where examples are mixed in train mode."""
    parameters: int = 0

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


class Rounding(TorchDispatchMode):
    """Notes whether an operation gives float32 or less."""

    seen = False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        made = (each.dtype for each in tree_leaves(result) if isinstance(each, Tensor))
        self.seen |= any(dtype.is_floating_point and dtype != torch.float64 for dtype in made)
        return result


@contextmanager
def in_float64() -> Iterator[None]:
    """Tensors that a model makes on the way are float64, too."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def build(model_class: type, task: str) -> nn.Module:
    """A tiny model with random weights, in float64 and train mode, without dropout."""
    torch.manual_seed(0)
    config = tiny_config(model_class.config_class, causal=task == "causal language model")
    config._experts_implementation = "eager"  # the default, grouped_mm, has no float64
    model = model_class(config).double().train()
    size = sum(p.numel() for p in model.parameters())
    if size > PARAMETERS:
        raise ValueError(f"the configuration is not tiny: the model has {size} parameters")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter += SPREAD * torch.randn_like(parameter)
    for module in model.modules():
        if isinstance(vars(module).get("dtype"), torch.dtype):  # a router that converts its own weights
            module.dtype = torch.float64
        for name in ("p", "drop_prob", "dropout", "layerdrop", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model


def gradients(loss: Tensor, parameters: list[nn.Parameter], *, retain: bool = False) -> list[Tensor]:
    """Of one loss; zeros where it depends on none."""
    found = torch.autograd.grad(loss, parameters, retain_graph=retain, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)]


def alone(model: nn.Module, batch: Batch, losses_of: Losses) -> list[list[Tensor]]:
    """Each example's gradients, of a batch of its row alone."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    rows = [{key: value[i : i + 1] for key, value in batch.items()} for i in range(len(next(iter(batch.values()))))]
    return [gradients(losses_of(model, row)[0], parameters) for row in rows]


def together(model: nn.Module, batch: Batch, losses_of: Losses) -> list[list[Tensor]]:
    """Each example's gradients, of the loss in the whole batch."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [gradients(loss, parameters, retain=True) for loss in losses_of(model, batch)]


def length(tensors: list[Tensor]) -> Tensor:
    """The norm over all of them."""
    return torch.stack([each.norm() for each in tensors]).norm()


def discrepancy(ones: list[list[Tensor]], others: list[list[Tensor]]) -> float:
    """The largest relative difference of an example's gradients."""
    pairs = zip(ones, others, strict=True)
    return max(float(length([a - b for a, b in zip(x, y, strict=True)]) / length(x)) for x, y in pairs)


def clipped_sums(model: nn.Module, batch: Batch, losses_of: Losses, **options: Any) -> tuple[Tensor, list[Tensor]]:
    """Norms (B,) and clipped sums from a GhostClipper."""
    model = copy.deepcopy(model)
    model.zero_grad()
    clipper = GhostClipper(model, **options)
    norms = clipper.backward(losses_of(model, batch))
    sums = [p.grad for p in model.parameters() if p.requires_grad]
    clipper.close()
    return norms.detach(), sums


def error_of(model: nn.Module, batch: Batch, losses_of: Losses, reference: list[list[Tensor]], passes: int) -> float:
    """The largest relative error of norms, and of each parameter's sum relative to the largest sum."""
    norms = torch.stack([length(each) for each in reference])
    bound = float(norms.median())  # some are clipped and some are not
    factors = (bound / norms).clamp(max=1.0)
    sums = [sum(c * g for c, g in zip(factors, each, strict=True)) for each in zip(*reference, strict=True)]
    ours, our_sums = clipped_sums(model, batch, losses_of, max_grad_norm=bound, passes=passes)
    of_norms = ((ours - norms).abs() / norms).max()
    of_sums = max(float((a - b).norm()) for a, b in zip(sums, our_sums, strict=True)) / max(
        float(a.norm()) for a in sums
    )
    errors = [float(of_norms), of_sums]
    return float("inf") if any(each != each for each in errors) else max(errors)


def draws(model: nn.Module, batch: Batch, losses_of: Losses) -> bool:
    """Whether the model draws random numbers."""
    with torch.no_grad():
        return not torch.equal(losses_of(model, batch), losses_of(model, batch))


@dataclass
class Plain:
    """What the plain model gives."""

    reference: list[list[Tensor]]
    """By example and parameter: the gradient of the example's loss, from a batch of its row alone."""
    apart: bool
    """Whether the gradients in the whole batch are the same."""
    tolerance: float


def run_plainly(model: nn.Module, batch: Batch, losses_of: Losses) -> Plain:
    """Each example alone and in the batch; raises where the plain model fails by itself."""
    with Rounding() as rounding:
        losses_of(copy.deepcopy(model), batch)
    inside = together(copy.deepcopy(model), batch, losses_of)
    try:
        reference = alone(copy.deepcopy(model), batch, losses_of)
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        return Plain(inside, apart=False, tolerance=LOOSEST)  # BatchNorm refuses a single example
    if not all(torch.isfinite(length(each)) and length(each) > 0 for each in reference):
        raise ValueError("a gradient is zero or not finite in the plain model")
    found = discrepancy(reference, inside)
    if found > LOOSEST and slopes_are_those_of(inside, model, batch, losses_of):
        reference, found = inside, EXACT  # PyTorch's gradient of a batch of one example is wrong there
    floor = ROUNDED if rounding.seen else EXACT
    return Plain(reference, apart=found <= LOOSEST, tolerance=min(max(floor, 10 * found), LOOSEST))


def slopes_are_those_of(gradients: list[list[Tensor]], model: nn.Module, batch: Batch, losses_of: Losses) -> bool:
    """Whether finite differences of each example's loss, from a batch of its row alone, agree with its gradients."""
    model = copy.deepcopy(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(0)
    direction = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
    rows = [{key: value[i : i + 1] for key, value in batch.items()} for i in range(len(gradients))]
    found = []
    with torch.no_grad():
        for sign in (1, -2):
            for p, each in zip(parameters, direction, strict=True):
                p += sign * STEP * each
            found.append(torch.stack([losses_of(model, row)[0] for row in rows]))
    slopes = (found[0] - found[1]) / (2 * STEP)
    expected = torch.stack([sum((g * d).sum() for g, d in zip(each, direction, strict=True)) for each in gradients])
    return bool(torch.allclose(slopes, expected, rtol=1e-4, atol=1e-6))


def check(model_class: type, family: str, task: str) -> Row:
    """The verdict on one class."""
    row = Row(family, model_class.__name__, task)
    with in_float64():
        try:
            model = build(model_class, task)
            row.parameters = sum(p.numel() for p in model.parameters())
            _, make, losses_of = TASKS[task]
            batch = make(model, task, OVERRIDES.get(family, {}))
            if draws(copy.deepcopy(model), batch, losses_of):
                row.mode = "eval"
                model.eval()
            plain = run_plainly(model, batch, losses_of)
        except Exception as error:
            row.message = told(error)
            return row
        judge(row, plain, model, batch, losses_of)
        if not row.apart and row.mode == "train":
            row.eval = in_eval_mode(row, model.eval(), batch, losses_of)
    return row


def in_eval_mode(row: Row, model: nn.Module, batch: Batch, losses_of: Losses) -> str:
    """The verdict and the message there."""
    second = Row(row.family, row.name, row.task)
    try:
        judge(second, run_plainly(model, batch, losses_of), model, batch, losses_of)
    except Exception as error:
        second.message = told(error)
    return f"{second.verdict}: {second.message}" if second.message else second.verdict


def judge(row: Row, plain: Plain, model: nn.Module, batch: Batch, losses_of: Losses) -> None:
    """Run the clipper with one pass and with two, and write the verdict."""
    row.apart, row.tolerance = plain.apart, plain.tolerance
    try:
        row.error = max(error_of(model, batch, losses_of, plain.reference, passes) for passes in (1, 2))
    except Exception as error:
        row.verdict, row.message = ("refused" if is_refusal(error) else "traceback"), told(error)
        return
    row.verdict = "exact" if row.apart and row.error <= row.tolerance else "wrong"
    if not row.apart:
        row.message = "the plain model mixes examples, and the clipper did not refuse it"


def is_refusal(error: BaseException) -> bool:
    """A ValueError that memsave raises by itself."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return isinstance(error, ValueError) and "/memsave/ghost/" in last.filename and str(last.line).startswith("raise")


def told(error: BaseException) -> str:
    """The first sentence of the message, with its kind."""
    text = re.sub(r"\s+", " ", str(error)).strip()
    text = text if is_refusal(error) else f"{type(error).__name__}: {text}"
    return textwrap.shorten(re.split(r"(?<=[a-z)])\. ", text)[0], MESSAGE, placeholder=" ...")
