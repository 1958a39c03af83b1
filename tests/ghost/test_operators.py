"""Every operator with a rule, against one backward per example, and with each rule broken by a factor of 1.01."""

from collections import defaultdict
from dataclasses import replace

import pytest
import torch

from memsave.ghost import operator_trace, operators
from memsave.ghost.gradients import FactoredGrad, PerSampleGrad
from memsave.ghost.operator_trace import OperatorTrace
from memsave.ghost.operators import convolutions, example_by_example, rule
from tests.support.examples_alone import draw, plain_losses
from tests.support.operator_cases import BATCH, CASES, LENGTH, WIDTH, Use
from tests.support.per_example_reference import assert_exact

NOT_ALONE = {
    "dot": "a product of two vectors has no dimension of the examples",
    "addbmm": "it sums over the batch",
}
"""Names with a rule that no batch of two examples reaches."""


def labels(cases):
    return [f"{name}: {about}" if about else name for name, about, *_ in cases]


def batch():
    return draw(BATCH, LENGTH, WIDTH)


@pytest.fixture
def used(monkeypatch):
    """The names whose rules were called."""
    names, found = set(), operator_trace.rule_of

    def record(name):
        names.add(name)
        return found(name)

    monkeypatch.setattr(operator_trace, "rule_of", record)
    return names


@pytest.mark.parametrize(("name", "about", "call", "shapes"), CASES, ids=labels(CASES))
def test_a_use_is_exact(name, about, call, shapes, used):
    assert_exact(Use(call, *shapes), batch(), plain_losses)
    assert name in used


def test_every_name_has_a_case():
    assert set(rule._RULES) == {name for name, *_ in CASES} | NOT_ALONE.keys()
    assert not {name for name, *_ in CASES} & NOT_ALONE.keys()


def first_cases():
    """One case for each rule, by the rule."""
    of_rule = defaultdict(list)
    for each in CASES:
        of_rule[operators.rule_of(each[0])].append(each)
    return {found.__name__: each[0] for found, each in of_rule.items()}


def larger(gradient):
    """The gradient, 1% too large."""
    if isinstance(gradient, PerSampleGrad):
        return PerSampleGrad(gradient.values * 1.01)
    assert isinstance(gradient, FactoredGrad)
    return replace(gradient, output_grads=gradient.output_grads * 1.01)


@pytest.fixture
def broken(monkeypatch):
    """Call it with a rule: all gradients of the hooks that this rule puts are 1% too large from then on."""

    def break_rule(broken_rule):
        inside = []
        hook = OperatorTrace.hook

        def wrong(trace, output, source, rows, saved, gradient, **options):
            def scaled(*args):
                return larger(gradient(*args))

            return hook(trace, output, source, rows, saved, scaled if inside else gradient, **options)

        def marked(trace, operator):
            inside.append(operator)
            try:
                return broken_rule(trace, operator)
            finally:
                inside.pop()

        found = operator_trace.rule_of
        monkeypatch.setattr(OperatorTrace, "hook", wrong)
        monkeypatch.setattr(
            operator_trace, "rule_of", lambda name: marked if found(name) is broken_rule else found(name)
        )

    return break_rule


@pytest.mark.parametrize("name", first_cases())
def test_a_broken_rule_is_found(name, broken):
    operator, _, call, shapes = first_cases()[name]
    broken(operators.rule_of(operator))
    with pytest.raises(AssertionError):
        assert_exact(Use(call, *shapes), batch(), plain_losses)


def test_a_broken_rule_of_other_operators_is_found(broken):
    def call(h, w):
        return torch.cdist(h, w)

    assert_exact(Use(call, (2, WIDTH)), batch(), plain_losses)
    broken(example_by_example)
    with pytest.raises(AssertionError):
        assert_exact(Use(call, (2, WIDTH)), batch(), plain_losses)


def case_of(name, about):
    """The module of a case."""
    return next(Use(call, *shapes) for found, what, call, shapes in CASES if (found, what) == (name, about))


@pytest.mark.parametrize("name", ["conv1d", "conv2d", "conv3d"])
def test_a_convolution_of_a_batch_does_not_run_example_by_example(name, monkeypatch):
    monkeypatch.setattr(convolutions, "example_by_example", lambda *_: pytest.fail("runs example by example"))
    assert_exact(case_of(name, ""), batch(), plain_losses)


def test_an_einsum_that_is_a_linear_layer_makes_no_copies_of_the_weight(monkeypatch):
    monkeypatch.setattr(OperatorTrace, "copies", lambda *_: pytest.fail("copies the weight for each example"))
    assert_exact(case_of("einsum", "a linear layer"), batch(), plain_losses)
