"""A second reference for a clipper: every example in a batch of its own."""

import math

import torch

from tests.support.per_example_reference import by_clipper, by_loop


def plain_losses(model, batch):
    """(B,): a loss of each example that does not depend on its place in the batch."""
    return model(batch).sin().flatten(1).sum(1)


def draw(*shape, seed=7):
    """Normal numbers in float64."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def draw_ids(vocabulary, *shape, seed=7):
    """Integers below `vocabulary`."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    return torch.randint(vocabulary, shape, generator=generator)


def examples(batch):
    """Each example of a tensor, or of tensors in tuples and dictionaries, in a batch of its own."""
    if isinstance(batch, dict):
        parts = [list(examples(value)) for value in batch.values()]
        return [dict(zip(batch, each, strict=True)) for each in zip(*parts, strict=True)]
    if isinstance(batch, tuple):
        return list(zip(*map(examples, batch), strict=True))
    return list(batch.split(1))


def alone(model, batch, per_example_losses):
    """(bound, norms (B,), clipped sum by parameter name) from the examples alone; the bound is the median norm."""
    each = [by_loop(model, example, per_example_losses, max_grad_norm=math.inf) for example in examples(batch)]
    norms = torch.cat([norm for norm, _ in each])
    bound = norms.median().item() or 1.0
    factors = (bound / norms).clamp(max=1.0)
    names = each[0][1].keys()
    return (
        bound,
        norms,
        {name: sum(factor * sums[name] for factor, (_, sums) in zip(factors, each, strict=True)) for name in names},
    )


def assert_same(results, reference, *, rtol):
    """(norms, sums) are those of (bound, norms, sums), within `rtol` and 1e-12 of the bound."""
    (norms, sums), (bound, expected_norms, expected_sums) = results, reference
    torch.testing.assert_close(norms, expected_norms, rtol=rtol, atol=1e-12 * bound)
    assert sums.keys() == expected_sums.keys()
    for name, expected in expected_sums.items():
        difference = (sums[name] - expected).norm()
        assert difference <= rtol * expected.norm() + 1e-12 * bound, (name, difference, expected.norm())


def assert_independent(model, batch, per_example_losses=plain_losses, *, rtol=1e-9):
    """Each loss differentiated in the batch gives what the examples alone give; returns (bound, norms, sums)."""
    reference = alone(model, batch, per_example_losses)
    assert_same(by_loop(model, batch, per_example_losses, max_grad_norm=reference[0]), reference, rtol=rtol)
    return reference


def assert_exact_alone(model, batch, per_example_losses=plain_losses, *, rtol=1e-9):
    """With each number of passes, the clipper's norms and sums are those of the examples alone and in the batch."""
    reference = assert_independent(model, batch, per_example_losses, rtol=rtol)
    for passes in (1, 2):
        results = by_clipper(model, batch, per_example_losses, max_grad_norm=reference[0], passes=passes)
        assert_same(results, reference, rtol=rtol)


def assert_exact_or_refused(model, batch, per_example_losses=plain_losses, *, rtol=1e-9):
    """With each number of passes, the clipper is exact, or memsave raises a ValueError; returns whether all are exact.

    The reference has the same batch and random numbers.
    """
    bound = by_loop(model, batch, per_example_losses, max_grad_norm=1.0)[0].median().item() or 1.0
    reference = bound, *by_loop(model, batch, per_example_losses, max_grad_norm=bound)
    exact = True
    for passes in (1, 2):
        try:
            results = by_clipper(model, batch, per_example_losses, max_grad_norm=bound, passes=passes)
        except ValueError as refusal:
            assert raised_by_memsave(refusal), refusal
            exact = False
        else:
            assert_same(results, reference, rtol=rtol)
    return exact


def raised_by_memsave(error):
    """Whether the innermost frame of its traceback belongs to the package."""
    trace = error.__traceback__
    while trace.tb_next is not None:
        trace = trace.tb_next
    return trace.tb_frame.f_globals.get("__name__", "").startswith("memsave.")
