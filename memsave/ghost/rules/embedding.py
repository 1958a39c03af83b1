"""Embeddings: y_bt = W[x_bt], so that dL_b/dW = sum_t onehot(x_bt) (x) g_bt."""

from torch import Tensor, nn

from memsave.ghost.gradients import FactoredGrad, Gradient
from memsave.ghost.refusals import LayerRefused
from memsave.ghost.rule import LayerInputs, RuleOutput, register_rule


@register_rule(nn.Embedding)
def embedding(layer: nn.Module, inputs: LayerInputs) -> RuleOutput:
    """`nn.Embedding`. Indices (1, T), as of positions, are expanded to the batch before the look-up.

    Otherwise autograd would sum their gradient over the batch before the norm hook.
    """
    assert isinstance(layer, nn.Embedding)
    if layer.max_norm is not None or layer.scale_grad_by_freq or layer.sparse:
        raise LayerRefused(
            "has max_norm, scale_grad_by_freq or sparse, which mix examples or have no rule",
            "construct it without these",
        )
    index = inputs.input
    if index.dim() > 1 and len(index) == 1 < inputs.batch_size:
        index = index.expand(inputs.batch_size, *index.shape[1:])

    def per_example_grads(saved: tuple[Tensor, ...], grad: Tensor) -> dict[str, Gradient]:
        one_hot = saved[0].reshape(len(grad), -1)  # (B, T)
        if layer.padding_idx is not None:
            one_hot = one_hot.masked_fill(one_hot == layer.padding_idx, -1)
        weight = FactoredGrad(
            grad.reshape(len(grad), -1, grad.shape[-1]), one_hot, transposed=True, num_embeddings=layer.num_embeddings
        )
        return {"weight": weight}

    return RuleOutput((index,), {}, (index,), per_example_grads, stacks=True)
