"""Backend 2: per-example clipping without per-example gradients."""

from memsave.ghost.clipper import GhostClipper

__all__ = ["GhostClipper"]
