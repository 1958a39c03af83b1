"""The order of copies, with streams that only write down what they are told."""

import gc
import weakref
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from memsave.offload import ActivationOffload, offload_optimizer
from memsave.offload.transfers import Transfers

CPU = torch.device("cpu")


class Stream:
    """Stands in for a CUDA stream; `log` is shared by all of them."""

    def __init__(self, log, name):
        self.log, self.name = log, name

    def wait_stream(self, other):
        self.log.append((self.name, "waits for", other.name))

    def wait_event(self, event):
        self.log.append((self.name, "waits for", event))

    def record_event(self):
        event = f"event {sum(entry[1] == 'records' for entry in self.log)}"
        self.log.append((self.name, "records", event))
        return event

    def synchronize(self):
        self.log.append((self.name, "is", "awaited"))


@pytest.fixture
def log(monkeypatch):
    """The CPU behaves as a GPU with recorded streams."""
    log = []
    computing, copying = Stream(log, "computing"), Stream(log, "copying")

    @contextmanager
    def stream(entered):
        assert entered is copying
        yield

    monkeypatch.setattr(Transfers, "is_asynchronous", True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: computing)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: copying)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    return log


def sent(transfers, size=100):
    """(a weak reference to the storage of a new tensor that is sent to the host, its block, the number of the copy)."""
    source = torch.ones(size, dtype=torch.uint8)
    block = transfers.allocate(source)
    return weakref.ref(source.untyped_storage()), block, transfers.to_host(source, block)


def test_a_copy_to_the_host_runs_after_the_kernels_and_holds_the_memory(log):
    transfers = Transfers(CPU)
    storage, _, number = sent(transfers)
    assert log == [("copying", "waits for", "computing"), ("copying", "records", "event 0")]
    assert storage() is not None
    transfers.release(number)
    assert log[-1] == ("computing", "waits for", "event 0") and storage() is None
    transfers.release(number)
    assert len(log) == 3


def test_the_oldest_copies_give_way_when_too_many_bytes_wait(log):
    transfers = Transfers(CPU, waiting_bytes=250)
    storages = [sent(transfers)[0] for _ in range(4)]
    assert [each() is not None for each in storages] == [False, False, True, True]
    assert [entry for entry in log if entry[0] == "computing"] == [
        ("computing", "waits for", "event 0"),
        ("computing", "waits for", "event 1"),
    ]
    big, _, _ = sent(transfers, 1000)
    assert big() is not None and not any(each() for each in storages)  # one copy may always wait


def test_the_computation_waits_for_a_copy_to_the_device_when_it_uses_it(log):
    transfers = Transfers(CPU)
    _, block, number = sent(transfers)
    transfers.release(number)
    log.clear()
    incoming = transfers.to_device(block, like=torch.zeros(1))
    assert log == [("copying", "waits for", "computing"), ("copying", "records", "event 0")]
    assert (incoming.wait() == 1).all()
    assert log[-1] == ("computing", "waits for", "event 0")


def test_the_copy_stream_is_awaited_before_pinned_memory_is_returned(log):
    transfers = Transfers(CPU)
    sent(transfers)
    transfers.synchronize()
    assert log[-1] == ("copying", "is", "awaited")
    log.clear()
    del transfers
    gc.collect()
    assert ("copying", "is", "awaited") in log


def chain(length=6, size=32):
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Sequential(nn.Linear(size, size), nn.Tanh()) for _ in range(length)]).double()


def test_backward_prefetches_what_was_saved_before_and_leaves_nothing_on_the_device(log):
    model, x = chain(), torch.randn(16, 32, dtype=torch.float64)
    model(x).sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    offload = ActivationOffload(model, min_bytes=1, waiting_bytes=0)
    with offload(keep=[x]):
        loss = model(x).sum()
    (transfers,) = offload._transfers.values()
    assert len(transfers._waiting) == 1
    log.clear()
    loss.backward()
    assert all(map(torch.equal, expected, [p.grad for p in model.parameters()]))
    assert not transfers._waiting  # also the last one is released when its node is
    to_device = [entry[2] for entry in log if entry[:2] == ("copying", "records")]
    waited = [entry[2] for entry in log if entry[0] == "computing"]
    assert len(to_device) == 5  # the last of six was still there
    assert set(to_device) <= set(waited)
    first = log.index(("copying", "records", to_device[1]))
    assert first < log.index(("computing", "waits for", to_device[1]))
    assert log.index(("computing", "waits for", to_device[0])) < first  # the second copy starts when the first is used


def test_a_prefetched_copy_that_is_not_used_is_awaited_before_its_memory_is_free(log):
    model, x = chain(), torch.randn(16, 32, dtype=torch.float64, requires_grad=True)
    with ActivationOffload(model, min_bytes=1, waiting_bytes=0)(keep=[x]):
        y = model(x)
    log.clear()
    last = model[-1][0].weight
    torch.autograd.grad(y.sum(), last)  # opens the last two storages, and prefetches a third
    copied = [entry[2] for entry in log if entry[:2] == ("copying", "records")]
    del y
    gc.collect()
    assert set(copied) <= {entry[2] for entry in log if entry[0] == "computing"}


def test_the_state_of_the_next_parameter_arrives_while_one_is_updated(log):
    model, other = chain(3), chain(3)
    optimizers = [torch.optim.AdamW(each.parameters(), foreach=False) for each in (model, other)]
    offload_optimizer(optimizers[0], min_bytes=1)
    x = torch.randn(4, 32, dtype=torch.float64)
    for _ in range(3):
        for each, optimizer in zip((model, other), optimizers):
            each(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert all(map(torch.equal, model.parameters(), other.parameters()))
    assert not optimizers[0]._offloaded.transfers._waiting
    events = {entry[2] for entry in log if entry[1] == "records"}
    assert events == {entry[2] for entry in log if entry[:2] == ("computing", "waits for")}
