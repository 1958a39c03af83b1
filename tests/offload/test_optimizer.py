"""The optimizer's state in host memory: the same updates, bit for bit, and the same checkpoints."""

import copy
import gc

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from memsave.host_bytes import host_bytes, is_in_host_memory
from memsave.offload import keep_state_offloaded, offload_optimizer
from memsave.profiler import MemoryRecorder

MAKERS = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=False),
    "AdamW amsgrad foreach": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True, foreach=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    "SGD without state": lambda p: torch.optim.SGD(p, lr=0.01),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
}


def twins(make=MAKERS["AdamW"], **options):
    """(model, optimizer) twice: plain, and with offloaded state."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(16, 8)).to(memory_format=torch.channels_last)
    other = copy.deepcopy(plain)
    pair = []
    for model in (plain, other):
        first, *rest = list(model.parameters())
        pair.append((model, make([{"params": [first], "lr": 0.1}, {"params": rest}])))
    offload_optimizer(pair[1][1], min_bytes=1, **options)
    return pair


def train(model, optimizer, *, steps=3, seed=0):
    for step in range(steps):
        generator = torch.Generator().manual_seed(seed + step)
        x = torch.randn(2, 2, 4, 4, generator=generator, device="cpu").to(next(model.parameters()).device)
        model(x).square().sum().backward()
        if step == 1:
            model[0].bias.grad = None  # not every parameter has a gradient in every step
        optimizer.step()
        optimizer.zero_grad()


def assert_equal(plain, other):
    assert all(map(torch.equal, plain[0].parameters(), other[0].parameters()))
    for one, two in zip(plain[1].state_dict()["state"].values(), other[1].state_dict()["state"].values(), strict=True):
        assert one.keys() == two.keys()
        for key, value in one.items():
            assert not isinstance(value, torch.Tensor) or torch.equal(value.cpu(), two[key].cpu())


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_updates_and_state_are_the_same_bit_for_bit(make, device):
    plain, other = twins(make)
    for seed in (0, 10):
        train(*plain, seed=seed)
        train(*other, seed=seed)
        assert_equal(plain, other)


def test_state_is_in_host_memory_between_steps(device):
    before = host_bytes()
    _, (model, optimizer) = twins()
    train(model, optimizer)
    moments = [state[key] for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    assert all(is_in_host_memory(each.untyped_storage()) and each.device.type == "cpu" for each in moments)
    assert moments[0].stride() == model[0].weight.stride()
    assert host_bytes() - before >= 2 * sum(p.numel() * 4 for p in model.parameters())
    del model, optimizer, moments
    gc.collect()
    assert host_bytes() == before


def test_hooks_schedules_closures_and_the_name_of_the_class_are_kept(device):
    plain, other = twins()
    calls = []
    for model, optimizer in (plain, other):
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
        optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
        optimizer.register_step_post_hook(lambda *_: calls.append("after"))
        for _ in range(2):
            train(model, optimizer, steps=1)
            schedule.step()
    assert calls == 4 * ["before", "after"]
    assert_equal(plain, other)
    assert type(other[1]).__name__ == "AdamW" and isinstance(other[1], torch.optim.AdamW)
    assert other[1].step(lambda: torch.tensor(3.0)) == 3


def test_state_dicts_of_both_continue_each_other(device):
    plain, other = twins()
    train(*plain)
    train(*other)
    saved = [copy.deepcopy(optimizer.state_dict()) for _, optimizer in (plain, other)]
    before = host_bytes()
    plain[1].load_state_dict(saved[1])
    other[1].load_state_dict(saved[0])
    assert host_bytes() <= before
    assert other[1].param_groups[0]["lr"] == 0.1
    train(*plain, seed=5)
    train(*other, seed=5)
    assert_equal(plain, other)
    state = other[1].state[other[0][0].weight]
    assert is_in_host_memory(state["exp_avg"].untyped_storage())
    state["exp_avg"] = torch.zeros_like(other[0][0].weight)
    keep_state_offloaded(other[1], other[0][0].weight)
    assert is_in_host_memory(state["exp_avg"].untyped_storage())
    keep_state_offloaded(plain[1], plain[0][0].weight)


def test_state_that_exists_is_moved(device):
    model = nn.Linear(8, 8)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 8)).sum().backward()
    optimizer.step()
    offload_optimizer(optimizer, min_bytes=1)
    assert is_in_host_memory(optimizer.state[model.weight]["exp_avg"].untyped_storage())


def test_the_device_holds_the_state_of_few_parameters(device):
    def report(offloaded):
        torch.manual_seed(0)
        model = nn.Sequential(*[nn.Linear(32, 32, bias=False) for _ in range(10)])
        optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
        if offloaded:
            offload_optimizer(optimizer, waiting_bytes=0)
        for _ in range(2):
            with MemoryRecorder(model, optimizer=optimizer) as recorder:
                model(torch.ones(1, 32)).sum().backward()
                optimizer.step()
                optimizer.zero_grad()
        return recorder.report()

    plain, moved, one = report(False), report(True), 32 * 32 * 4
    assert plain.peak_by_category["optimizer"] >= 20 * one
    assert moved.peak_bytes <= plain.peak_bytes - 12 * one
    assert moved.peak_by_category["optimizer"] < one
    assert moved.offloaded_bytes >= 20 * one


def test_fake_state_counts_on_the_host():
    with FakeTensorMode():
        before = host_bytes()
        model = nn.Linear(64, 64, bias=False)
        optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
        offload_optimizer(optimizer)
        model(torch.ones(1, 64)).sum().backward()
        optimizer.step()
        assert host_bytes() - before == 2 * 64 * 64 * 4


def test_what_cannot_be_offloaded_is_refused(device):
    model = nn.Linear(8, 8)
    with pytest.raises(ValueError, match="LBFGS updates all parameters together"):
        offload_optimizer(torch.optim.LBFGS(model.parameters()))
    optimizer = torch.optim.AdamW(model.parameters())
    offload_optimizer(optimizer)
    with pytest.raises(ValueError, match="offloaded already"):
        offload_optimizer(optimizer)
    with pytest.raises(TypeError, match="cannot be copied or pickled"):
        copy.deepcopy(optimizer)
    scheduled = torch.optim.AdamW(model.parameters())
    torch.optim.lr_scheduler.LambdaLR(scheduled, lambda step: 1.0)
    with pytest.raises(ValueError, match="call offload_optimizer before"):
        offload_optimizer(scheduled)
    both = torch.optim.SGD([model.weight, nn.Parameter(torch.empty(1, device="meta"))])
    with pytest.raises(ValueError, match="on 2 devices"):
        offload_optimizer(both)


def test_an_optimizer_that_counts_in_its_groups_is_refused(device):
    class Counting(torch.optim.SGD):
        def step(self, closure=None):
            self.param_groups[0]["count"] = self.param_groups[0].get("count", 0) + 1

    model = nn.Linear(2, 2)
    optimizer = Counting(model.parameters())
    offload_optimizer(optimizer)
    model(torch.ones(1, 2)).sum().backward()
    with pytest.raises(ValueError, match="'count' of its parameter groups"):
        optimizer.step()
