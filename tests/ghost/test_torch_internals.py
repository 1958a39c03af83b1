"""What `memsave.ghost` relies on in private API of PyTorch: a version that changes it fails here, by name."""

import ast
import re
import weakref
from pathlib import Path

import pytest
import torch
from torch import distributed, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import memsave.ghost
from memsave.ghost import _torch_internals as internals

PACKAGE = Path(memsave.ghost.__file__).parent


def test_other_modules_of_ghost_use_no_private_api_of_torch():
    for path in PACKAGE.rglob("*.py"):
        if path.name == "_torch_internals.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "torch":
                private = [each for each in (*node.module.split("."), *(a.name for a in node.names)) if each[0] == "_"]
                assert not private, f"{path.name} imports {private} of {node.module}"
            if isinstance(node, ast.Attribute) and re.match(r"_[a-z]", node.attr):
                owner = ast.unparse(node.value)
                assert owner in ("self", "copy"), f"{path.name} uses {owner}.{node.attr}"


def test_every_name_has_a_test():
    source = Path(__file__).read_text()
    for name in internals.__all__:
        assert re.search(rf"internals\.{name}\b", source), name


class FirstOfTwo(torch.autograd.Function):
    """Returns its first argument."""

    @staticmethod
    def forward(ctx, one, other):
        return one.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class Record(torch.autograd.Function):
    """Calls `seen` in its backward; an attribute of the context is an attribute of the graph's node."""

    @staticmethod
    def forward(ctx, x, other, seen, tag):
        ctx.seen, ctx.tag = seen, tag
        return x * 1

    @staticmethod
    def backward(ctx, grad):
        ctx.seen()
        return grad, None, None, None


def test_a_backward_has_a_number_and_an_inner_backward_has_another():
    numbers, x = [], torch.ones(2, requires_grad=True)

    def outer():
        numbers.append(internals.current_backward())
        assert internals.in_backward()
        y = torch.ones(2, requires_grad=True)
        with torch.enable_grad():
            inner = Record.apply(y, None, lambda: numbers.append(internals.current_backward()), "inner")
            torch.autograd.grad(inner.sum(), y)
        numbers.append(internals.current_backward())

    assert internals.current_backward() == -1
    assert not internals.in_backward()
    torch.autograd.grad(Record.apply(x, None, outer, "outer").sum(), x)
    first, inner, last = numbers
    assert first == last
    assert len({-1, first, inner}) == 3
    assert not internals.in_backward()


def test_a_loss_hook_and_the_first_node_see_the_same_backward_number():
    numbers, x = [], torch.ones(2, requires_grad=True)
    losses = Record.apply(x, None, lambda: numbers.append(internals.current_backward()), "")
    losses.register_hook(lambda _: numbers.append(internals.current_backward()))
    torch.autograd.grad(losses, x, torch.ones(2))
    assert numbers[0] == numbers[1] != -1


def test_saved_tensors_are_moved_by_hooks_that_say_so():
    class Moving:
        only_moves = True

        def __call__(self, tensor):
            return tensor

    assert not internals.saved_tensors_are_moved()
    with torch.autograd.graph.saved_tensors_hooks(Moving(), Moving()):
        assert internals.saved_tensors_are_moved() and internals.saved_tensors_are_redirected()
        with torch.autograd.graph.save_on_cpu():
            assert not internals.saved_tensors_are_moved()


def test_saved_tensors_are_redirected_only_inside_checkpoints():
    seen = []

    def body(x):
        seen.append(internals.saved_tensors_are_redirected())
        return x.sin()

    x = torch.ones(2, requires_grad=True)
    body(x)
    checkpoint(body, x, use_reentrant=False)
    body(x)
    assert seen == [False, True, False]


def test_modes_and_saved_tensor_hooks_do_not_see_what_is_unobserved():
    seen = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    x = torch.ones(2, requires_grad=True)
    with Mode(), torch.autograd.graph.saved_tensors_hooks(seen.append, seen.append):
        with internals.unobserved():
            (grad,) = torch.autograd.grad(x.sin().sum(), x)
        assert not seen
        x.sin()
    assert len(seen) == 2
    assert torch.equal(grad, x.cos())


