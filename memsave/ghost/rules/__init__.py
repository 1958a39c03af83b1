"""Layer rules: one file for each kind of layer, found by the layer's class."""

from memsave.ghost.rules import conv, embedding, linear, norm  # importing a rule registers it

__all__ = ["conv", "embedding", "linear", "norm"]
