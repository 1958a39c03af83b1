"""A loop that differs from the mechanism of its epsilon is refused before a weight changes."""

import gc
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from memsave.ghost import GhostClipper
from memsave.privacy import Mechanism, PrivacyError, PrivateGradients

pytest.importorskip("opacus")

X = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def examples_on_device(device, monkeypatch):
    """Run every test of this file on every device."""
    monkeypatch.setitem(globals(), "X", X.to(device))


class Loop:
    """A model, its private gradients and its optimizer; q is 1 by default."""

    def __init__(self, *, batch_size: int = 12, optimizer=torch.optim.SGD):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
        self.private = PrivateGradients(self.model, Mechanism(12, batch_size, 1.0, 0.5, delta=1e-3), seed=0)
        self.optimizer = optimizer(self.model.parameters(), lr=0.1)
        self.batches = self.private.batches()

    def backward(self, indices):
        self.private.backward(self.model(X[indices]).sin().sum(1))

    def weights(self):
        return [p.detach().clone() for p in self.model.parameters()]

    def moved(self, before):
        return not all(torch.equal(a, b) for a, b in zip(before, self.model.parameters(), strict=True))


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad])
def test_an_optimizer_does_not_step_on_a_sum_without_noise(optimizer):
    loop = Loop(optimizer=optimizer)
    before = loop.weights()
    loop.backward(next(loop.batches))
    with pytest.raises(PrivacyError, match=r"clipped sum without noise: call PrivateGradients\.finish\(\)"):
        loop.optimizer.step()
    assert not loop.moved(before)
    loop.private.finish()
    loop.optimizer.step()
    assert loop.moved(before)


def test_a_scaler_does_not_step_on_a_sum_without_noise():
    loop = Loop()
    before = loop.weights()
    loop.backward(next(loop.batches))
    with pytest.raises(PrivacyError, match="without noise"):
        torch.amp.GradScaler("cpu", enabled=False).step(loop.optimizer)
    assert not loop.moved(before)


def test_batches_of_another_loader_are_refused():
    loop = Loop()
    with pytest.raises(PrivacyError, match=r"no batch was drawn: take the examples .*PrivateGradients\.batches\(\)"):
        loop.backward([3, 1, 2])
    with pytest.raises(PrivacyError, match=r"finish\(\) was called, but no batch was drawn"):
        loop.private.finish()
    assert loop.private.steps == 0


def test_more_examples_than_were_drawn_are_refused():
    loop = Loop(batch_size=3)
    drawn = next(loop.batches)
    with pytest.raises(PrivacyError, match=rf"got 12 losses .* the batch drawn has {len(drawn)} examples"):
        loop.backward(range(12))


def test_a_step_counts_only_with_all_examples_that_were_drawn():
    loop = Loop()
    loop.backward(next(loop.batches)[:5])
    with pytest.raises(PrivacyError, match=r"after 5 losses, but the batch drawn has 12 examples"):
        loop.private.finish()
    loop.backward(range(5, 12))
    loop.private.finish()
    with pytest.raises(PrivacyError, match="no batch was drawn since the last call"):
        loop.private.finish()
    assert loop.private.steps == 1


def test_a_second_batch_without_finish_is_refused():
    loop = Loop()
    loop.backward(next(loop.batches))
    with pytest.raises(PrivacyError, match=r"got 24 losses since the last finish\(\)"):
        loop.backward(next(loop.batches))


def test_gradients_that_change_before_the_noise_are_refused():
    loop = Loop()
    loop.backward(next(loop.batches))
    torch.nn.utils.clip_grad_norm_(loop.model.parameters(), 1e-3)
    with pytest.raises(PrivacyError, match=r"changed between backward\(\) and finish\(\).*after finish\(\)"):
        loop.private.finish()


def test_weights_that_change_before_the_noise_are_refused():
    loop = Loop()
    loop.backward(next(loop.batches))
    with torch.no_grad():
        for p in loop.model.parameters():
            p -= 0.1 * p.grad
    with pytest.raises(PrivacyError, match=r"parameters changed between backward\(\) and finish\(\)"):
        loop.private.finish()


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_cleared_between_micro_batches_restart_the_batch(set_to_none):
    loop = Loop()
    next(loop.batches)
    loop.backward(range(6))
    loop.optimizer.zero_grad(set_to_none=set_to_none)
    loop.backward(range(6, 12))
    with pytest.raises(PrivacyError, match=r"after 6 losses, but the batch drawn has 12"):
        loop.private.finish()
    loop.optimizer.zero_grad(set_to_none=set_to_none)
    loop.backward(range(12))
    loop.private.finish()


