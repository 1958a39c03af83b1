"""What a clipper of a sharded model refuses, counts and follows; all in one call, because processes take long to start.

Each check runs in two processes.
"""

import traceback
from functools import partial
from unittest import mock

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils.checkpoint import checkpoint

from memsave.ghost import GhostClipper, coverage, verify
from memsave.ghost._torch_internals import fsdp_groups
from memsave.ghost.rule import registered_rule
from memsave.processes import class_of, gather, process_rank
from memsave.reversible import AdditiveCoupling, AffineCoupling, ReversibleSequence
from tests.distributed.sharded_cases import (
    Case,
    errors,
    gpt2,
    llama_lora,
    lm_losses,
    local_rows,
    made,
    mlp,
    shard_blocks,
    shard_linears,
    squares,
    texts,
    unet,
    vectors,
    volumes,
    voxel_losses,
    whole,
)
from tests.support.processes import run_processes

PLAIN = Case(mlp, shard_linears, squares, vectors)


def sharded_mlp(**options):
    model = made(PLAIN)
    for layer in (model[0], model[2], model):
        fully_shard(layer, **options)
    return model


def share(x):
    return x[local_rows(len(x))[0]]


def pair(**options):
    """(model, clipper) of a whole and of a sharded model with equal values."""
    models = made(PLAIN), sharded_mlp()
    return [(model, GhostClipper(model, max_grad_norm=0.2, **options)) for model in models]


def assert_same_parameters(one, other):
    for mine, right in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.allclose(whole(mine.detach()), right.detach(), atol=1e-12, rtol=0)


def counting(name):
    return mock.patch.object(distributed, name, side_effect=getattr(distributed, name))


def the_norm_pass_reduces_nothing():
    for clipping, passes in (("flat", 2), ("per_layer", 1)):
        model = sharded_mlp()
        clipper = GhostClipper(model, max_grad_norm=0.2, clipping=clipping)
        for _ in range(3):
            losses = squares(model, share(vectors(5)))
            with counting("reduce_scatter_single") as reductions:
                clipper.backward(losses)
            assert reductions.call_count == 3  # one for each group
        assert clipper.chosen_passes == passes


def training_with_layers_frozen_and_unfrozen_between_steps():
    (plain, reference), (sharded, clipper) = pair()
    optimizers = [torch.optim.AdamW(model.parameters(), lr=0.05) for model in (plain, sharded)]
    for step in range(6):
        for model in (plain, sharded):
            model[2].requires_grad_(step not in (1, 2))
            model[0].bias.requires_grad_(step < 3)
            model[4].requires_grad_(step != 4)
        torch.manual_seed(step)
        for count in (5, 4):
            x = vectors(count)
            right = reference.backward(squares(plain, x))
            ours = clipper.backward(squares(sharded, share(x)))
            assert torch.allclose(ours, share(right), atol=1e-12)
        frozen = [p for p in sharded.parameters() if not p.requires_grad]
        assert all(p.grad is None for p in frozen) and len(clipper.parameters) == 5 - len(frozen)
        for optimizer in optimizers:
            with mock.patch.object(GhostClipper, "refuse_step"):  # each process has the reference of the whole batch
                optimizer.step()
            optimizer.zero_grad()
        assert_same_parameters(sharded, plain)


