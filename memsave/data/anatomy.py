"""A synthetic head with a tumour: four MR modalities and a label map on one voxel grid.

Anatomy is drawn in millimetres (x to the left, y to the back, z up, the origin in the middle of the brain) and
sampled at the voxels through a random smooth deformation. Tissue follows from ellipsoids and from a cortical depth

    e(p) = min(depth below the surface, distance to the nearest sulcus, distance to the midline fissure)

(liquor where e < 1 mm, grey matter up to 4 mm, white matter below); sulci are the zero set of a smooth random field.
A tumour is a pair of warped spheres: tissue shifts away from it (mass effect), the inner sphere is necrosis within an
enhancing rim, the outer one edema that spares the ventricles and part of the cortex. An image is

    I_m = gain_m * bias_m * | blur(contrast_m[tissue]) + n1 + i n2 |,    n1, n2 ~ N(0, sigma_m)    (Rician noise)

inside the brain and exactly 0 outside, as after skull stripping. Chronic white-matter lesions are bright on FLAIR,
ventricles on T2, vessels and choroid plexus on T1ce: no threshold on one modality finds the tumour.
"""

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator

Vector = tuple[float, float, float]

# Mean signal per modality, relative to white matter on T1; columns in the order of MODALITIES: t1, t1ce, t2, flair.
CONTRAST = {
    "csf": (0.28, 0.28, 1.05, 0.14),
    "ventricle": (0.28, 0.28, 1.05, 0.14),
    "grey": (0.64, 0.66, 0.60, 0.58),
    "white": (0.88, 0.88, 0.42, 0.48),
    "deep": (0.72, 0.74, 0.50, 0.53),
    "lesion": (0.76, 0.76, 0.62, 0.77),
    "vessel": (0.66, 1.25, 0.40, 0.45),
    "necrosis": (0.42, 0.42, 0.92, 0.60),
    "edema": (0.62, 0.62, 0.80, 0.90),
    "enhancing": (0.62, 1.22, 0.70, 0.78),
}
TISSUES = tuple(CONTRAST)
_CODE = {tissue: code for code, tissue in enumerate(TISSUES)}
LABELS = {"necrosis": 1, "edema": 2, "enhancing": 4}

# Parts of the brain's outline: centre and radii in mm, the lower radius in z, and how far its folds reach down.
_OUTLINE: tuple[tuple[Vector, Vector, float, float], ...] = (
    ((0, 0, 4), (67, 85, 60), 32, 21),  # cerebrum
    ((36, -16, -22), (26, 38, 24), 24, 13),  # temporal lobes
    ((-36, -16, -22), (26, 38, 24), 24, 13),
    ((0, 46, -34), (50, 32, 24), 26, 12),  # cerebellum
    ((0, 16, -40), (13, 13, 34), 34, 0),  # brainstem
)
# Structures inside, each laid over those before it: tissue, centre, radii, and whether the other side has one too.
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
_HALF_EXTENT = np.array([73.0, 92.0, 76.0])  # mm that the brain, deformed, may reach from the origin


@dataclass(frozen=True)
class Tumour:
    """What is drawn by lot for one tumour, in mm."""

    centre: np.ndarray
    radius: float  # of edema
    core: float  # of necrosis and rim
    rim: float  # thickness of the enhancing rim; 0 where nothing enhances
    push: float  # mass effect, as a fraction of the distance to the centre


