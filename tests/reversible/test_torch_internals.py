"""The private API of PyTorch that the package uses behaves as the package assumes."""

import pytest
import torch
from torch import distributed, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from memsave.reversible import _torch_internals as internals


def test_uncompiled_breaks_the_graph():
    @internals.uncompiled
    def double(x):
        seen.append(torch.compiler.is_compiling())
        return x * 2

    seen = []
    compiled = torch.compile(lambda x: double(x + 1) + 1, backend="eager")
    assert compiled(torch.ones(2)).tolist() == [5, 5]
    assert seen == [False]


def test_the_version_counts_changes_in_place_and_is_shared_by_detached_tensors():
    x = torch.zeros(2)
    version = internals.version_of(x)
    x.detach().add_(1)
    assert internals.version_of(x) == version + 1
    with torch.inference_mode():
        assert internals.version_of(torch.zeros(2)) is None


def test_the_storage_id_is_that_of_views_and_changes_when_data_is_replaced():
    with FakeTensorMode():
        fake, other = torch.zeros(4), torch.zeros(4)
    for x, y in ((torch.zeros(4), torch.zeros(4)), (fake, other)):
        assert internals.storage_id(x) == internals.storage_id(x[1:]) != internals.storage_id(y)
    x, y = torch.zeros(4), torch.ones(4)
    x.data = y
    assert internals.storage_id(x) == internals.storage_id(y)


def test_the_registries_hold_parameters_and_buffers_and_assignment_replaces_them():
    module = nn.BatchNorm1d(3)
    parameters, buffers = internals.tensor_registries(module)
    assert set(parameters) == {"weight", "bias"}
    assert set(buffers) == {"running_mean", "running_var", "num_batches_tracked"}
    parameters["weight"] = weight = nn.Parameter(torch.zeros(3))
    assert module.weight is weight


@pytest.mark.parametrize(
    ("module", "expected"),
    [(nn.BatchNorm2d(2), True), (nn.SyncBatchNorm(2), True), (nn.InstanceNorm3d(2), True), (nn.GroupNorm(1, 2), False)],
)
def test_norms_with_running_statistics_are_recognised(module, expected):
    assert internals.has_running_statistics(module) == expected


def test_all_kinds_of_hooks_are_listed():
    module = nn.Identity()
    module.register_forward_hook(forward := lambda *_: None)
    module.register_forward_pre_hook(forward_pre := lambda *_: None)
    module.register_full_backward_hook(backward := lambda *_: None)
    module.register_full_backward_pre_hook(backward_pre := lambda *_: None)
    assert set(internals.hooks_of(module)) == {forward, forward_pre, backward, backward_pre}


def test_shards_and_sharded_modules_are_recognised(tmp_path):
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = nn.Sequential(nn.Linear(2, 2))
        assert not internals.is_fully_sharded(model) and not internals.is_shard(model[0].weight)
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        assert internals.is_fully_sharded(model) and not internals.is_fully_sharded(model[0])
        assert internals.is_shard(model[0].weight)
        model.unshard()
        assert not internals.is_shard(model[0].weight)
    finally:
        distributed.destroy_process_group()
