"""A picture of segmentations: truth and prediction as contours on the scan, in radiological orientation.

One row per case: T1ce and FLAIR, each with the truth and with the prediction, in the axial plane with the largest area
of tumour. The patient's right is on the left of the picture.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

COLOURS = {"wt": "#35b779", "tc": "#fde725", "et": "#e4572e", "rc": "#5aa9e6", "lesion": "#35b779"}
NAMES = {"wt": "whole tumour", "tc": "tumour core", "et": "enhancing", "rc": "resection cavity", "lesion": "lesion"}


@dataclass(frozen=True)
class Picture:
    """One case: image (C, X, Y, Z), truth and prediction (R, X, Y, Z), voxel size in mm, scores `dice_REGION` ..."""

    name: str
    image: Tensor
    truth: Tensor
    prediction: Tensor
    spacing: Sequence[float]
    scores: dict[str, float]
    modalities: Sequence[str]

    @property
    def regions(self) -> list[str]:
        """The names of the regions."""
        return [key.removeprefix("dice_") for key in self.scores if key.startswith("dice_")]


def draw_overlay(pictures: Sequence[Picture], path: Path) -> None:
    """Write the pictures as one PNG."""
    from matplotlib.figure import Figure

    modalities = pictures[0].modalities
    first = "t1ce" if "t1ce" in modalities else modalities[0]
    columns: list[tuple[str, str | None]] = [(first, None), (first, "truth"), (first, "prediction")]
    if "flair" in modalities and first != "flair":
        columns += [("flair", "truth"), ("flair", "prediction")]
    width, height = 2.6 * len(columns), 2.75 * len(pictures) + 0.9
    figure = Figure(figsize=(width, height), facecolor="black")
    grid = figure.subplots(len(pictures), len(columns), squeeze=False)
    figure.subplots_adjust(left=0.03, right=0.995, top=1 - 0.4 / height, bottom=0.45 / height, wspace=0.02, hspace=0.14)
    for row, picture in zip(grid, pictures, strict=True):
        plane = _widest_plane(picture.truth[0] | picture.prediction[0])
        for axes, (modality, masks) in zip(row, columns, strict=True):
            axes.set_axis_off()
            _draw_plane(axes, picture, plane=plane, modality=modality, masks=masks)
        dice = "   ".join(f"{NAMES[name]} {picture.scores[f'dice_{name}']:.2f}" for name in picture.regions)
        row[0].set_title(
            f"{picture.name}, axial {plane}     Dice: {dice}", color="white", fontsize=9, loc="left", pad=4
        )
    for axes, (modality, masks) in zip(grid[-1], columns, strict=True):
        shown = {"t1ce": "T1ce"}.get(modality, modality.upper())
        label = shown if masks is None else f"{shown}, {masks}"
        axes.text(0.5, -0.03, label, color="white", fontsize=9, ha="center", va="top", transform=axes.transAxes)
    for number, name in enumerate(pictures[0].regions):
        x = 0.62 + 0.13 * number
        figure.text(x, 1 - 0.2 / height, f"—  {NAMES[name]}", color=COLOURS[name], fontsize=9, va="center")
    figure.savefig(path, dpi=130, facecolor="black")


def _draw_plane(axes: Any, picture: Picture, *, plane: int, modality: str, masks: str | None) -> None:
    image = _upright(picture.image[picture.modalities.index(modality), :, :, plane])
    brain = image[image != 0]
    low, high = np.percentile(brain, (1, 99.5)) if brain.size else (0.0, 1.0)
    aspect = picture.spacing[1] / picture.spacing[0]
    shown = np.where(image == 0, low, image)
    axes.imshow(shown, cmap="gray", vmin=low, vmax=high, aspect=aspect, interpolation="bilinear")
    if masks is None:
        axes.text(0.02, 0.5, "R", color="white", fontsize=8, va="center", transform=axes.transAxes)
        _scale_bar(axes, millimetres=20, voxel=picture.spacing[0])
        return
    volumes = picture.truth if masks == "truth" else picture.prediction
    for mask, name in zip(volumes, picture.regions, strict=True):
        outline = _upright(mask[:, :, plane]).astype(float)
        if outline.any():
            # a wider line keeps the core visible under the contour of an enhancing rim on the same voxels
            axes.contour(outline, levels=[0.5], colors=COLOURS[name], linewidths=2.4 if name == "tc" else 1.1)


def _scale_bar(axes: Any, *, millimetres: float, voxel: float) -> None:
    height = axes.get_ylim()[0]
    start, end = 2.0, 2.0 + millimetres / voxel
    axes.plot([start, end], [height - 2, height - 2], color="white", linewidth=2)
    axes.text((start + end) / 2, height - 3, f"{millimetres:g} mm", color="white", fontsize=7, ha="center", va="bottom")


def _widest_plane(mask: Tensor) -> int:
    """The index on the last axis of the axial plane with the most tumour; the middle plane without tumour."""
    area = mask.sum((0, 1))
    return int(area.argmax()) if area.any() else mask.shape[-1] // 2


def _upright(plane: Tensor) -> np.ndarray:
    """An (X, Y) plane as an image; in the orientation of BraTS, x points to the patient's left and y to the back."""
    return plane.numpy().T
