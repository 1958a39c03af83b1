"""Embeddings: y_bt = W[x_bt], so that dL_b/dW = sum_t onehot(x_bt) (x) g_bt."""

from typing import Any

from torch import Tensor, nn

from memsave.ghost.gradients import Gradient, Outer
from memsave.ghost.rules import Use, first_argument, register
from memsave.ghost.rules.linear import places


@register(nn.Embedding)
def embedding(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], batch_size: int) -> Use:
    """`nn.Embedding`. Row numbers (1, T), as of positions, are expanded to the batch before the look-up.

    Otherwise their gradient would arrive summed over the batch.
    """
    assert isinstance(layer, nn.Embedding)
    if layer.max_norm is not None or layer.scale_grad_by_freq or layer.sparse:
        raise ValueError(
            "an Embedding with max_norm, scale_grad_by_freq or sparse mixes examples; construct it without these"
        )
    rows = first_argument(args, kwargs)
    if rows.dim() < 2:
        raise ValueError(
            f"an Embedding was given row numbers of shape {tuple(rows.shape)}, whose dimension could be places "
            f"as well as examples; give it (B, T), or (1, T) where every example has the same"
        )
    if len(rows) == 1 < batch_size:
        rows = rows.expand(batch_size, *rows.shape[1:])

    def per_example(saved: tuple[Tensor, ...], grad: Tensor) -> dict[str, Gradient]:
        index = saved[0].reshape(len(grad), -1)  # (B, T)
        if layer.padding_idx is not None:
            index = index.masked_fill(index == layer.padding_idx, -1)
        return {"weight": Outer(index, places(grad), rows=layer.num_embeddings)}

    return Use((rows,), (rows,), per_example)
