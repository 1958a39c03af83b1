"""The private API of PyTorch that the package uses behaves as the package assumes."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor

from memsave.profiler import _torch_internals as internals


def test_a_graph_task_has_a_number_only_inside_a_backward():
    x, seen = torch.ones(2, requires_grad=True), []
    y = x.sin()
    y.register_hook(lambda grad: seen.append(internals.graph_task()))
    y.sum().backward()
    assert internals.graph_task() == -1 != seen[0]


def test_nodes_are_numbered_in_the_order_of_creation():
    x, seen = torch.ones(2, requires_grad=True), []
    before = internals.next_node_number()
    y = x.sin()
    between = internals.next_node_number()
    z = y.cos()
    for name, tensor in (("cos", z), ("sin", y)):
        tensor.grad_fn.register_hook(lambda *_, name=name: seen.append((name, internals.current_node_number())))
    x.register_post_accumulate_grad_hook(lambda p: seen.append(("leaf", internals.current_node_number())))
    z.sum().backward()
    numbers = dict(seen)
    assert before <= numbers["sin"] < between <= numbers["cos"]
    assert numbers["leaf"] is None


def test_a_fake_mode_is_active_inside_its_context_only():
    mode = FakeTensorMode()
    with mode:
        x = torch.zeros(2)
        assert internals.is_fake_mode_active()
    assert not internals.is_fake_mode_active()
    assert internals.fake_modes([x, torch.zeros(2)]) == {mode}


def test_the_device_of_a_fake_tensor_is_read_by_an_operator():
    seen = []

    class Watch(internals.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if internals.reads_device(func):
                seen.append((internals.read_device(func, args), func(*args)))
                return seen[-1][0]
            return func(*args, **(kwargs or {}))

    with FakeTensorMode():
        x = torch.zeros(2)
        with Watch():
            (x.requires_grad_() * 2).sum().backward()
    assert seen and all(found == expected for found, expected in seen)


@pytest.mark.parametrize("operation", [torch.Tensor.item, torch.Tensor.nonzero, bool])
def test_operators_that_need_values_raise_under_a_fake_mode(operation):
    with FakeTensorMode(), pytest.raises(internals.NEEDS_VALUES):
        operation(torch.zeros(1))


def test_wrappers_list_their_inner_tensors():
    one, other = torch.zeros(2), torch.ones(2)
    wrapper = TwoTensor(one, other)
    assert internals.is_wrapper(type(wrapper)) and not internals.is_wrapper(torch.Tensor)
    assert list(map(id, internals.inner_tensors(wrapper))) == [id(one), id(other)]


def test_the_profiler_lists_allocations_and_releases_with_their_addresses():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        x = torch.empty(1 << 16, dtype=torch.uint8)
        address = x.data_ptr()
        del x
    events = sorted(internals.allocations(profile))
    assert [size for _, each, size in events if each == address] == [1 << 16, -(1 << 16)]


@pytest.mark.parametrize("others", [0, 2])
def test_a_hook_registered_first_runs_before_earlier_hooks_and_can_be_removed(others):
    parameter, calls = nn.Parameter(torch.ones(2)), []
    for number in range(others):
        parameter.register_post_accumulate_grad_hook(lambda _, number=number: calls.append(number))
    remove = internals.register_first_accumulate_grad_hook(parameter, lambda _: calls.append("first"))
    parameter.sum().backward()
    assert calls == ["first", *range(others)]
    remove()
    calls.clear()
    parameter.sum().backward()
    assert calls == [*range(others)]


def test_a_dispatch_mode_sees_operators_below_autograd():
    seen = []

    class Seeing(internals.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    x = torch.ones(2, requires_grad=True)
    with Seeing():
        x.sin().sum().backward()
    assert {torch.ops.aten.sin.default, torch.ops.aten.cos.default} <= set(seen)


def test_resizes_of_storages_are_seen_until_the_watch_ends():
    seen, storage = [], torch.zeros(4).untyped_storage()
    before = torch.UntypedStorage.resize_, vars(torch.UntypedStorage).get("resize_")
    remove = internals.watch_resizes(lambda each: seen.append(each.nbytes()))
    inner = internals.watch_resizes(lambda each: seen.append(-each.nbytes()))
    storage.resize_(8)
    inner()
    storage.resize_(0)
    remove()
    storage.resize_(4)
    assert seen == [8, -8, 0]
    assert before == (torch.UntypedStorage.resize_, vars(torch.UntypedStorage).get("resize_"))
