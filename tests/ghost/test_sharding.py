"""What FSDP shards, in a group of one process; tests/distributed has tests of several processes."""

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from memsave.ghost import GhostClipper
from memsave.ghost.sharding import SUM, Sharding
from tests.ghost.test_layers import draw, losses_of


@pytest.fixture
def sharded():
    """(a model, the same one sharded over one process)."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    fully_shard(models[1], mesh=init_device_mesh("cpu", (1,)))
    yield models
    distributed.destroy_process_group()


def test_parameters_that_were_never_whole_are_gathered_once_and_freed(sharded):
    plain, model = sharded
    sharding = Sharding()
    sharding.update(model)
    assert sharding and not any(group.is_unsharded for group in sharding.groups)
    for shard, expected in zip(model.parameters(), plain.parameters(), strict=True):
        whole = sharding.whole(shard)
        assert whole is not shard and whole.shape == expected.shape
        assert sharding.shard(whole) is shard
        assert torch.equal(sharding.local(whole), expected.flatten()) or torch.equal(sharding.local(whole), expected)


def test_gradients_are_summed_while_a_clipper_is_attached(sharded):
    _, model = sharded
    sharding = Sharding()
    sharding.update(model)
    before = [group.reduction for group in sharding.groups]
    sharding.sum_gradients()
    assert [group.reduction for group in sharding.groups] == [SUM] * len(before) != before
    sharding.restore()
    assert [group.reduction for group in sharding.groups] == before


def test_what_would_round_the_clipped_sums_is_refused_before_anything_is_patched(sharded):
    model = nn.Sequential(nn.Linear(4, 3))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)), mp_policy=policy)
    with pytest.raises(ValueError, match="has a MixedPrecisionPolicy with torch"):
        GhostClipper(model, max_grad_norm=0.1, passes=2)


@pytest.mark.parametrize("options", [{"passes": 2}, {"clipping": "per_layer"}])
def test_a_sharded_model_has_the_clipped_sums_of_the_whole_one(sharded, options):
    found = []
    for model in sharded:
        clipper = GhostClipper(model, max_grad_norm=0.1, **options)
        norms = clipper.backward(losses_of(model, draw(5, 4)))
        grads = [p.grad for p in model.parameters()]
        found.append([norms, *(getattr(each, "full_tensor", lambda each=each: each)() for each in grads)])
        clipper.close()
    for ours, expected in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)