def test_attributes_of_a_functions_context_are_found_on_its_node_with_its_input_first():
    x, z = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    y = Record.apply(x.sin(), z, lambda: None, "tag")  # its node is valid while it is alive
    node = y.grad_fn
    assert node.tag == "tag"
    (first, _), (second, _), *_ = node.next_functions
    assert first.name() == "SinBackward0"
    assert second.variable is z


def test_fake_tensors_are_recognised():
    with FakeTensorMode():
        assert internals.is_fake(torch.zeros(2))
    assert not internals.is_fake(torch.zeros(2))


def test_in_place_operations_raise_the_version_and_writes_through_data_do_not():
    x = torch.zeros(3)
    before = internals.version(x)
    x[1:].add_(1)  # through a view
    assert internals.version(x) > before
    before = internals.version(x)
    x.data.add_(1)
    assert internals.version(x) == before


def test_views_share_the_storage_and_another_data_changes_it():
    x = torch.zeros(4)
    before = internals.storage_id(x)
    assert internals.storage_id(x[2:]) == internals.storage_id(x.detach()) == before
    assert internals.storage_id(x.clone()) != before
    x.data = torch.ones(4)
    assert internals.storage_id(x) != before
    with FakeTensorMode():
        fake = torch.zeros(4)
        assert internals.storage_id(fake) == internals.storage_id(fake[1:])


@pytest.mark.parametrize(
    ("base", "kinds"),
    [
        (internals.BatchNorm, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)),
        (internals.InstanceNorm, (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)),
    ],
)
def test_base_classes_cover_all_layers_of_their_kind(base, kinds):
    for kind in kinds:
        assert issubclass(kind, base)


def test_a_compiled_module_is_recognised():
    module = nn.Linear(2, 2)
    assert not internals.is_compiled(module)
    module.compile(backend="eager")
    assert internals.is_compiled(module)


def test_forward_pre_hooks_are_listed():
    module, hook = nn.Linear(2, 2), lambda *_: None
    module.register_forward_pre_hook(hook)
    assert internals.forward_pre_hooks(module) == [hook]


def test_gradient_hooks_of_both_kinds_are_listed():
    parameter, hooks = nn.Parameter(torch.ones(2)), [lambda _: None, lambda _: None]
    assert internals.gradient_hooks(parameter) == []
    parameter.register_hook(hooks[0])
    handle = parameter.register_post_accumulate_grad_hook(hooks[1])
    assert internals.gradient_hooks(parameter) == hooks
    handle.remove()
    assert internals.gradient_hooks(parameter) == hooks[:1]


def test_a_tensor_in_the_registry_of_parameters_is_used_by_the_forward():
    module = nn.Linear(2, 2, bias=False)
    internals.own_parameters(module)["weight"] = torch.ones(2, 2)
    assert torch.equal(module(torch.ones(1, 2)), torch.full((1, 2), 2.0))
    with pytest.raises(TypeError):
        nn.Linear(2, 2).weight = torch.ones(2, 2)


def test_registries_list_buffers_that_are_none_and_children_with_two_names():
    module = nn.Module()
    module.register_buffer("empty", None)
    module.register_buffer("temporary", torch.zeros(1), persistent=False)
    module.one = module.two = nn.Linear(1, 1)
    assert list(internals.own_buffers(module)) == ["empty", "temporary"]
    assert internals.non_persistent_buffers(module) == {"temporary"}
    assert [name for name, _ in internals.own_children(module)] == ["one", "two"]


def test_lazy_parameters_are_recognised():
    assert internals.is_lazy(nn.LazyLinear(2).weight)
    assert not internals.is_lazy(nn.Linear(2, 2).weight)


def test_nested_arguments_are_flattened_and_restored():
    nested = (([1, {"a": 2}], (3,)), {"b": None})
    leaves, spec = internals.tree_flatten(nested)
    assert [leaf for leaf in leaves if leaf is not None] == [1, 2, 3]
    assert internals.tree_unflatten(leaves, spec) == nested


def test_weak_dictionaries_compare_tensors_by_identity_and_do_not_keep_them():
    entries, one, two = internals.WeakIdKeyDictionary(), torch.ones(2), torch.ones(2)
    entries[one] = "one"
    assert one in entries
    assert two not in entries
    alive = weakref.ref(one)
    del one
    assert alive() is None
    assert not list(entries.items())


