"""Volumes in the orientation of BraTS, whatever way their files store them.

A network that has learned on axial slices is lost on a volume that is stored from ear to ear. So volumes are turned,
by exchanging and reversing axes alone, until x runs to the patient's left, y to the back and z up (LPS, near enough for
an oblique scan), and predictions are turned back.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

_DIRECTION = (-1, -1, 1)  # of x, y and z in NIfTI's right, front and up


@dataclass(frozen=True)
class Orientation:
    """How a file's axes lie in the patient."""

    axes: tuple[int, ...]
    """The axis of the file along which x, y and z run."""
    reversed: tuple[bool, ...]
    """Whether x, y and z run against it."""

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
        """What belongs to the file's axes, by x, y and z."""
        return tuple(values[axis] for axis in self.axes)

    def _reverse(self, volume: Tensor) -> Tensor:
        against = [axis - 3 for axis in range(3) if self.reversed[axis]]
        return volume.flip(against) if against else volume

    @staticmethod
    def _permute(volume: Tensor, axes: Sequence[int]) -> Tensor:
        leading = volume.dim() - 3
        return volume.permute(*range(leading), *(leading + axis for axis in axes))
