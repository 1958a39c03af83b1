"""Anatomy of a drawn head: ellipsoids, and a cortex folded by a random field.

Ellipsoids in millimetres and the cortical depth e determine the tissue at a point p,

    e(p) = min(depth below the surface, distance to the nearest sulcus, distance to the midline fissure)

with cerebrospinal fluid for e < 1 mm, grey matter up to 4 mm and white matter below. The sulci are the zero set of a
smooth random field.
"""

import numpy as np
from numpy.random import Generator

from memsave.data.volumes.phantoms.synthesis import CODE, Anatomy, Head, add_lesions, smooth_field

Vector = tuple[float, float, float]

# Parts of the brain's outline: centre and radii in mm, the lower radius in z, and the depth of the folds.
_OUTLINE: tuple[tuple[Vector, Vector, float, float], ...] = (
    ((0, 0, 4), (67, 85, 60), 32, 21),  # cerebrum
    ((36, -16, -22), (26, 38, 24), 24, 13),  # temporal lobes
    ((-36, -16, -22), (26, 38, 24), 24, 13),
    ((0, 46, -34), (50, 32, 24), 26, 12),  # cerebellum
    ((0, 16, -40), (13, 13, 34), 34, 0),  # brainstem
)
# Inner structures; each overwrites the previous ones: tissue, centre, radii, and whether there is one on each side.
_INSIDE: tuple[tuple[str, Vector, Vector, bool], ...] = (
    ("deep", (12, 8, 5), (9, 15, 10), True),  # thalamus
    ("deep", (27, -6, 5), (6, 17, 11), True),  # putamen
    ("deep", (14, -20, 13), (6, 12, 11), True),  # caudate nucleus
    ("ventricle", (9, -20, 14), (5, 17, 10), True),  # lateral ventricle: frontal horn, body, atrium, occipital horn
    ("ventricle", (11, 4, 20), (6, 25, 8), True),
    ("ventricle", (19, 28, 11), (7, 12, 11), True),
    ("ventricle", (22, 44, 6), (5, 15, 6), True),
    ("ventricle", (0, 4, 4), (2.5, 13, 10), False),  # third and fourth ventricle
    ("ventricle", (0, 30, -34), (6, 6, 10), False),
    ("vessel", (18, 28, 8), (2.5, 7, 2.5), True),  # choroid plexus
)


def drawn_head(points: np.ndarray, *, rng: Generator, scale: float) -> Head:
    """The head at points (3, X, Y, Z) in mm."""
    folds = np.abs(smooth_field(rng, points.shape[1:], spacing=8 * scale))
    fine_folds = np.abs(smooth_field(rng, points.shape[1:], spacing=max(5.0 * scale, 1.0)))
    depth = np.full(points.shape[1:], -1.0, dtype=np.float32)
    cortex = depth.copy()
    for index, (centre, radii, lower, reach) in enumerate(_OUTLINE):
        below = min(radii) * (1 - _level(points, centre=centre, radii=radii, lower=lower))
        sulcus = (4.6 * folds if index < 3 else 3.0 * fine_folds) + 0.7 * np.maximum(below - reach, 0)
        depth = np.maximum(depth, below)
        cortex = np.maximum(cortex, np.minimum(below, sulcus) if reach else below + 4)
    middle = np.hypot(points[1] - 2, points[2] - 10)
    fissure = np.abs(points[0]) * 1.3 + np.maximum(np.where(points[2] < -12, 99, 34 - middle), 0)
    cortex = np.minimum(cortex, fissure)
    tissue = np.full(points.shape[1:], CODE["white"], dtype=np.uint8)
    tissue[cortex < 4.2] = CODE["grey"]
    tissue[cortex < 1.1] = CODE["csf"]
    widening = rng.uniform(0.8, 1.35)  # ventricles widen with age
    ventricle = np.full(points.shape[1:], np.inf, dtype=np.float32)
    for name, centre, radii, paired in _INSIDE:
        folded = np.stack([np.abs(points[0]), points[1], points[2]]) if paired else points
        level = _level(folded, centre=centre, radii=radii) / (widening if name == "ventricle" else 1.0)
        tissue[level < 1] = CODE[name]
        if name == "ventricle" and paired:
            ventricle = np.minimum(ventricle, level)
    add_lesions(tissue, ventricle, rng=rng, scale=scale)
    sinus = (np.abs(points[0]) < 3) & (depth < 4) & (points[2] > 0)
    tissue[sinus] = CODE["vessel"]
    return Head(tissue, depth > 0)


def _level(points: np.ndarray, *, centre: Vector, radii: Vector, lower: float | None = None) -> np.ndarray:
    """The distance from an ellipsoid's centre relative to its radius: 1 on the surface."""
    total = np.zeros(points.shape[1:], dtype=np.float32)
    for axis in range(3):
        offset = (points[axis] - np.float32(centre[axis])) / np.float32(radii[axis])
        if axis == 2 and lower is not None:
            offset = np.where(offset < 0, offset * np.float32(radii[2] / lower), offset)
        total += offset**2
    return np.sqrt(total)


DRAWN = Anatomy(half_extent=(73.0, 92.0, 76.0), head=drawn_head)
