"""The work of operators: FLOPs and bytes, on real and on fake tensors."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from memsave.host_bytes import TO_DEVICE, TO_HOST
from memsave.offload import ActivationOffload
from memsave.profiler import MemoryRecorder
from memsave.profiler.work import FRESH_BYTES, Work, WorkCounter, added


def work_of(function, *shapes, fake=False, dtype=torch.float32):
    counter = WorkCounter()

    def run():
        tensors = [torch.zeros(shape, dtype=dtype) for shape in shapes]
        with MemoryRecorder(nn.Module(), observe=counter):
            function(*tensors)

    if fake:
        with FakeTensorMode():
            run()
    else:
        run()
    return {kind: work for kind, work in counter.total.items() if work.bytes}


@pytest.mark.parametrize("fake", [False, True])
@pytest.mark.parametrize(
    ("function", "shapes", "kind", "flops", "elements"),
    [
        (torch.mm, [(2, 3), (3, 5)], "mm float32", 2 * 2 * 3 * 5, 6 + 15 + 10),
        (torch.add, [(4, 5), (4, 5)], "add float32", 0, 60),
        (lambda x: x.expand(8, 5) + 1, [(1, 5)], "add float32", 0, 5 + 40),
        (F.conv3d, [(2, 4, 5, 5, 5), (6, 4, 3, 3, 3)], "convolution float32", 2 * 2 * 6 * 27 * 4 * 27,
         1000 + 648 + 2 * 6 * 27),
        (F.conv3d, [(1, 4, 2, 2, 2), (6, 4, 1, 1, 1)], "convolution pointwise float32", 2 * 48 * 4, 32 + 24 + 48),
        (lambda x, w: F.conv3d(x, w, groups=4), [(1, 4, 3, 3, 3), (4, 1, 3, 3, 3)],
         "convolution depthwise float32", 2 * 4 * 27, 108 + 108 + 4),
        (F.conv_transpose2d, [(1, 4, 3, 3), (4, 2, 2, 2)], "convolution float32", 2 * 36 * 8, 36 + 32 + 2 * 16),
    ],
    ids=["product", "sum", "expanded", "dense", "pointwise", "depthwise", "transposed"],
)  # fmt: skip
def test_flops_and_bytes_of_an_operator(function, shapes, kind, flops, elements, fake):
    assert work_of(function, *shapes, fake=fake) == {kind: Work(1, flops, 4 * elements, 0)}


def test_the_backward_of_a_convolution_has_two_products():
    def both(x, w):
        w.requires_grad_()
        F.conv3d(x.requires_grad_(), w).sum().backward()

    found = work_of(both, (1, 4, 4, 4, 4), (2, 4, 3, 3, 3))
    one = found["convolution float32"].flops
    assert one == 2 * 16 * 108
    assert found["convolution_backward float32"].flops == 2 * one


def test_attention_counts_two_products():
    query = torch.zeros(2, 3, 8, 4)
    counter = WorkCounter()
    with MemoryRecorder(nn.Module(), observe=counter):
        F.scaled_dot_product_attention(query, query, query)
    assert max(work.flops for work in counter.total.values()) == 2 * 2 * (2 * 3) * 8 * 8 * 4


def test_only_large_new_results_are_fresh():
    found = work_of(lambda x: x.add(1).add_(1), (FRESH_BYTES // 4,))
    assert (found["add float32"].fresh_bytes, found["add_ float32"].fresh_bytes) == (FRESH_BYTES, 0)


def test_work_counts_by_label_and_section():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 4, bias=False))
    counter = WorkCounter(lambda module: str(module))
    with MemoryRecorder(model, observe=counter):
        for _ in range(2):
            counter.next_section()
            model(torch.ones(3, 2)).sum().backward()
    by_label = {label: sum(work.flops for work in totals.values()) for label, totals in counter.totals.items()}
    assert by_label["0"] == 2 * 2 * (2 * 3 * 2 * 2)  # two steps; forward, and the gradient of the weight
    assert by_label["1"] == 2 * 3 * (2 * 3 * 2 * 4)  # and the gradient of the input
    first, second = counter.sections[1:]
    assert first["1"]["mm float32"] == second["1"]["mm float32"]
    assert counter.totals["1"]["mm float32"] == added(first["1"], second["1"])["mm float32"]


@pytest.mark.parametrize("fake", [False, True])
def test_copies_of_offloaded_activations_count_in_the_module_that_saves_them(fake):
    counter = WorkCounter(lambda module: str(module))
    with FakeTensorMode() if fake else nullcontext():
        model = nn.Sequential(nn.Linear(8, 8), nn.Sigmoid(), nn.Linear(8, 8), nn.Sigmoid())
        offload = ActivationOffload(model, min_bytes=1)
        x = torch.ones(16, 8)
        with MemoryRecorder(model, observe=counter):
            with offload(keep=[x]):
                loss = model(x).sum()
            loss.backward()
    size = 16 * 8 * 4
    assert counter.totals["1"][TO_HOST] == counter.totals["3"][TO_HOST] == Work(1, 0, size)
    assert TO_HOST not in counter.totals["0"]  # the batch stays
    assert counter.total[TO_DEVICE] == Work(2, 0, 2 * size)
    loss = model(x).sum()
    with offload():
        loss = model(x).sum()
    assert counter.total[TO_HOST] == Work(2, 0, 2 * size)  # the recording has ended
    del loss
