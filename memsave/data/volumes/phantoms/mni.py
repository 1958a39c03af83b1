"""Real anatomy: the grey and white matter of the MNI152 template, which the package nilearn contains.

The template is the average of 152 heads, registered nonlinearly at 1 mm and made symmetric (ICBM 2009a; Fonov et al.,
NeuroImage 2011). The rest is cerebrospinal fluid (CSF), whose fraction c is replaced by

    c^(gamma (1 + f/4)),    gamma ~ U(0.6, 1),    f a smooth random field,

so that heads differ in the width of sulci and ventricles. The deformation in `synthesis` makes heads asymmetric.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.random import Generator

from memsave.data.volumes.phantoms.synthesis import CODE, Anatomy, Head, add_lesions, smooth_field

MIDDLE = (98.0, 117.0, 82.5)  # the template's voxel at the origin of points
_VENTRICLES = ((90, 142, 90), (106, 142, 90))  # a voxel in the frontal horn of each lateral ventricle
_FAR = 30.0  # mm; larger distances from a ventricle have no effect


@dataclass(frozen=True)
class _Template:
    """Volumes (197, 233, 189) float32, x to the right and y to the front."""

    grey: np.ndarray  # fraction
    white: np.ndarray
    inside: np.ndarray  # 1 in the brain
    ventricle: np.ndarray  # distance in mm from a lateral ventricle, at most _FAR


def mni_head(points: np.ndarray, *, rng: Generator, scale: float) -> Head:
    """The head at points (3, X, Y, Z) in mm; ModuleNotFoundError if nilearn is not installed."""
    from scipy import ndimage

    template = _template()
    middle = np.array(MIDDLE, dtype=np.float32)
    voxels = points * np.array([-1, -1, 1], dtype=np.float32)[:, None, None, None] + middle[:, None, None, None]

    def sample(volume: np.ndarray) -> np.ndarray:
        return ndimage.map_coordinates(volume, voxels, order=1, output=np.float32)

    brain = sample(template.inside) > 0.5
    grey, white, far = sample(template.grey), sample(template.white), sample(template.ventricle)
    solid = grey + white
    csf = np.clip(1 - solid, 0, 1)
    width = rng.uniform(0.6, 1.0) * (1 + smooth_field(rng, brain.shape, spacing=max(9 * scale, 1.0)).clip(-2, 2) / 4)
    csf = csf**width
    shrunk = (1 - csf) / np.maximum(solid, 1e-3)
    mixture = np.stack([csf, grey * shrunk, white * shrunk])
    tissue = np.array([CODE["csf"], CODE["grey"], CODE["white"]], dtype=np.uint8)[mixture.argmax(axis=0)]
    tissue[(tissue == CODE["csf"]) & (far < 3)] = CODE["ventricle"]
    add_lesions(tissue, 1 + far / 8, rng=rng, scale=scale)
    plexus = (smooth_field(rng, brain.shape, spacing=max(3 * scale, 1.0)) > 1.3) & (points[1] > 5) & (points[2] < 20)
    tissue[(tissue == CODE["ventricle"]) & plexus] = CODE["vessel"]
    return Head(tissue, brain, mixture)


MNI152 = Anatomy(half_extent=(75.0, 94.0, 77.5), head=mni_head)


@lru_cache(maxsize=1)
def _template() -> _Template:
    from nilearn.datasets import load_mni152_gm_template, load_mni152_template, load_mni152_wm_template
    from scipy import ndimage

    inside, grey, white = (
        np.asarray(load(resolution=1).dataobj, dtype=np.float32)
        for load in (load_mni152_template, load_mni152_gm_template, load_mni152_wm_template)
    )
    spaces, _ = ndimage.label((inside > 0) & (grey + white < 0.5))
    ventricles = np.isin(spaces, [spaces[voxel] for voxel in _VENTRICLES])
    far = np.full(grey.shape, _FAR, dtype=np.float32)
    near = tuple(slice(max(0, int(v.min() - _FAR)), int(v.max() + _FAR)) for v in ventricles.nonzero())
    far[near] = ndimage.distance_transform_edt(~ventricles[near]).clip(max=_FAR)
    return _Template(grey, white, (inside > 0).astype(np.float32), far)
