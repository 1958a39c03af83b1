"""Reading, restoring and comparing the state of random number generators."""

import random

import numpy
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from memsave.random_state import RandomSnapshot, get_random_state, random_sources, set_random_state

CPU = torch.device("cpu")


class Owner(nn.Module):
    """Stores one generator of each kind in an attribute."""

    def __init__(self):
        super().__init__()
        self.torch = torch.Generator().manual_seed(1)
        self.listed = [random.Random(2)]
        self.named = {"old": numpy.random.RandomState(3), "new": numpy.random.default_rng(4)}

    def draw(self):
        return (
            torch.rand(1, generator=self.torch).item(),
            self.listed[0].random(),
            self.named["old"].rand(),
            self.named["new"].random(),
        )


def draw():
    return torch.rand(1).item(), random.random(), numpy.random.rand()


def test_a_snapshot_restores_the_default_generators():
    snapshot = RandomSnapshot(CPU)
    first = draw()
    after = snapshot.current()
    assert not snapshot.same(snapshot.start, after)
    snapshot.restore()
    assert snapshot.same(snapshot.start, snapshot.current())
    assert draw() == first
    assert snapshot.same(after, snapshot.current())


def test_generators_of_modules_are_found_in_attributes_lists_and_dicts():
    owner = Owner()
    sources = list(random_sources([owner], CPU))
    states = [source.get() for source in sources]
    first = owner.draw()
    changed = [not source.same(state, source.get()) for source, state in zip(sources, states, strict=True)]
    assert sum(changed) == 4
    for source, state in zip(sources, states, strict=True):
        source.set(state)
    assert owner.draw() == first


def test_states_are_compared_under_a_fake_mode():
    with FakeTensorMode():
        snapshot = RandomSnapshot(CPU)
        assert snapshot.same(snapshot.start, snapshot.current())


def test_the_state_of_a_model_is_restored():
    model = nn.Linear(1, 1)
    states = get_random_state(model)
    assert set(states) == {"cpu"} and states["cpu"].dtype == torch.uint8
    first = torch.rand(3)
    set_random_state(model, states)
    assert torch.equal(torch.rand(3), first)
    set_random_state(model, {**states, "cuda": states["cpu"]})  # the model is not on CUDA
    assert torch.equal(torch.rand(3), first)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_the_state_of_a_model_on_cuda_has_two_entries():
    model = nn.Linear(1, 1, device="cuda")
    states = get_random_state(model)
    first = torch.rand(3), torch.rand(3, device="cuda")
    set_random_state(model, states)
    assert torch.equal(torch.rand(3), first[0]) and torch.equal(torch.rand(3, device="cuda"), first[1])
