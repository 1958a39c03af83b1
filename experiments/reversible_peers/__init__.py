"""Gradients of reversible libraries in common uses of a network."""
