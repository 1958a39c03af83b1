"""A second reference for a clipper: every example in a batch of its own."""

import torch

from tests.support.per_example_reference import assert_exact, by_loop


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


def assert_independent(model, batch, per_example_losses, *, rtol=1e-9):
    """The norms and the clipped sums in the batch are those of the examples alone."""
    norms, sums = by_loop(model, batch, per_example_losses, max_grad_norm=1.0)
    alone = [by_loop(model, each, per_example_losses, max_grad_norm=1.0) for each in examples(batch)]
    torch.testing.assert_close(norms, torch.cat([norm for norm, _ in alone]), rtol=rtol, atol=rtol / 100)
    for name, total in sums.items():
        torch.testing.assert_close(total, sum(each[name] for _, each in alone), rtol=rtol, atol=rtol / 100)


def assert_exact_alone(model, batch, per_example_losses=plain_losses, *, rtol=1e-9, **options):
    """The clipper's norms and sums are those of one backward per example, in the batch and alone."""
    assert_independent(model, batch, per_example_losses, rtol=rtol)
    assert_exact(model, batch, per_example_losses, rtol=rtol, **options)


def assert_exact_or_refused(model, batch, per_example_losses=plain_losses, *, passes=(1, 2), **options):
    """With each number of passes, the clipper is exact, or memsave raises a ValueError; returns whether all are."""
    by_loop(model, batch, per_example_losses, max_grad_norm=1.0)  # errors of the model itself
    exact = True
    for number in passes:
        try:
            assert_exact(model, batch, per_example_losses, passes=(number,), **options)
        except ValueError as refusal:
            assert raised_by_memsave(refusal), refusal
            exact = False
    return exact


def raised_by_memsave(error):
    """Whether the innermost frame of its traceback belongs to the package."""
    trace = error.__traceback__
    while trace.tb_next is not None:
        trace = trace.tb_next
    return trace.tb_frame.f_globals.get("__name__", "").startswith("memsave.")
