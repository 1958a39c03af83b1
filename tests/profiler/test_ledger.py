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
def test_births_and_deaths_of_a_chain():
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
def test_deaths_come_in_the_order_of_the_releases():
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
def test_a_view_keeps_the_whole_storage_and_its_death_is_the_last_views():
    def step():
        y = torch.zeros(100)
        corner = y[:1]
        del y
        torch.zeros(1)
        del corner

    report, _ = record(step)
    assert report.timeline.deltas == [400, 4, -4, -400]


@pytest.mark.usefixtures("device")
def test_in_place_operations_take_nothing():
    x = torch.randn(100)
    report, _ = record(lambda: x.add_(1).mul_(2).relu_())
    assert report.timeline.deltas == []
    assert report.peak_bytes == 400


@pytest.mark.usefixtures("device")
def test_resizing_changes_the_block():
    def step():
        y = torch.zeros(10)
        y.resize_(30)
        y.untyped_storage().resize_(0)
        y.data_ptr()
        y.view(-1)  # the next operator sees what the storage did by itself
        return y

    report, _ = record(step)
    assert report.timeline.deltas == [40, 80, -120]
    assert [block.bytes for block in report.blocks] == [120]


@pytest.mark.usefixtures("device")
def test_empty_storages_count_nothing():
    report, _ = record(lambda: [torch.empty(0), torch.empty(0, 5), torch.zeros(3)[:0]])
    assert report.timeline.totals()[-1] == 12  # an empty view holds its storage


def test_tensors_made_from_python_and_numpy_are_born_not_inputs():
    def step():
        a = torch.tensor([1.0, 2.0])
        b = torch.from_numpy(torch.zeros(5).numpy())
        return a, b + 1

    report, _ = record(step)
    assert report.start_bytes == 0
    assert report.timeline.totals()[-1] == 8 + 20


def test_an_input_counts_from_the_start_even_when_it_is_used_late():
    x, y = torch.randn(10), torch.randn(1000)
    report, _ = record(lambda: (x + 1, y.sum()))
    assert report.start_bytes == 40 + 4000
    assert report.peak_by_category["input"] == 4040


def test_an_input_that_the_step_releases_dies():
    box = [torch.randn(100)]

    def step():
        y = box[0].sum()
        box.clear()
        return y

    report, _ = record(step)
    assert report.timeline.totals() == [400, 404, 4]


def test_identity_numbers_that_python_reuses_do_not_confuse_blocks():
    def step():
        for _ in range(200):
            torch.zeros(10)

    report, _ = record(step)
    assert report.timeline.deltas == [40, -40] * 200


@pytest.mark.usefixtures("device")
def test_what_only_autograd_holds_lives():
    x = torch.randn(100, requires_grad=True)

    def step():
        y = x.exp().sum()  # exp keeps its result for the backward
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
    """Two tensors, and a thousand zeros for each operator."""

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        torch.zeros(1000)
        return super().__torch_dispatch__(func, types, args, kwargs)


def test_wrapper_subclasses_count_what_is_inside_and_what_they_do_inside():
    x = Wasteful(torch.randn(10), torch.randn(10))
    report, _ = record(lambda: x * 2)
    assert report.timeline.deltas[:2] == [4000, -4000]
    assert report.timeline.totals()[-1] == 160


def test_saved_tensor_hooks_free_what_they_replace():
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


def test_a_device_filter_leaves_the_others_out():
    x = torch.randn(10)
    report, _ = record(lambda: (x + 1, torch.zeros(100, device="meta")), device="meta")
    assert report.timeline.totals() == [0, 400]
    assert {block.device for block in report.blocks} == {"meta"}


@pytest.mark.parametrize("use_checkpoint", [False, True])
def test_the_blocks_of_a_checkpoint(use_checkpoint):
    x = torch.randn(100, requires_grad=True)

    def step():
        def body(x):
            return x.exp().sin()

        y = checkpoint(body, x, use_reentrant=False) if use_checkpoint else body(x)
        return y.sum()

    report, _ = record(step)
    # exp's result is kept by exp and by sin; the checkpoint keeps x alone, which lives anyway.
    assert report.timeline.totals()[-1] == 400 + 4 + (0 if use_checkpoint else 400)