@pytest.mark.parametrize("empty", [True, False])
def test_gradients_of_the_last_step_must_be_cleared(empty):
    loop = Loop(batch_size=1)
    batch = next(loop.batches)
    loop.backward(batch)
    loop.private.finish()
    loop.optimizer.step()
    while bool(batch := next(loop.batches)) is empty:
        loop.private.guard._drawn.pop()
    with pytest.raises(PrivacyError, match=r"not cleared.*call optimizer\.zero_grad\(\) after optimizer\.step\(\)"):
        loop.private.finish() if empty else loop.backward(batch)
    loop.optimizer.zero_grad(set_to_none=False)
    loop.backward(batch)
    loop.private.finish()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_may_draw_batches_in_advance(workers):
    loop = Loop(batch_size=3)
    loader = DataLoader(TensorDataset(torch.arange(12, device="cpu")), batch_sampler=loop.batches, num_workers=workers)
    for _, (indices,) in zip(range(6), loader, strict=False):
        loop.backward(indices)
        loop.private.finish()
        loop.optimizer.step()
        loop.optimizer.zero_grad()
    assert loop.private.steps == 6


def test_other_models_and_a_closed_one_are_left_alone():
    loop, other = Loop(), nn.Linear(2, 2)
    loop.backward(next(loop.batches))
    other(torch.ones(1, 2)).sum().backward()
    torch.optim.SGD(other.parameters(), lr=0.1).step()
    before = loop.weights()
    loop.private.close()
    loop.optimizer.step()  # the sum was dropped
    assert not loop.moved(before)
    loop.model(X).sum().backward()
    loop.optimizer.step()
    assert loop.moved(before)


def test_the_guard_does_not_keep_the_model_alive():
    loop = Loop()
    model = weakref.ref(loop.model)
    del loop
    gc.collect()
    assert model() is None


def test_a_rehearsal_counts_nothing_and_takes_no_step():
    loop = Loop()
    before, state = loop.weights(), loop.private.state_dict()
    with loop.private.rehearsal():
        loop.backward(range(5))
        loop.private.finish()
        with pytest.raises(PrivacyError, match="steps of a rehearsal or a pause are not counted"):
            loop.optimizer.step()
    after = loop.private.state_dict()
    keys = ("sampling", "noise", "noise_past", "noise_check", "noise_check_past")
    assert all(torch.equal(after.pop(key), state.pop(key)) for key in keys)
    assert after == state
    assert not loop.moved(before)
    assert all(p.grad is None for p in loop.model.parameters())
    loop.backward(next(loop.batches))
    loop.private.finish()
    assert loop.private.steps == 1


def test_a_step_with_a_closure_is_refused():
    loop = Loop()
    before, batch = loop.weights(), next(loop.batches)
    for step in (
        lambda: loop.optimizer.step(lambda: loop.backward(batch)),
        torch.optim.LBFGS(loop.model.parameters()).step,
    ):
        with pytest.raises(PrivacyError, match=r"step\(closure\) computes gradients within the step"):
            step() if step.__name__ == "<lambda>" else step(lambda: loop.backward(batch))
    assert not loop.moved(before)


def test_changed_weights_with_cleared_gradients_do_not_restart_the_batch():
    loop = Loop()
    batch = next(loop.batches)
    loop.backward(batch)
    with torch.no_grad():
        for p in loop.model.parameters():
            p -= 0.1 * p.grad
    loop.model.zero_grad()
    with pytest.raises(PrivacyError, match=r"parameters changed between backward\(\) and finish\(\)"):
        loop.backward(batch)


def test_an_optimizer_of_a_copy_does_not_step_on_the_sum():
    loop = Loop()
    masters = [nn.Parameter(p.detach().clone()) for p in loop.model.parameters()]
    loop.backward(next(loop.batches))
    for master, p in zip(masters, loop.model.parameters(), strict=True):
        master.grad = p.grad
    with pytest.raises(PrivacyError, match="without noise"):
        torch.optim.SGD(masters, lr=0.1).step()