def the_sum_of_a_layer_that_was_frozen_since_is_dropped():
    (plain, reference), (sharded, clipper) = pair()
    for _ in range(2):
        x = vectors(5)
        reference.backward(squares(plain, x))
        clipper.backward(squares(sharded, share(x)))
        for model in (plain, sharded):
            model[0].requires_grad_(False)
            model[4].requires_grad_(False)
    for one, other in zip(sharded.parameters(), plain.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        assert one.grad is None or torch.allclose(whole(one.grad), other.grad, atol=1e-12)
    assert sharded[0].weight.grad is None and sharded[4].weight.grad is None


def layers_frozen_while_the_root_is_whole():
    (plain, reference), (sharded, clipper) = pair()
    with torch.no_grad():
        sharded(vectors(2))  # an evaluation, after which the root's parameters stay whole
    assert not isinstance(sharded[4].weight, DTensor)
    for model in (plain, sharded):
        model[4].weight.requires_grad_(False)
    for _ in range(2):
        x = torch.ones(4, 3, dtype=torch.float64)
        right = reference.backward(squares(plain, x))
        assert torch.allclose(clipper.backward(squares(sharded, share(x))), share(right), atol=1e-12)
        assert not sharded[4].weight.requires_grad and sharded[4].weight.grad is None


def gradients_are_dtensors_also_of_unused_layers():
    model = sharded_mlp()
    model.extra = fully_shard(nn.Linear(2, 3).double())
    model.forward = lambda x: model[4](model[3](model[2](model[1](model[0](x)))))
    clipper = GhostClipper(model, max_grad_norm=0.2)
    clipper.backward(squares(model, share(vectors(5))))
    for parameter in clipper.parameters:
        assert isinstance(parameter, DTensor) and isinstance(parameter.grad, DTensor)
    assert not whole(model.extra.weight.grad).any()


def layers_that_only_some_processes_use():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other = nn.Linear(3, 2).double(), nn.Linear(3, 2).double()

        def forward(self, x):
            return (self.one if x[0, 0] > 0 else self.other)(x)

    x = torch.tensor([[1.0, 2, 3], [-1, 2, 3]], dtype=torch.float64)
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(Experts())
    clippers = [GhostClipper(model, max_grad_norm=0.2) for model in (models[0], fully_shard(models[1]))]
    for row in x:
        clippers[0].backward(squares(models[0], row[None]))
    clippers[1].backward(squares(models[1], share(x)))
    for one, other in zip(models[1].parameters(), models[0].parameters(), strict=True):
        assert torch.allclose(whole(one.grad), other.grad, atol=1e-12)


def parameters_that_fsdp_ignores():
    (plain, reference), _ = pair()
    model = made(PLAIN)
    fully_shard(model[0])
    fully_shard(model, ignored_params={model[4].weight})
    clipper = GhostClipper(model, max_grad_norm=0.2)
    x = vectors(5)
    reference.backward(squares(plain, x))
    clipper.backward(squares(model, share(x)))
    with pytest.raises(ValueError, match="sum_gradients"):
        torch.optim.SGD(model.parameters(), lr=0.1).step()
    clipper.sum_gradients()
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(whole(one.grad), other.grad, atol=1e-12)


def processes_check_independence_equally_often():
    model = sharded_mlp()
    clipper = GhostClipper(model, max_grad_norm=0.2)
    x = vectors(5)
    for step in range(4):  # one process has one example and checks nothing; then other numbers of examples
        rows = x[:1] if process_rank() == step % 2 else x[: step + 2]
        with counting("all_gather_single") as gathered:
            clipper.backward(squares(model, rows))
        assert gathered.call_count and len(set(gather(gathered.call_count))) == 1


def dependent_examples_are_refused_in_all_processes():
    class Mixing(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(3, 3).double()

        def forward(self, x):
            y = self.inner(x)
            return y + y.mean(0) if process_rank() == 0 else y

    model = fully_shard(Mixing())
    clipper = GhostClipper(model, max_grad_norm=0.2)
    with pytest.raises(ValueError, match="examples are not independent"):
        clipper.backward(squares(model, vectors(3)))


def examples_that_are_not_counted_contribute_nothing():
    for clipping in ("flat", "automatic", "per_layer"):
        (plain, reference), (sharded, clipper) = pair(clipping=clipping)
        x = vectors(5)
        right = reference.backward(squares(plain, x))
        padded = torch.cat([share(x), torch.full((1, 3), torch.nan, dtype=torch.float64), x[:1]])
        counted = torch.ones(len(padded))
        counted[-2:] = 0
        ours = clipper.backward(squares(sharded, padded), counted=counted)
        assert torch.allclose(ours[:-2], share(right)) and ours[-2].isnan() and ours[-1] == right[0]
        assert clipper.nonfinite == 0 and not clipper.clipped[-2:].any()
        for one, other in zip(sharded.parameters(), plain.parameters(), strict=True):
            assert torch.allclose(whole(one.grad), other.grad, atol=1e-12)
    with pytest.raises(ValueError, match=r"counted=torch\.zeros\(1\)"):
        clipper.backward(squares(sharded, x[:0]))


def padding_of_texts_on_one_process_alone():
    model = made(Case(gpt2, shard_blocks, lm_losses, texts))
    shard_blocks(model)
    clipper = GhostClipper(model, max_grad_norm=0.2)
    ids, _, mask = texts(2)
    mask[:] = 1
    if process_rank():
        mask[0, -2:] = 0
    clipper.backward(lm_losses(model, (ids, torch.where(mask.bool(), ids, -100), mask)))


def the_root_alone_is_sharded():
    case = Case(gpt2, fully_shard, lm_losses, texts)
    assert max(errors(case)) < 1e-10
    assert max(errors(case._replace(build=llama_lora))) < 1e-10


def tied_layers_in_one_group_of_their_own():
    def shard(model):
        fully_shard([model.transformer.wte, model.lm_head], reshard_after_forward=False)
        shard_blocks(model)

    assert max(errors(Case(gpt2, shard, lm_losses, texts))) < 1e-10


def bfloat16_by_autocast():
    case = Case(gpt2, shard_blocks, lm_losses, texts, dtype=torch.float32, autocast=True)
    of_norms, of_sums = errors(case)
    assert of_norms < 1e-3 and of_sums < 1e-2, (of_norms, of_sums)
    of_norms, of_sums = errors(case._replace(autocast=False))
    assert of_norms < 1e-5 and of_sums < 1e-5, (of_norms, of_sums)


def memory_modes_of_shards_of_whole_levels():
    def shard(model):
        for level in (*model.encoder, *model.decoder):
            fully_shard(level)
        fully_shard(model)

    assert max(errors(Case(partial(unet, "reversible"), shard, voxel_losses, volumes, (3,)))) < 1e-10


def layers_keep_their_rules():
    model = sharded_mlp()
    assert type(model[0]) is not nn.Linear and class_of(model[0]) is nn.Linear
    assert registered_rule(model[0]) is registered_rule(nn.Linear(1, 1)) is not None
    GhostClipper(model, max_grad_norm=0.2)
    assert all("forward" in vars(model[number]) for number in (0, 2, 4))  # patched by their rule


def a_backward_that_failed_while_adding_is_remembered():
    class Random(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.inner = nn.Linear(3, 3).double(), fully_shard(nn.Linear(3, 3).double())

        def forward(self, x):
            def run(y):
                return self.inner(nn.functional.dropout(y))

            return checkpoint(run, self.first(x), use_reentrant=False, preserve_rng_state=False)

    model = fully_shard(Random())
    clipper = GhostClipper(model, max_grad_norm=0.2)
    with pytest.raises(ValueError, match="got other activations in the second pass"):
        clipper.backward(squares(model, share(vectors(8))))
    assert clipper.unfinished
    with pytest.raises(ValueError, match="a part of its examples would count twice"):
        clipper.backward(squares(model, share(vectors(8))))
    torch.optim.SGD(clipper.parameters, lr=0.1).zero_grad()
    assert not clipper.unfinished


def a_backward_goes_on_after_a_refused_forward():
    (plain, reference), (sharded, clipper) = pair()
    sharded[3] = nn.BatchNorm1d(1).double()
    with pytest.raises(ValueError, match="makes every example's gradient depend on the others"):
        sharded(vectors(4))
    sharded[3] = nn.Tanh()
    sharded.reset_iter_state()  # as FSDP demands after an error in a forward
    x = vectors(5)
    reference.backward(squares(plain, x))
    clipper.backward(squares(sharded, share(x)))
    for one, other in zip(sharded.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(whole(one.grad), other.grad, atol=1e-12)


def reports_of_sharded_models_are_refused():
    for name, report in (("verify", partial(verify, per_example_losses=squares)), ("coverage", coverage)):
        with pytest.raises(ValueError, match=f"{name} needs whole parameters.*; call it before fully_shard"):
            report(sharded_mlp(), vectors(2))


def the_reduction_is_restored():
    model = sharded_mlp()
    before = [(group.reduction, group.reduces_unused) for group in fsdp_groups(model)]
    clipper = GhostClipper(model, max_grad_norm=0.2)
    assert all(group.reduction == (1.0, True) for group in fsdp_groups(model))
    clipper.close()
    assert (
        before
        == [(group.reduction, group.reduces_unused) for group in fsdp_groups(model)]
        == [((None, False), False)] * 3
    )
    squares(model, share(vectors(4))).sum().backward()
    assert model[0].weight.grad is not None


def sums_after_the_reduction_are_refused():
    model = made(PLAIN)
    model.extra = nn.Linear(3, 2).double()  # used twice, of which the losses use one
    model.forward = lambda x: (model[4](model[3](model[2](model[1](model[0](x))))) + model.extra(x), model.extra(x * 2))
    with pytest.raises(ValueError, match="do not depend on some use"):
        clipper = GhostClipper(fully_shard(model), max_grad_norm=0.2, clipping="per_layer")
        clipper.backward(model(share(vectors(5)))[0].square().sum(1))


def gradients_that_stay_whole_are_refused():
    model = sharded_mlp()
    clipper = GhostClipper(model, max_grad_norm=0.2)
    model.set_requires_gradient_sync(False)
    with pytest.raises(ValueError, match="set_requires_gradient_sync"):
        clipper.backward(squares(model, share(vectors(5))))


def late_sums_are_refused():
    class Late(nn.Module):
        """Adds a layer of the positions, whose sum is formed after those of the inputs."""

        def __init__(self):
            super().__init__()
            self.early = nn.Linear(3, 3).double()
            self.late = nn.Linear(3, 3).double()

        def forward(self, x, made_before):
            return self.early(x) + made_before[0]

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.inner = nn.Linear(3, 3).double(), fully_shard(Late())

        def forward(self, x):
            self.inner.unshard()
            late = self.inner.late(x)  # outside of the module's own forward
            return self.inner(self.first(x), (late.detach() * 0,)) + late

    model = fully_shard(Model())
    clipper = GhostClipper(model, max_grad_norm=0.2)
    with pytest.raises(ValueError, match="FSDP reduced a module's gradients before"):
        clipper.backward(squares(model, share(vectors(5))))
    assert all(each.whole.grad is None for group in fsdp_groups(model) for each in group.parameters())


def options_that_cannot_be_exact_are_refused():
    def refused(match, model, **options):
        with pytest.raises(ValueError, match=match):
            GhostClipper(model, max_grad_norm=0.2, **options)

    refused("passes=1", sharded_mlp(), passes=1)
    refused("passes='direct'", sharded_mlp(), passes="direct")
    for policy in (MixedPrecisionPolicy(param_dtype=torch.bfloat16), MixedPrecisionPolicy(reduce_dtype=torch.float16)):
        refused("torch.autocast", sharded_mlp(mp_policy=policy))
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("copies", "shards"))
    refused("all 2 processes in one dimension", sharded_mlp(mesh=mesh))
    refused("all 2 processes in one dimension", sharded_mlp(mesh=mesh["copies"]))
    torch.manual_seed(0)
    parallel = nn.Sequential(nn.Linear(3, 4))
    parallel[0].weight = nn.Parameter(distribute_tensor(parallel[0].weight.detach(), mesh["shards"], [Shard(0)]))
    refused(r"0\.weight is sharded over processes by something else", parallel)
    tied = gpt2()
    fully_shard(tied.transformer.wte)
    refused("shares a parameter with", fully_shard(tied))
    with pytest.raises(ValueError, match="GhostClipper attached"):
        model = sharded_mlp()
        first = GhostClipper(model, max_grad_norm=0.2)
        GhostClipper(model, max_grad_norm=0.2)
    first.close()


def a_frozen_group_may_be_in_low_precision():
    model = made(PLAIN)
    model[0].requires_grad_(False)
    fully_shard(model[0], mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.float64))
    clipper = GhostClipper(fully_shard(model), max_grad_norm=0.2)
    clipper.backward(squares(model, share(vectors(5))))
    model[0].requires_grad_(True)
    with pytest.raises(ValueError, match=r"torch\.autocast"):
        model(share(vectors(5)))


def shards_on_the_cpu():
    (plain, reference), _ = pair()
    model = sharded_mlp(offload_policy=CPUOffloadPolicy(pin_memory=False))
    clipper = GhostClipper(model, max_grad_norm=0.2)
    for _ in range(2):
        x = vectors(5)
        reference.backward(squares(plain, x))
        clipper.backward(squares(model, share(x)))
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(whole(one.grad), other.grad, atol=1e-12)


def a_head_that_is_sharded_again_is_named():
    model = gpt2(tie_word_embeddings=False).double()
    fully_shard(model.lm_head)
    shard_blocks(model)
    GhostClipper(model, max_grad_norm=0.2)
    with pytest.raises(ValueError, match="reshard_after_forward=False"):
        lm_losses(model, texts(2))


def plain_gradients_of_reversible_sequences():
    def branch(values):
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3 * values), nn.LayerNorm(3 * values)).double()

    for coupling in (AdditiveCoupling, AffineCoupling):
        for options in ({}, {"anchor_every": 1}, {"recompute": False}):
            models = []
            for _ in range(2):
                torch.manual_seed(0)
                couplings = [coupling(branch(coupling.values), branch(coupling.values)) for _ in range(3)]
                models.append(nn.Sequential(nn.Linear(3, 6).double(), ReversibleSequence(couplings, **options)))
            for block in models[1][1].blocks:
                fully_shard(block.f)
                fully_shard(block.g[2])  # a part of a branch
            fully_shard(models[1])
            x = vectors(4)
            for _ in range(2):
                squares(models[0], x).mean().backward()
                squares(models[1], share(x)).mean().backward()
            for one, other in zip(models[1].parameters(), models[0].parameters(), strict=True):
                assert torch.allclose(whole(one.grad), other.grad, atol=1e-12)


