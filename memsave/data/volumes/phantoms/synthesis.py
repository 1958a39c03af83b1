"""A synthetic head with a tumour: four MR modalities and a label map on one voxel grid.

A head is sampled at the voxels, in millimetres (x to the left, y to the back, z up, the origin in the middle of the
brain), through a random smooth deformation; `anatomy` and `mni` define the tissue at each point. A tumour is a pair of
warped spheres that displaces tissue (mass effect): the inner sphere is necrosis within an enhancing rim, the outer one
is edema, which excludes the ventricles and part of the cortex. An image is

    I_m = gain_m * bias_m * | blur(contrast_m[tissue]) + n1 + i n2 |,    n1, n2 ~ N(0, sigma_m)    (Rician noise)

inside the brain and exactly 0 outside, as after skull stripping. If a head has fractions of CSF, grey and white matter,
their contrasts are mixed. Chronic white-matter lesions are bright on FLAIR, ventricles on T2, vessels and choroid
plexus on T1ce, so no threshold on a single modality finds the tumour.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator

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
CODE = {tissue: code for code, tissue in enumerate(TISSUES)}
_MIXED = [CODE[tissue] for tissue in ("csf", "grey", "white")]
_SOFT = [*_MIXED, CODE["ventricle"]]
LABELS = {"necrosis": 1, "edema": 2, "enhancing": 4}


@dataclass(frozen=True)
class Head:
    """The tissue of a head without a tumour."""

    tissue: np.ndarray  # (X, Y, Z) uint8: CODE of the most frequent tissue
    brain: np.ndarray  # (X, Y, Z) bool
    mixture: np.ndarray | None = None  # (3, X, Y, Z) float32: fractions of CSF, grey and white matter


@dataclass(frozen=True)
class Anatomy:
    """A kind of head: `head(points, rng=..., scale=...)` returns the tissue at points (3, X, Y, Z) in mm."""

    half_extent: tuple[float, float, float]
    """The largest distances in mm of the deformed brain from the middle of the grid."""
    head: Callable[..., Head]


@dataclass(frozen=True)
class Tumour:
    """The random parameters of one tumour, in mm."""

    centre: np.ndarray
    radius: float  # of edema
    core: float  # of necrosis and rim
    rim: float  # thickness of the enhancing rim; 0 without enhancement
    push: float  # mass effect, as a fraction of the distance to the centre


def synthesise(
    size: tuple[int, int, int], *, anatomy: Anatomy, rng: Generator, enhancing: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """One head on a grid of `size` voxels: image (4, X, Y, Z) int16 and label (X, Y, Z) uint8.

    The head keeps its proportions and fills the grid, with at most one voxel per millimetre.
    """
    extent = 2 * np.array(anatomy.half_extent)
    scale = min(1.0, *(np.array(size) / extent))  # voxels per mm
    box = tuple(np.minimum(size, np.ceil(extent * scale)).astype(int).tolist())
    tumour = _draw_tumour(rng, voxel=1 / scale, enhancing=enhancing)
    points = _deform(_grid(box, scale=scale), rng=rng, scale=scale)
    head = anatomy.head(_push(points, tumour=tumour), rng=rng, scale=scale)
    _add_tumour(head.tissue, points, tumour=tumour, rng=rng, scale=scale)
    image = _acquire(head, rng=rng, scale=scale)
    label = np.zeros(box, dtype=np.uint8)
    for name, value in LABELS.items():
        label[head.brain & (head.tissue == CODE[name])] = value
    slack = [int(rng.integers(0, free + 1)) // 2 + free // 4 for free in np.subtract(size, box).tolist()]
    inside = tuple(slice(start, start + length) for start, length in zip(slack, box))
    image_out, label_out = np.zeros((4, *size), dtype=np.int16), np.zeros(size, dtype=np.uint8)
    image_out[:, *inside], label_out[inside] = image, label
    return image_out, label_out


def smooth_field(rng: Generator, shape: tuple[int, ...], *, spacing: float) -> np.ndarray:
    """A random field of zero mean and unit variance on `shape`: cubic B-splines on a lattice `spacing` voxels apart.

    The spline is separable, so a field takes three matrix products instead of an interpolation at each voxel.
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
    """Coordinates (3, X, Y, Z) of the voxels in mm; z is shifted because the brain's outline is not symmetric in z."""
    axes = [(np.arange(length, dtype=np.float32) - (length - 1) / 2) / np.float32(scale) for length in box]
    axes[2] -= 5
    return np.stack(np.meshgrid(*axes, indexing="ij"))


def _deform(points: np.ndarray, *, rng: Generator, scale: float) -> np.ndarray:
    """Deform the points of a head: random size and tilt, then smooth warps of 2.5 mm and 1 mm."""
    matrix = np.diag(rng.uniform(1.0, 1.1, 3)) + rng.normal(0, 0.025, (3, 3))
    points = np.tensordot(matrix.astype(np.float32), points, axes=1)
    for axis in range(3):
        for amplitude, wavelength in ((2.5, 45.0), (1.0, 16.0)):
            points[axis] += amplitude * smooth_field(rng, points.shape[1:], spacing=wavelength * scale)
    return points