def test_loading_a_state_within_a_batch_drops_its_sum():
    loop = Loop()
    state, before = loop.private.state_dict(), loop.weights()
    loop.backward(next(loop.batches))
    loop.private.load_state_dict(state)
    loop.optimizer.step()
    assert not loop.moved(before)
    assert all(p.grad is None for p in loop.model.parameters())


def test_a_pause_takes_no_step_and_a_closed_clipper_cannot_pause():
    loop = Loop()
    before = loop.weights()
    with loop.private.paused():
        loop.model(X).sum().backward()
        with pytest.raises(PrivacyError, match="a rehearsal or a pause are not counted"):
            loop.optimizer.step()
    assert not loop.moved(before)
    loop.private.close()
    with pytest.raises(PrivacyError, match="was closed"), loop.private.paused():
        pass


def test_rehearsals_may_be_nested_and_draw():
    loop = Loop()
    with loop.private.rehearsal():
        with loop.private.rehearsal():
            loop.backward(next(loop.batches))
        loop.backward(range(3))
        loop.private.finish()
        with pytest.raises(PrivacyError, match="rehearsal"):
            loop.optimizer.step()
    loop.backward(next(loop.batches))
    loop.private.finish()
    assert loop.private.steps == 1


def test_batches_drawn_in_advance_are_reported():
    loop = Loop(batch_size=4)
    next(loop.batches), next(loop.batches)
    with pytest.raises(PrivacyError, match="; further batches drawn: 1, to be used in this order"):
        loop.backward(range(12))


OPERATIONS = st.lists(
    st.sampled_from(["draw", "backward", "half", "finish", "step", "zero_grad", "rehearse"]), max_size=14
)


@given(OPERATIONS)
@settings(max_examples=60, deadline=None)
def test_no_order_of_operations_updates_weights_without_noise(operations):
    loop = Loop(batch_size=4)
    drawn, noised = [], False
    try:
        for operation in operations:
            before, steps = loop.weights(), loop.private.steps
            try:
                if operation == "draw":
                    drawn.append(next(loop.batches))
                elif operation in ("backward", "half"):
                    batch = drawn[0] if drawn else [0]
                    loop.backward(batch if operation == "backward" else batch[: len(batch) // 2])
                    noised = noised and not batch
                elif operation == "finish":
                    loop.private.finish()
                    drawn.pop(0)
                    noised = True
                elif operation == "step":
                    loop.optimizer.step()
                elif operation == "zero_grad":
                    loop.optimizer.zero_grad()
                else:
                    with loop.private.rehearsal():
                        loop.backward([0])
                        loop.private.finish()
                    noised = False
            except PrivacyError:
                pass
            assert loop.private.steps - steps in ((0, 1) if operation == "finish" else (0,))
            if loop.moved(before):
                assert operation == "step" and noised
    finally:
        loop.private.close()


@pytest.mark.parametrize("name", ["WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS"])
def test_several_processes_without_a_group_are_refused(name, monkeypatch):
    loop = Loop()
    loop.backward(next(loop.batches))
    monkeypatch.setenv(name, "2")
    with pytest.raises(PrivacyError, match=rf"one of several \({name}=2\).*init_process_group\(\) first"):
        Loop()
    with pytest.raises(PrivacyError, match="more than the accountant counts"):
        loop.private.finish()
    with pytest.raises(ValueError, match="would clip and sum its own examples alone"):
        GhostClipper(nn.Linear(2, 2), max_grad_norm=1.0)
    monkeypatch.setenv(name, "1")
    loop.private.finish()


def test_a_process_group_that_starts_later_is_refused():
    store = pytest.importorskip("torch.testing._internal.distributed.fake_pg").FakeStore()
    loop = Loop()
    indices = next(loop.batches)
    torch.distributed.init_process_group("fake", store=store, rank=0, world_size=2)
    try:
        with pytest.raises(ValueError, match=r"attached in one of 1 processes.*before you create it"):
            loop.backward(indices)
    finally:
        torch.distributed.destroy_process_group()
    loop.backward(indices)
    loop.private.finish()