def engines_of_sharded_branches():
    model = unet("reversible").double()
    blocks = model.encoder[0].blocks
    assert model.encoder[0].engines() == ["fused"] * len(blocks)
    fully_shard(blocks[0].f)
    assert model.encoder[0].engines()[0] == "hooks"
    model.encoder[0].engine = "fused"
    with pytest.raises(ValueError, match=r"f sharded by fully_shard, .* give engine='auto'"):
        model.encoder[0].engines()


def couplings_that_are_sharded_are_refused():
    for memory in ("stored", "checkpoint", "reversible"):
        model = unet(memory).double()
        fully_shard(model.encoder[0].blocks[0])
        fully_shard(model)
        with pytest.raises(ValueError, match="sharded by fully_shard as a whole"):
            model(volumes(2)[0])


CHECKS = [
    the_norm_pass_reduces_nothing,
    training_with_layers_frozen_and_unfrozen_between_steps,
    the_sum_of_a_layer_that_was_frozen_since_is_dropped,
    layers_frozen_while_the_root_is_whole,
    gradients_are_dtensors_also_of_unused_layers,
    layers_that_only_some_processes_use,
    parameters_that_fsdp_ignores,
    processes_check_independence_equally_often,
    dependent_examples_are_refused_in_all_processes,
    examples_that_are_not_counted_contribute_nothing,
    padding_of_texts_on_one_process_alone,
    the_root_alone_is_sharded,
    tied_layers_in_one_group_of_their_own,
    bfloat16_by_autocast,
    memory_modes_of_shards_of_whole_levels,
    layers_keep_their_rules,
    a_backward_that_failed_while_adding_is_remembered,
    a_backward_goes_on_after_a_refused_forward,
    reports_of_sharded_models_are_refused,
    the_reduction_is_restored,
    sums_after_the_reduction_are_refused,
    gradients_that_stay_whole_are_refused,
    late_sums_are_refused,
    options_that_cannot_be_exact_are_refused,
    a_frozen_group_may_be_in_low_precision,
    shards_on_the_cpu,
    a_head_that_is_sharded_again_is_named,
    plain_gradients_of_reversible_sequences,
    engines_of_sharded_branches,
    couplings_that_are_sharded_are_refused,
]


def outcomes():
    """The error of each check that failed."""
    failed = {}
    for check in CHECKS:
        torch.manual_seed(0)
        try:
            check()
        except BaseException:
            failed[check.__name__] = traceback.format_exc()
    return failed


@pytest.mark.slow
def test_a_sharded_model_in_two_processes():
    for failed in run_processes(2, outcomes):
        assert not failed, "\n".join(f"{name}:\n{error}" for name, error in failed.items())
