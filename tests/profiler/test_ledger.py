"""Exact bytes of programs small enough to count by hand."""

import gc

import pytest
import torch
from torch import nn
from torch.autograd import graph
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint

from memsave.profiler import MemoryRecorder

NOTHING = nn.Identity()


def record(step, model=NOTHING, **kwargs):
    with MemoryRecorder(model, **kwargs) as recorder:
        result = step()
    return recorder.report(), result


@pytest.mark.usefixtures("device")
def test_births_and_deaths_of_a_chain_are_exact():
    x = torch.randn(100)

    def step():
        a = x + 1  # 400 + 400
        b = torch.cat([a, a])  # + 800
        del a  # - 400
        c = b.double()  # + 1600
        del b
        return c.sum()  # + 8, then c dies

    report, _ = record(step)
    assert report.start_bytes == 400
    assert report.timeline.deltas == [400, 800, -400, 1600, -800, 8, -1600]
    assert report.timeline.totals() == [400, 800, 1600, 1200, 2800, 2000, 2008, 408]
    assert (report.peak_bytes, report.peak_index) == (2800, 4)
    assert [block.bytes for block in report.blocks] == [1600, 800, 400]
    assert report.blocks[0].shape == (200,) and report.blocks[0].dtype == "float64"


@pytest.mark.usefixtures("device")
def test_deaths_are_recorded_in_the_order_of_release():
    def step():
        small, middle, large = torch.zeros(1), torch.zeros(2), torch.zeros(3)
        del middle
        del large
        del small

    report, _ = record(step)
    assert report.timeline.deltas == [4, 8, 12, -8, -12, -4]


@pytest.mark.usefixtures("device")
def test_views_share_one_block():
    x = torch.randn(10, 10)

    def step():
        y = x * 2
        views = [y[0], y.t(), y.view(100), y.detach(), y.expand(3, 10, 10), y.narrow(0, 1, 2)]
        del y
        return views

    report, _ = record(step)
    assert report.timeline.deltas == [400]
    assert report.peak_bytes == 800


@pytest.mark.usefixtures("device")
def test_a_block_dies_with_its_last_view():
    def step():
        y = torch.zeros(100)
        corner = y[:1]
        del y
        torch.zeros(1)
        del corner

    report, _ = record(step)
    assert report.timeline.deltas == [400, 4, -4, -400]


@pytest.mark.usefixtures("device")
def test_in_place_operations_allocate_nothing():
    x = torch.randn(100)
    report, _ = record(lambda: x.add_(1).mul_(2).relu_())
    assert report.timeline.deltas == []
    assert report.peak_bytes == 400


@pytest.mark.usefixtures("device")
def test_resizing_changes_the_size_of_the_block():
    def step():
        y = torch.zeros(10)
        y.resize_(30)
        y.untyped_storage().resize_(0)
        y.data_ptr()
        y.view(-1)  # the next operator sees the new size of the storage
        return y

    report, _ = record(step)
    assert report.timeline.deltas == [40, 80, -120]
    assert [block.bytes for block in report.blocks] == [120]


@pytest.mark.usefixtures("device")
def test_empty_storages_have_no_bytes():
    report, _ = record(lambda: [torch.empty(0), torch.empty(0, 5), torch.zeros(3)[:0]])
    assert report.timeline.totals()[-1] == 12  # an empty view keeps its storage alive


def test_tensors_created_from_python_and_numpy_are_not_inputs():
    def step():
        a = torch.tensor([1.0, 2.0])
        b = torch.from_numpy(torch.zeros(5).numpy())
        return a, b + 1

    report, _ = record(step)
    assert report.start_bytes == 0
    assert report.timeline.totals()[-1] == 8 + 20


def test_an_input_used_late_counts_from_the_start():
    x, y = torch.randn(10), torch.randn(1000)
    report, _ = record(lambda: (x + 1, y.sum()))
    assert report.start_bytes == 40 + 4000
    assert report.peak_by_category["input"] == 4040


def test_the_release_of_an_input_is_recorded():
    box = [torch.randn(100)]

    def step():
        y = box[0].sum()
        box.clear()
        return y

    report, _ = record(step)
    assert report.timeline.totals() == [400, 404, 4]


def test_reused_python_ids_are_different_blocks():
    def step():
        for _ in range(200):
            torch.zeros(10)

    report, _ = record(step)
    assert report.timeline.deltas == [40, -40] * 200


@pytest.mark.usefixtures("device")
def test_tensors_saved_only_by_autograd_are_alive():
    x = torch.randn(100, requires_grad=True)

    def step():
        y = x.exp().sum()  # exp saves its result
        gc.collect()
        torch.zeros(1)
        return y

    report, _ = record(step)
    assert report.timeline.deltas == [400, 4, 4, -4]


def test_sparse_gradients_count_indices_and_values():
    table = nn.Embedding(50, 4, sparse=True)
    ids = torch.tensor([1, 2, 3])
    report, _ = record(lambda: table(ids).sum().backward(), table)
    gradient = table.weight.grad
    expected = gradient._indices().untyped_storage().nbytes() + gradient._values().untyped_storage().nbytes()
    assert expected == 3 * 8 + 3 * 4 * 4
    end = {name: sizes[-1] for name, sizes in report.timeline.by_category().items()}
    assert end["gradient"] == expected


class Wasteful(TwoTensor):
    """Two tensors; each operator also allocates a thousand zeros."""

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        torch.zeros(1000)
        return super().__torch_dispatch__(func, types, args, kwargs)


def test_inner_tensors_and_operators_of_wrapper_subclasses_are_counted():
    x = Wasteful(torch.randn(10), torch.randn(10))
    report, _ = record(lambda: x * 2)
    assert report.timeline.deltas[:2] == [4000, -4000]
    assert report.timeline.totals()[-1] == 160


def test_tensors_replaced_by_saved_tensor_hooks_are_freed():
    x = torch.randn(100, requires_grad=True)

    def step(pack, unpack):
        x.grad = None
        with graph.saved_tensors_hooks(pack, unpack):
            y = (x * 1).exp()  # exp saves its result
        loss = y.sum()
        del y
        loss.backward()

    stored, _ = record(lambda: step(lambda t: t, lambda t: t))
    halved, _ = record(lambda: step(lambda t: t.detach().half(), lambda t: t.float()))
    at_backward = [report.timeline.totals()[report.timeline.phases[1][0]] for report in (stored, halved)]
    assert at_backward[0] - at_backward[1] == 200


def test_a_device_filter_excludes_other_devices():
    x = torch.randn(10)
    report, _ = record(lambda: (x + 1, torch.zeros(100, device="meta")), device="meta")
    assert report.timeline.totals() == [0, 400]
    assert {block.device for block in report.blocks} == {"meta"}


@pytest.mark.parametrize("use_checkpoint", [False, True])
def test_a_checkpoint_keeps_only_its_input(use_checkpoint):
    x = torch.randn(100, requires_grad=True)

    def step():
        def body(x):
            return x.exp().sin()

        y = checkpoint(body, x, use_reentrant=False) if use_checkpoint else body(x)
        return y.sum()

    report, _ = record(step)
    # exp and sin save the result of exp; the checkpoint saves only x, which is alive in any case.
    assert report.timeline.totals()[-1] == 400 + 4 + (0 if use_checkpoint else 400)