def synthesise(size: tuple[int, int, int], *, rng: Generator, enhancing: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """One head on a grid of `size` voxels: image (4, X, Y, Z) int16 and label (X, Y, Z) uint8.

    The head keeps its proportions and fills the grid, but is never larger than one voxel per millimetre allows.
    """
    scale = min(1.0, *(np.array(size) / (2 * _HALF_EXTENT)))  # voxels per mm
    box = tuple(np.minimum(size, np.ceil(2 * _HALF_EXTENT * scale)).astype(int).tolist())
    tumour = _draw_tumour(rng, voxel=1 / scale, enhancing=enhancing)
    points = _deform(_grid(box, scale=scale), rng=rng, scale=scale)
    tissue, brain = _anatomy(_push(points, tumour=tumour), rng=rng, scale=scale)
    _add_tumour(tissue, points, tumour=tumour, rng=rng, scale=scale)
    image = _acquire(tissue, brain, rng=rng, scale=scale)
    label = np.zeros(box, dtype=np.uint8)
    for name, value in LABELS.items():
        label[brain & (tissue == _CODE[name])] = value
    slack = [int(rng.integers(0, free + 1)) // 2 + free // 4 for free in np.subtract(size, box).tolist()]
    place = tuple(slice(start, start + length) for start, length in zip(slack, box))
    image_out, label_out = np.zeros((4, *size), dtype=np.int16), np.zeros(size, dtype=np.uint8)
    image_out[:, *place], label_out[place] = image, label
    return image_out, label_out


def smooth_field(rng: Generator, shape: tuple[int, ...], *, spacing: float) -> np.ndarray:
    """A random field of zero mean and unit variance on `shape`: cubic B-splines on a lattice `spacing` voxels apart.

    The spline is separable, so a field costs three matrix products and no interpolation voxel by voxel.
    """
    weights = []
    for length in shape:
        knots = np.arange(-2, int(np.ceil(length / spacing)) + 2, dtype=np.float32)
        offset = np.abs(np.arange(length, dtype=np.float32)[:, None] / np.float32(spacing) - knots)  # (length, knots)
        near, far = 2 / 3 - offset**2 + offset**3 / 2, np.clip(2 - offset, 0, None) ** 3 / 6
        weights.append(np.where(offset < 1, near, far))
    field = rng.standard_normal([weight.shape[1] for weight in weights], dtype=np.float32)
    for weight in weights:  # each product contracts the first axis and appends the finished one
        field = np.tensordot(field, weight, axes=(0, 1))
    return (field - field.mean()) / field.std()


def _grid(box: tuple[int, ...], *, scale: float) -> np.ndarray:
    """Millimetre coordinates of the voxels, (3, X, Y, Z); the outline is not symmetric in z, its middle is."""
    axes = [(np.arange(length, dtype=np.float32) - (length - 1) / 2) / np.float32(scale) for length in box]
    axes[2] -= 5
    return np.stack(np.meshgrid(*axes, indexing="ij"))


def _deform(points: np.ndarray, *, rng: Generator, scale: float) -> np.ndarray:
    """A head of its own: another size and tilt, then smooth warps of 3 mm and 1 mm."""
    matrix = np.diag(rng.uniform(1.0, 1.1, 3)) + rng.normal(0, 0.025, (3, 3))
    points = np.tensordot(matrix.astype(np.float32), points, axes=1)
    for axis in range(3):
        for amplitude, wavelength in ((2.5, 45.0), (1.0, 16.0)):
            points[axis] += amplitude * smooth_field(rng, points.shape[1:], spacing=wavelength * scale)
    return points


def _draw_tumour(rng: Generator, *, voxel: float, enhancing: bool) -> Tumour:
    """Somewhere in the white matter of one hemisphere; no part is thinner than the voxels can show."""
    direction = rng.normal(size=3)
    direction *= rng.uniform(0.3, 1) ** (1 / 3) / np.linalg.norm(direction)
    centre = np.array([0.0, 0.0, 14.0]) + direction * np.array([38.0, 52.0, 26.0])
    centre[0] = np.copysign(max(abs(centre[0]), 16.0), centre[0])
    radius = max(rng.uniform(24, 42), 4 * voxel)
    core = max(radius * rng.uniform(0.4, 0.68), 2.5 * voxel)
    rim = max(core * rng.uniform(0.2, 0.5), 1.3 * voxel) if enhancing else 0.0
    return Tumour(centre=centre.astype(np.float32), radius=radius, core=core, rim=rim, push=rng.uniform(0.1, 0.35))


def _push(points: np.ndarray, *, tumour: Tumour) -> np.ndarray:
    """Where the tissue now at `points` came from: nearer to the tumour's centre."""
    away = points - tumour.centre[:, None, None, None]
    near = np.exp(-(away**2).sum(axis=0) / (1.3 * tumour.radius) ** 2)
    return points - np.float32(tumour.push) * near * away


def _anatomy(points: np.ndarray, *, rng: Generator, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """The tissue code of every voxel and the brain mask, both (X, Y, Z), before any tumour."""
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
    tissue = np.full(points.shape[1:], _CODE["white"], dtype=np.uint8)
    tissue[cortex < 4.2] = _CODE["grey"]
    tissue[cortex < 1.1] = _CODE["csf"]
    wide = rng.uniform(0.8, 1.35)  # ventricles widen with age
    ventricle = np.full(points.shape[1:], np.inf, dtype=np.float32)
    for name, centre, radii, paired in _INSIDE:
        folded = np.stack([np.abs(points[0]), points[1], points[2]]) if paired else points
        level = _level(folded, centre=centre, radii=radii) / (wide if name == "ventricle" else 1.0)
        tissue[level < 1] = _CODE[name]
        if name == "ventricle" and paired:
            ventricle = np.minimum(ventricle, level)
    _add_lesions(tissue, ventricle, rng=rng, scale=scale)
    sinus = (np.abs(points[0]) < 3) & (depth < 4) & (points[2] > 0)
    tissue[sinus] = _CODE["vessel"]
    return tissue, depth > 0


def _add_lesions(tissue: np.ndarray, ventricle: np.ndarray, *, rng: Generator, scale: float) -> None:
    """Chronic white-matter lesions of small vessels: caps around the ventricles and spots, many in some heads."""
    load = rng.uniform(0, 1) ** 2
    spots = smooth_field(rng, tissue.shape, spacing=max(4.5 * scale, 1.0)) + np.exp(-2 * (ventricle - 1))
    tissue[(tissue == _CODE["white"]) & (spots > 4.2 - 1.4 * load)] = _CODE["lesion"]


def _level(points: np.ndarray, *, centre: Vector, radii: Vector, lower: float | None = None) -> np.ndarray:
    """The distance from an ellipsoid's centre in units of its radius: 1 on the surface."""
    total = np.zeros(points.shape[1:], dtype=np.float32)
    for axis in range(3):
        offset = (points[axis] - np.float32(centre[axis])) / np.float32(radii[axis])
        if axis == 2 and lower is not None:
            offset = np.where(offset < 0, offset * np.float32(radii[2] / lower), offset)
        total += offset**2
    return np.sqrt(total)


def _add_tumour(tissue: np.ndarray, points: np.ndarray, *, tumour: Tumour, rng: Generator, scale: float) -> None:
    shape = tissue.shape
    distance = np.sqrt(((points - tumour.centre[:, None, None, None]) ** 2).sum(axis=0))
    lobes = smooth_field(rng, shape, spacing=0.55 * tumour.core * scale)
    fingers = smooth_field(rng, shape, spacing=0.4 * tumour.radius * scale)
    cells = smooth_field(rng, shape, spacing=max(4.0 * scale, 1.0))
    core = distance * (1 + 0.12 * np.clip(lobes, -2, 2)) + 0.3 * np.clip(cells, -2, 2)
    reach = distance * (1 + 0.13 * np.clip(fingers, -2, 2))
    # edema runs along white matter and comes to a halt in the cortex; the sulci within it are swollen shut
    reach = np.where(tissue == _CODE["grey"], reach * 1.2, reach)
    reach = np.where(tissue == _CODE["deep"], reach * 1.1, reach)
    reach += np.maximum(-np.sign(tumour.centre[0]) * points[0], 0)  # the other side is reached through the callosum
    tissue[(reach < tumour.radius) & (tissue != _CODE["ventricle"]) & (tissue != _CODE["vessel"])] = _CODE["edema"]
    tissue[core < tumour.core] = _CODE["necrosis"]
    thickness = tumour.rim * (1 + 0.45 * np.clip(fingers + 0.5 * cells, -1.6, 2))
    tissue[(core < tumour.core) & (core > tumour.core - thickness)] = _CODE["enhancing"]


def _acquire(tissue: np.ndarray, brain: np.ndarray, *, rng: Generator, scale: float) -> np.ndarray:
    """The four images (4, X, Y, Z) int16 of a tissue map, as four different acquisitions would show it."""
    from scipy import ndimage

    table = np.array(list(CONTRAST.values()), dtype=np.float32)  # (tissues, 4)
    table *= rng.normal(1, 0.035, table.shape).clip(0.92, 1.08).astype(np.float32)
    strength = rng.uniform(0.7, 1.0)  # of edema, from faint to full; the same on T2 and FLAIR
    white, edema = _CODE["white"], _CODE["edema"]
    table[edema] = table[white] + strength * (table[edema] - table[white])
    mottle = smooth_field(rng, tissue.shape, spacing=max(7 * scale, 1.0))
    grain = smooth_field(rng, tissue.shape, spacing=max(3 * scale, 1.0))
    texture = 1 + 0.03 * grain + np.where(tissue >= _CODE["necrosis"], 0.09, 0.0) * mottle
    visible = np.where(brain, tissue, _CODE["csf"])
    images = np.zeros((4, *tissue.shape), dtype=np.int16)
    for modality in range(4):
        signal = ndimage.gaussian_filter(table[visible, modality] * texture, 0.55)[brain]
        bias = 1 + rng.uniform(0.03, 0.07) * smooth_field(rng, tissue.shape, spacing=70 * scale)[brain]
        sigma, gain = rng.uniform(0.02, 0.04), np.exp(rng.uniform(np.log(150), np.log(1500)))
        noise = sigma * rng.standard_normal((2, signal.size), dtype=np.float32)
        magnitude = gain * bias * np.hypot(signal + noise[0], noise[1])
        images[modality][brain] = np.clip(np.rint(magnitude), 1, 32767)  # 0 is reserved for outside
    return images
