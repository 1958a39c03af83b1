import nibabel
import numpy as np
import pytest

from memsave.data.volumes.layouts import MODALITIES, find_cases
from memsave.data.volumes.phantoms.generate import write_phantoms

SIZE = (24, 24, 20)


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory):
    """Four small phantoms for read-only tests; the last one has no enhancing tissue."""
    root = tmp_path_factory.mktemp("phantoms")
    return write_phantoms(root, cases=4, size=SIZE, seed=0, without_enhancing=0.25)


@pytest.fixture
def write_case(tmp_path):
    """Write a case; a keyword argument replaces the volume of a part, and None omits it."""

    def write(name="A", *, root=tmp_path, affines=None, suffix=".nii.gz", **parts):
        rng = np.random.default_rng(0)
        volumes = {part: rng.uniform(1, 9, (6, 5, 4)).astype(np.float32) for part in MODALITIES}
        volumes["seg"] = rng.choice(np.array([0, 1, 2, 4], dtype=np.uint8), (6, 5, 4))
        (root / name).mkdir(parents=True)
        for part, volume in {**volumes, **parts}.items():
            if volume is not None:
                affine = (affines or {}).get(part, np.eye(4))
                nibabel.save(nibabel.Nifti1Image(volume, affine), root / name / f"{name}_{part}{suffix}")
        return next(case for case in find_cases(root, labelled=False) if case.id == name)

    return write
