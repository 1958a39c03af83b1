"""Embeddings: y_bt = W[x_bt], so that dL_b/dW = sum_t onehot(x_bt) (x) g_bt."""

from torch import Tensor, nn

from memsave.ghost.gradients import Gradient, Outer
from memsave.ghost.refusals import Refused
from memsave.ghost.rules import Given, Use, register
from memsave.ghost.rules.linear import places


@register(nn.Embedding)
def embedding(layer: nn.Module, given: Given) -> Use:
    """`nn.Embedding`. Row numbers (1, T), as of positions, are expanded to the batch before the look-up.

    Otherwise their gradient would arrive summed over the batch.
    """
    assert isinstance(layer, nn.Embedding)
    if layer.max_norm is not None or layer.scale_grad_by_freq or layer.sparse:
        raise Refused(
            "has max_norm, scale_grad_by_freq or sparse, which mix examples or have no rule",
            "construct it without these",
        )
    rows = given.first
    if rows.dim() > 1 and len(rows) == 1 < given.batch_size:
        rows = rows.expand(given.batch_size, *rows.shape[1:])

    def per_example(saved: tuple[Tensor, ...], grad: Tensor) -> dict[str, Gradient]:
        index = saved[0].reshape(len(grad), -1)  # (B, T)
        if layer.padding_idx is not None:
            index = index.masked_fill(index == layer.padding_idx, -1)
        return {"weight": Outer(index, places(grad), rows=layer.num_embeddings)}

    return Use((rows,), {}, (rows,), per_example)
