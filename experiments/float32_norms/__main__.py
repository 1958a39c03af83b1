"""The accuracy of a float32 norm of many elements, by the method of summation.

    python -m experiments.float32_norms

Two per-example gradients with the sizes of a bias, a weight and the embedding of GPT-2 are drawn from a normal
distribution. Each norm is compared with the norm in float64.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from experiments.record import insert, keep, machine, without_options
from memsave.ghost.gradient_products import inner_products
from memsave.ghost.gradients import PerSampleGrad

HERE = Path(__file__).parent
SIZES = {"768": 768, "768 x 3072": 768 * 3072, "50257 x 768": 50257 * 768}
METHODS: dict[str, Callable[[Tensor], Tensor]] = {
    "`einsum('bi,bi->b')`": lambda values: torch.einsum("bi,bi->b", values, values).sqrt(),
    "`bmm`": lambda values: (values[:, None] @ values[:, :, None]).flatten().sqrt(),
    "`Tensor.norm(2, dim=1)`": lambda values: values.norm(2, dim=1),
    "`(g * g).sum(1)`": lambda values: (values * values).sum(1).sqrt(),
    "memsave": lambda values: inner_products(PerSampleGrad(values), PerSampleGrad(values)).sqrt(),
}


def measure() -> dict[str, dict[str, float]]:
    """The relative error of the norm by method and size, the larger one of two examples."""
    errors: dict[str, dict[str, float]] = {method: {} for method in METHODS}
    for name, size in SIZES.items():
        values = torch.randn(2, size, generator=torch.Generator().manual_seed(0))
        exact = values.double().square().sum(1).sqrt()
        for method, norm in METHODS.items():
            error = (norm(values).double() - exact) / exact
            errors[method][name] = error[error.abs().argmax()].item()
    return errors


def main() -> None:
    results = measure()
    rows = [f"| | {' | '.join(SIZES)} |", f"|---|{'---|' * len(SIZES)}"]
    rows += [f"| {method} | {' | '.join(f'{e:+.1e}' for e in errors.values())} |" for method, errors in results.items()]
    text = "\n".join([f"{machine()}:\n", *rows])
    print(text)
    insert(HERE / "README.md", name="norms", text=text)
    keep(HERE / "results.json", command="python -m experiments.float32_norms", results=results)


if __name__ == "__main__":
    without_options(__doc__)
    main()
