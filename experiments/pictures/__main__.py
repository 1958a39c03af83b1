"""The pictures of docs/brats.md: phantoms with real anatomy, and augmented crops of one of them.

    python -m experiments.pictures

Needs the extra mni. The cases are those of data=mni_phantom with the default seed.
"""

import io
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from experiments.record import without_options
from memsave.data.volumes.dataset import TrainingCrops
from memsave.data.volumes.layouts import MODALITIES, Case
from memsave.data.volumes.phantoms.generate import write_phantoms
from memsave.data.volumes.reader import read_case
from memsave.tasks.segmentation.overlay import COLOURS

DOCS = Path(__file__).parents[2] / "docs"
REGIONS = {"wt": (1, 2, 4), "tc": (1, 4), "et": (4,)}
SHADES = 96  # colours in the palette of a picture


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        cases = write_phantoms(folder, cases=2, size=(240, 240, 155), anatomy="mni152")
        _save(_modalities(cases), DOCS / "mni-phantoms.png")
        _save(_crops(cases[:1]), DOCS / "augmentation.png")


def _modalities(cases: Sequence[Case]) -> Figure:
    """One row per case: axial planes of its modalities, and a coronal plane with the contours of the regions."""
    figure = Figure(figsize=(11, 2.3 * len(cases)), facecolor="black")
    grid = figure.subplots(len(cases), 6, squeeze=False)
    figure.subplots_adjust(left=0.005, right=0.995, top=0.93, bottom=0.01, wspace=0.03, hspace=0.03)
    for row, case in zip(grid, cases, strict=True):
        scan = read_case(case)
        assert scan.label is not None
        box = np.s_[28:212, 12:228, 0:155]  # around every brain
        image, label = scan.image[:, *box], scan.label[box]
        widest = [int((label > 0).sum(other).argmax()) for other in ((1, 2), (0, 2), (0, 1))]
        sections = [(np.s_[:, :, widest[2]], number) for number in (0, 1, 2, 3, 3)] + [(np.s_[:, widest[1], ::-1], 1)]
        for column, (axes, (section, number)) in enumerate(zip(row, sections, strict=True)):
            _draw(axes, image[number][section].T, label[section].T if column > 3 else None)
    titles = ("T1", "T1ce", "T2", "FLAIR", "FLAIR, regions", "T1ce, coronal")
    for axes, title in zip(grid[0], titles, strict=True):
        axes.set_title(title, color="white", fontsize=10)
    return figure


def _crops(cases: Sequence[Case]) -> Figure:
    """Augmented crops of one case, centred on tumour: FLAIR with the contour of the whole tumour."""
    figure = Figure(figsize=(11, 3.9), facecolor="black")
    grid = figure.subplots(2, 6)
    figure.subplots_adjust(left=0.06, right=0.995, top=0.99, bottom=0.01, wspace=0.03, hspace=0.03)
    for row, augmentation in zip(grid, ("light", "full"), strict=True):
        options = {"crop_size": (96, 96, 96), "foreground": 1.0, "augmentation": augmentation}
        dataset = TrainingCrops(cases, seed=0, **options)
        for number, axes in enumerate(row):
            item = dataset.example(0, draw=number)
            _draw(
                axes, item["image"][MODALITIES.index("flair"), :, :, 48].numpy().T, item["label"][0, :, :, 48].numpy().T
            )
        row[0].text(
            -0.06, 0.5, augmentation, color="white", rotation=90, va="center", ha="right", transform=row[0].transAxes
        )
    return figure


def _draw(axes, image: np.ndarray, label: np.ndarray | None) -> None:
    low, high = np.percentile(image[image != 0], (1, 99.7))
    axes.imshow(
        np.where(image == 0, low - 0.15 * (high - low), image), cmap="gray", vmin=low - 0.15 * (high - low), vmax=high
    )
    axes.set_axis_off()
    for name, values in REGIONS.items() if label is not None else ():
        region = np.isin(label, values)
        if region.any():
            axes.contour(region, levels=[0.5], colors=COLOURS[name], linewidths=1.8 if name == "tc" else 0.9)


def _save(figure: Figure, path: Path) -> None:
    """Write a PNG with SHADES colours, a third of the usual size."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=100, facecolor="black")
    Image.open(drawn).convert("RGB").quantize(SHADES, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    without_options(__doc__)
    main()
