"""Existing residual blocks, including MONAI's, as a reversible stack."""

import pytest
import torch
from torch import nn

from memsave.reversible import from_residual, verify
from tests.reversible.test_sequence import image
from tests.support.reversible_blocks import assert_same_as_stored, conv_branch

pytestmark = pytest.mark.usefixtures("device")


class Residual(nn.Module):
    def __init__(self, channels, *, scale=1.0, activation=False, **options):
        super().__init__()
        self.body, self.scale, self.activation = conv_branch(channels, **options), scale, activation

    def forward(self, x):
        y = x + self.scale * self.body(x)
        return y.relu() if self.activation else y


def blocks_of(count, **options):
    torch.manual_seed(0)
    return [Residual(4, **options).double() for _ in range(count)]


@pytest.mark.parametrize("count", [1, 2, 3, 6])
@pytest.mark.parametrize("activation", [False, True])
def test_gradients_equal_those_with_stored_activations(count, activation):
    stack = from_residual(blocks_of(count, activation=activation, dropout=0.2))
    assert stack(image()).shape == image().shape
    assert_same_as_stored(stack, image())
    assert list(stack.blocks) == [each.block for each in stack.modules() if hasattr(each, "block")]


@pytest.mark.parametrize("count", [3, 4])
def test_the_stack_is_the_midpoint_rule(count):
    blocks, x = blocks_of(count), image()
    earlier = later = x
    for block in blocks:
        earlier, later = later, earlier + 2 * (block(later) - later)
    torch.testing.assert_close(from_residual(blocks)(x), (earlier + later) / 2, rtol=1e-12, atol=1e-12)


def test_one_block_is_unchanged_and_several_agree_to_first_order():
    x = image()
    (block,) = blocks_of(1)
    torch.testing.assert_close(from_residual([block])(x), block(x), rtol=1e-12, atol=1e-12)
    errors = []
    for scale in (1e-2, 1e-3):
        blocks = blocks_of(5, scale=scale)
        y = x
        for block in blocks:
            y = block(y)
        errors.append((from_residual(blocks)(x) - y).norm().item())
    assert errors[1] < 0.02 * errors[0]  # the difference is of second order


def test_a_block_that_changes_the_shape_raises_an_error_with_its_number():
    blocks = [*blocks_of(2), nn.Conv2d(4, 4, 3, stride=2, padding=1).double()]
    with pytest.raises(ValueError, match=r"residual block 2 \(Conv2d\) turned \(2, 4, 6, 6\) into \(2, 4, 3, 3\).*two"):
        from_residual(blocks)(image())
    with pytest.raises(ValueError, match="no residual blocks"):
        from_residual([])


def monai_blocks():
    monai = pytest.importorskip("monai.networks.blocks")
    return {
        "ResidualUnit": lambda: monai.ResidualUnit(3, 4, 4),
        "ResBlock": lambda: pytest.importorskip("monai.networks.blocks.segresnet_block").ResBlock(
            3, 4, norm=("group", {"num_groups": 2})
        ),
        "UnetResBlock": lambda: monai.UnetResBlock(3, 4, 4, 3, 1, norm_name="instance"),
    }


@pytest.mark.parametrize("name", ["ResidualUnit", "ResBlock", "UnetResBlock"])
def test_monai_blocks_are_exact(name):
    torch.manual_seed(0)
    make = monai_blocks()[name]
    stack = from_residual([make() for _ in range(4)]).double()
    report = verify(stack, torch.randn(2, 4, 6, 6, 6, dtype=torch.float64))
    assert report.ok, str(report)


def test_a_convolution_as_a_shortcut_is_refused():
    monai = pytest.importorskip("monai.networks.blocks")
    wider = monai.ResidualUnit(3, 4, 8).double()
    with pytest.raises(ValueError, match=r"residual block 0 \(ResidualUnit\)"):
        from_residual([wider])(torch.randn(1, 4, 6, 6, 6, dtype=torch.float64))
