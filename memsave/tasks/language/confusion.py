"""The picture of a confusion matrix: rows are labels, columns are predictions, shades are shares of a row."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

MOST_NUMBERS = 20
"""With more labels, the cells have no numbers."""


def draw_confusion(matrices: Mapping[str, np.ndarray], names: Sequence[str], path: Path) -> None:
    """Write the matrices (L, L), by title, side by side as one PNG."""
    from matplotlib.figure import Figure

    count = len(names)
    side = min(2.2 + 0.55 * count, 12.0)
    figure = Figure(figsize=((side + 1.2) * len(matrices), side + 0.4), layout="constrained")
    for axes, (title, matrix) in zip(figure.subplots(1, len(matrices), squeeze=False)[0], matrices.items()):
        totals = matrix.sum(1, keepdims=True)
        shares = matrix / np.maximum(totals, 1)
        shown = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        short = [name if len(name) <= 20 else f"{name[:19]}…" for name in names]
        axes.set_xticks(range(count), short, rotation=45 if count > 2 else 0, ha="right" if count > 2 else "center")
        axes.set_yticks(range(count), short)
        axes.set(title=title, xlabel="predicted", ylabel="label")
        for (row, column), number in np.ndenumerate(matrix) if count <= MOST_NUMBERS else ():
            share = shares[row, column]
            text = f"{number}\n{share:.0%}" if count <= 8 else f"{number}"
            axes.text(column, row, text, ha="center", va="center", color="white" if share > 0.6 else "black")
    figure.colorbar(shown, ax=axes, label="share of the label's examples")
    figure.savefig(path, dpi=120)