def test_the_weight_gradient_of_a_convolution_reads_only_the_shape_of_the_weight():
    x, weight = torch.randn(1, 4, 7), torch.randn(6, 2, 3, requires_grad=True)
    y = F.conv1d(x, weight, stride=2, padding=1, groups=2)
    grad = torch.randn_like(y)
    (expected,) = torch.autograd.grad(y, weight, grad)
    shape = grad.new_empty(1).expand(weight.shape)
    options = {"stride": (2,), "padding": (1,), "dilation": (1,), "groups": 2}
    torch.testing.assert_close(internals.convolution_weight_grad(grad, x, shape, **options), expected)


def test_errors_of_reentrant_checkpoints_are_recognised_by_their_text():
    x = torch.ones(2, requires_grad=True)
    y = checkpoint(torch.sin, x, use_reentrant=True)
    with pytest.raises(RuntimeError) as error:
        torch.autograd.grad(y.sum(), x)
    assert internals.is_reentrant_checkpoint_error(error.value)
    assert not internals.is_reentrant_checkpoint_error(RuntimeError("out of memory"))


def test_the_leaves_past_a_function_are_reached_through_its_first_input():
    first, second, other = (torch.ones(2, requires_grad=True) for _ in range(3))
    y = FirstOfTwo.apply(first * 2, second * 2) + other
    assert set(internals.leaves_past([y], FirstOfTwo)) == {first, other}
    assert set(internals.leaves_past([y], Record)) == {first, second, other}
    assert list(internals.leaves_past([torch.ones(2)], Record)) == []


def test_a_graph_with_many_paths_is_walked_once():
    leaf = torch.ones(2, requires_grad=True)
    y = leaf * 2
    for _ in range(50):
        y = y + y
    assert list(internals.leaves_past([y], Record)) == list(internals.leaves_of(y, stop=Record)) == [leaf]
    assert list(internals.leaves_of(torch.ones(2), stop=Record)) == []


def test_the_leaves_of_a_graph_end_at_a_function():
    x, z = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    assert [id(leaf) for leaf in internals.leaves_of(x.sin() * x, stop=Record)] == [id(x)]
    y = Record.apply(x.sin(), z, lambda: None, "tag") * z
    found = list(internals.leaves_of(y, stop=Record))
    assert len(found) == 2
    assert any(leaf is None for leaf in found)
    assert any(leaf is z for leaf in found)