def _draw_tumour(rng: Generator, *, voxel: float, enhancing: bool) -> Tumour:
    """Draw a tumour in the white matter of one hemisphere; no part is thinner than the voxels resolve."""
    direction = rng.normal(size=3)
    direction *= rng.uniform(0.3, 1) ** (1 / 3) / np.linalg.norm(direction)
    centre = np.array([0.0, 0.0, 14.0]) + direction * np.array([38.0, 52.0, 26.0])
    centre[0] = np.copysign(max(abs(centre[0]), 16.0), centre[0])
    radius = max(rng.uniform(24, 42), 4 * voxel)
    core = max(radius * rng.uniform(0.4, 0.68), 2.5 * voxel)
    rim = max(core * rng.uniform(0.2, 0.5), 1.3 * voxel) if enhancing else 0.0
    return Tumour(centre=centre.astype(np.float32), radius=radius, core=core, rim=rim, push=rng.uniform(0.1, 0.35))


def _push(points: np.ndarray, *, tumour: Tumour) -> np.ndarray:
    """The positions before the mass effect of the tissue now at `points`: closer to the tumour's centre."""
    away = points - tumour.centre[:, None, None, None]
    near = np.exp(-(away**2).sum(axis=0) / (1.3 * tumour.radius) ** 2)
    return points - np.float32(tumour.push) * near * away


def add_lesions(tissue: np.ndarray, ventricle: np.ndarray, *, rng: Generator, scale: float) -> None:
    """Add chronic white-matter lesions: caps around the ventricles, and spots, of which some heads have many."""
    load = rng.uniform(0, 1) ** 2
    spots = smooth_field(rng, tissue.shape, spacing=max(4.5 * scale, 1.0)) + np.exp(-2 * (ventricle - 1))
    tissue[(tissue == CODE["white"]) & (spots > 4.2 - 1.4 * load)] = CODE["lesion"]


def _add_tumour(tissue: np.ndarray, points: np.ndarray, *, tumour: Tumour, rng: Generator, scale: float) -> None:
    shape = tissue.shape
    distance = np.sqrt(((points - tumour.centre[:, None, None, None]) ** 2).sum(axis=0))
    lobes = smooth_field(rng, shape, spacing=0.55 * tumour.core * scale)
    fingers = smooth_field(rng, shape, spacing=0.4 * tumour.radius * scale)
    cells = smooth_field(rng, shape, spacing=max(4.0 * scale, 1.0))
    core = distance * (1 + 0.12 * np.clip(lobes, -2, 2)) + 0.3 * np.clip(cells, -2, 2)
    reach = distance * (1 + 0.13 * np.clip(fingers, -2, 2))
    # edema follows white matter and stops in the cortex; swelling closes the sulci within it
    reach = np.where(tissue == CODE["grey"], reach * 1.2, reach)
    reach = np.where(tissue == CODE["deep"], reach * 1.1, reach)
    reach += np.maximum(
        -np.sign(tumour.centre[0]) * points[0], 0
    )  # edema reaches the other hemisphere only through the corpus callosum
    tissue[(reach < tumour.radius) & (tissue != CODE["ventricle"]) & (tissue != CODE["vessel"])] = CODE["edema"]
    tissue[core < tumour.core] = CODE["necrosis"]
    thickness = tumour.rim * (1 + 0.45 * np.clip(fingers + 0.5 * cells, -1.6, 2))
    tissue[(core < tumour.core) & (core > tumour.core - thickness)] = CODE["enhancing"]


def _acquire(head: Head, *, rng: Generator, scale: float) -> np.ndarray:
    """The four images (4, X, Y, Z) int16 of a head, each with its own contrast, bias field, gain and noise."""
    from scipy import ndimage

    tissue, brain = head.tissue, head.brain
    table = np.array(list(CONTRAST.values()), dtype=np.float32)  # (tissues, 4)
    table *= rng.normal(1, 0.035, table.shape).clip(0.92, 1.08).astype(np.float32)
    strength = rng.uniform(0.7, 1.0)  # contrast of edema, the same on T2 and FLAIR
    white, edema = CODE["white"], CODE["edema"]
    table[edema] = table[white] + strength * (table[edema] - table[white])
    mottle = smooth_field(rng, tissue.shape, spacing=max(7 * scale, 1.0))
    grain = smooth_field(rng, tissue.shape, spacing=max(3 * scale, 1.0))
    texture = 1 + 0.03 * grain + np.where(tissue >= CODE["necrosis"], 0.09, 0.0) * mottle
    visible = np.where(brain, tissue, CODE["csf"])
    images = np.zeros((4, *tissue.shape), dtype=np.int16)
    for modality in range(4):
        signal = table[visible, modality]
        if head.mixture is not None:
            mixed = np.tensordot(table[_MIXED, modality], head.mixture, axes=1)
            signal = np.where(brain & np.isin(tissue, _SOFT), mixed, signal)
        signal = ndimage.gaussian_filter(signal * texture, 0.55)[brain]
        bias = 1 + rng.uniform(0.03, 0.07) * smooth_field(rng, tissue.shape, spacing=70 * scale)[brain]
        sigma, gain = rng.uniform(0.02, 0.04), np.exp(rng.uniform(np.log(150), np.log(1500)))
        noise = sigma * rng.standard_normal((2, signal.size), dtype=np.float32)
        magnitude = gain * bias * np.hypot(signal + noise[0], noise[1])
        images[modality][brain] = np.clip(np.rint(magnitude), 1, 32767)  # 0 is reserved for voxels outside the brain
    return images
