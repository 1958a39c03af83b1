"""`data=phantom` and `data=mni_phantom`: generated cases in the BraTS 2021 layout."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from memsave.config import option, register
from memsave.data.volumes.config import SegmentationData
from memsave.data.volumes.layouts import Case


@register("data", "phantom")
@dataclass
class PhantomData(SegmentationData):
    """Generated cases in the BraTS 2021 layout, written once as NIfTI files and cached."""

    anatomy: ClassVar[str] = "drawn"
    """The anatomy for `memsave.data.volumes.phantoms.generate`."""
    kind: str = "phantom"
    cases: int = option(20, least=1)
    """Number of cases."""
    size: list[int] = option([96, 96, 80], least=1, length=3)
    """Voxels of a volume along each axis, 1 mm each; at most 240 x 240 x 155."""
    seed: int = option(0, least=0)
    """Seed of the cases."""

    def find_cases(self, *, say: Callable[[str], None]) -> list[Case]:
        """The cached cases; generates them first if the cache does not have them."""
        from memsave.data.volumes.phantoms.generate import ensure_phantoms

        x, y, z = self.size
        return ensure_phantoms(
            self.root, cases=self.cases, size=(x, y, z), seed=self.seed, anatomy=self.anatomy, progress=say
        )


@register("data", "mni_phantom")
@dataclass
class MniPhantomData(PhantomData):
    """The tumours of data=phantom in the anatomy of the MNI152 template (needs the extra mni)."""

    anatomy: ClassVar[str] = "mni152"
    kind: str = "mni_phantom"
    size: list[int] = option([240, 240, 155], least=1, length=3)