def test_function_modes_see_no_operator_that_is_unfollowed_and_all_inside_a_function_without_overrides():
    seen = []

    class Mode(internals.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    x = torch.ones(2, requires_grad=True)
    with Mode():
        with internals.unfollowed():
            x.sin()
        assert not seen
        internals.without_overrides(F.normalize)(x, dim=0)
        assert len(seen) > 1
        assert F.normalize not in seen


def test_recomputations_in_a_backward_without_overrides_are_seen_by_a_function_mode():
    seen = []

    class Mode(internals.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func.__name__)
            return func(*args, **(kwargs or {}))

    x = torch.ones(2, requires_grad=True)
    y = checkpoint(lambda each: each.sin().cos(), x, use_reentrant=False)
    with Mode():
        (grad,) = internals.without_overrides(torch.autograd.grad)(y.sum(), x)
    assert "cos" in seen
    torch.testing.assert_close(grad, -x.sin().sin() * x.cos())


def test_tensors_of_vmap_are_recognised():
    seen = []
    torch.func.vmap(lambda x: seen.append(internals.is_batched(x)) or x)(torch.ones(3))
    assert seen == [True]
    assert not internals.is_batched(torch.ones(3))


def test_gradient_hooks_of_a_tensor_are_recognised():
    x = torch.ones(2, requires_grad=True)
    assert not internals.tensor_hooks(x.sin())
    y = x.sin()
    y.register_hook(lambda grad: grad)
    assert internals.tensor_hooks(y)


def test_views_are_recognised():
    x = torch.ones(2, 2)
    assert internals.is_view(x[0])
    assert not internals.is_view(x * 2)


@pytest.fixture
def sharded(tmp_path):
    """A tied pair and a frozen layer, sharded over a group of one process."""
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False), nn.Linear(3, 2))
    model[1].weight = model[0].weight
    model[2].weight.requires_grad_(False)
    mesh = init_device_mesh("cpu", (1,))
    fully_shard(model[2], mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    yield fully_shard(model, mesh=mesh)
    distributed.destroy_process_group()


def test_groups_of_fsdp_have_both_copies_of_each_parameter(sharded):
    root, last = internals.fsdp_groups(sharded)
    assert isinstance(root, internals.FsdpGroup)
    assert (root.module, last.module) == (sharded, sharded[2])
    (tied,) = root.parameters()
    assert isinstance(tied, internals.FsdpParameter)
    assert tied.shard is sharded[0].weight is sharded[1].weight
    assert tied.whole is None and not tied.is_dtensor and not root.is_unsharded
    sharded.unshard()
    assert root.is_unsharded and not last.is_unsharded
    (tied,) = root.parameters()
    whole, data = tied.whole, tied.whole.detach().clone()
    assert whole is sharded[0].weight is sharded[1].weight and torch.equal(tied.local, data)
    version = internals.version(whole)
    sharded.reshard()
    assert not root.is_unsharded and sharded[0].weight is tied.shard and not whole.untyped_storage().size()
    sharded.unshard()
    assert next(root.parameters()).whole is whole and torch.equal(whole, data) and internals.version(whole) == version
    tied.shard.requires_grad_(False)
    assert whole.requires_grad
    sharded.reshard()
    sharded.unshard()
    assert not whole.requires_grad  # from now on as the shard


def test_parameters_that_were_one_have_the_same_origin(sharded):
    one, other = nn.Linear(2, 2), nn.Linear(2, 2)
    one.weight = other.weight
    model = nn.Sequential(one, other)
    mesh = init_device_mesh("cpu", (1,))
    fully_shard(one, mesh=mesh)
    fully_shard(model, mesh=mesh)
    origins = [each.origin for group in internals.fsdp_groups(model) for each in group.parameters()]
    assert len(origins) == 4 and len(set(origins)) == 3


def test_the_options_of_a_group_of_fsdp(sharded):
    root, last = internals.fsdp_groups(sharded)
    assert root.dtypes == (None, None) and last.dtypes == (torch.bfloat16, None)
    assert root.mesh_size == 1 and not root.reshards_to_fewer
    copies = nn.Linear(2, 2)
    fully_shard(copies, mesh=init_device_mesh("cpu", (1, 1), mesh_dim_names=("copies", "shards")))
    assert internals.fsdp_groups(copies)[0].mesh_size == 0
    assert root.reduces
    sharded.set_requires_gradient_sync(False)
    assert not root.reduces and not last.reduces


def test_the_reduction_of_a_group_of_fsdp(sharded):
    root, _ = internals.fsdp_groups(sharded)
    assert root.reduction == (None, False) and not root.reduces_unused
    sharded.set_gradient_divide_factor(1.0)
    sharded.set_force_sum_reduction_for_comms(True)
    sharded.set_reduce_scatter_unused_params(True)
    assert root.reduction == (1.0, True) and root.reduces_unused
    root.reduction, root.reduces_unused = (4.0, True), False
    assert root.reduction == (4.0, True) and not root.reduces_unused
    of_factor = []
    for factor in (1.0, 2.0):
        root.reduction = (factor, True)
        sharded(torch.ones(1, 3)).sum().backward()
        of_factor.append(sharded[0].weight.grad.full_tensor())
        sharded.zero_grad()
    assert (of_factor[0].abs() >= 2 * of_factor[1].abs()).all() and of_factor[0].any()


def test_a_gradient_is_reduced_where_the_backward_reaches_the_inputs_or_ends(sharded):
    sharded[2].weight.requires_grad_(True)
    x = torch.ones(1, 3, requires_grad=True)
    root, last = internals.fsdp_groups(sharded)
    y = sharded(x)
    assert root.is_unsharded and not last.is_unsharded
    (grad,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    assert grad.shape == (1, 3) and sharded[0].weight.grad is None and not root.is_unsharded
    y.sum().backward()
    assert all(p.grad is not None for p in sharded.parameters())
    assert all(each.whole.grad is None for group in (root, last) for each in group.parameters())
