"""Linear layers: y = x W' + b, with x (B, ..., d) and y (B, ..., p).

dL_b/dW = sum_t g_bt (x) a_bt        dL_b/db = sum_t g_bt
"""

from torch import Tensor, nn

from memsave.ghost.gradients import FactoredGrad, Gradient, PerSampleGrad, flatten_positions, upcast
from memsave.ghost.refusals import LayerRefused
from memsave.ghost.rule import LayerInputs, RuleOutput, register_rule


def _rule(inputs: LayerInputs, *, transposed: bool) -> RuleOutput:
    trainable = inputs.trainable
    if inputs.input.dim() < 2:
        raise LayerRefused(
            f"got an input of shape {tuple(inputs.input.shape)}, which has no batch", "give it two dimensions or more"
        )

    def per_example_grads(saved: tuple[Tensor, ...], grad: Tensor) -> dict[str, Gradient]:
        g, found = flatten_positions(grad), dict[str, Gradient]()  # (B, T, p)
        if "weight" in trainable:
            found["weight"] = FactoredGrad(g, flatten_positions(saved[0]), transposed=transposed)
        if "bias" in trainable:
            found["bias"] = PerSampleGrad(upcast(g).sum(1))
        return found

    saved = (inputs.input,) if "weight" in trainable else ()
    return RuleOutput(inputs.args, inputs.kwargs, saved, per_example_grads, stacks=True)


@register_rule(nn.Linear)
def linear(layer: nn.Module, inputs: LayerInputs) -> RuleOutput:
    """`nn.Linear`: weight (p, d)."""
    return _rule(inputs, transposed=False)


@register_rule("transformers.pytorch_utils.Conv1D")
def conv1d(layer: nn.Module, inputs: LayerInputs) -> RuleOutput:
    """GPT-2's linear layer: weight (d, p)."""
    return _rule(inputs, transposed=True)
