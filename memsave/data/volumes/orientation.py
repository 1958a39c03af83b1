"""Reorientation of volumes to the orientation of BraTS, and of predictions back.

A network fails on volumes in another orientation than those of its training. Volumes are therefore reoriented, only by
exchanging and reversing axes, so that x points to the patient's left, y to the back and z up (LPS; for an oblique scan
approximately).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

_DIRECTION = (-1, -1, 1)  # of x, y and z along NIfTI's axes, which point right, front and up


@dataclass(frozen=True)
class Orientation:
    """The orientation of a file's axes in the patient."""

    axes: tuple[int, ...]
    """The axes of the file along which x, y and z run."""
    reversed: tuple[bool, ...]
    """Whether x, y and z point against this axis."""

    @classmethod
    def of(cls, affine: np.ndarray) -> "Orientation":
        """The orientation of a file with this (4, 4) affine, voxel index to millimetres."""
        from nibabel.orientations import io_orientation

        found = {int(axis): (number, sign) for number, (axis, sign) in enumerate(io_orientation(affine))}
        axes = tuple(found[axis][0] for axis in range(3))
        return cls(axes, tuple(found[axis][1] != _DIRECTION[axis] for axis in range(3)))

    def apply(self, volume: Tensor) -> Tensor:
        """(..., I, J, K) as stored to (..., X, Y, Z)."""
        return self._reverse(self._permute(volume, self.axes))

    def undo(self, volume: Tensor) -> Tensor:
        """(..., X, Y, Z) to (..., I, J, K) as stored."""
        return self._permute(self._reverse(volume), [self.axes.index(axis) for axis in range(3)])

    def reorder(self, values: Sequence[Any]) -> tuple[Any, ...]:
        """Reorder values of the file's axes to the order x, y, z."""
        return tuple(values[axis] for axis in self.axes)

    def _reverse(self, volume: Tensor) -> Tensor:
        flipped = [axis - 3 for axis in range(3) if self.reversed[axis]]
        return volume.flip(flipped) if flipped else volume

    @staticmethod
    def _permute(volume: Tensor, axes: Sequence[int]) -> Tensor:
        leading = volume.dim() - 3
        return volume.permute(*range(leading), *(leading + axis for axis in axes))
