"""`SegmentationData`: the config and the questions that all sources of segmentation cases have in common."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from memsave.config import ConfigError, option
from memsave.config.schema import DataConfig
from memsave.data.units import UnitKeys
from memsave.data.volumes.layouts import MODALITIES, Case
from memsave.data.volumes.patients import check_unit, with_patients
from memsave.data.volumes.schemes import BRATS_2021, LabelScheme
from memsave.data.volumes.splits import fold, split_cases, split_from_file


@dataclass
class SegmentationData(UnitKeys, DataConfig):
    """What every source of segmentation cases has in common."""

    root: str | None = None
    """Folder of the cases, or of the cache for phantoms."""
    crop_size: list[int] = option([48, 48, 48], least=1, length=3)
    """Voxels of a training crop along each axis."""
    crops_per_case: int = option(1, least=1)
    """Crops per case and step; the crops of a case are one example with one loss."""
    foreground: float = option(1 / 3, least=0, most=1)
    """Fraction of the crops that are centred on tumour."""
    augmentation: str = option("light", choices=("light", "full"))
    """light: flips, scale and shift of intensities; full: also rotations, zoom, noise, blur and gamma."""
    spacing: list[float] | None = option(None, least=1e-3, length=3, example=(1, 1, 1))
    """Voxel size in millimetres to which volumes are resampled, as in [1,1,1]; null does not resample."""
    validation_fraction: float = option(0.2, least=0.001, most=0.999)
    """Fraction of the patients that are held out, with all of their scans."""
    folds: int | None = option(None, least=2)
    """Number of folds for cross-validation; holds out one fold instead of validation_fraction."""
    fold: int = option(0, least=0)
    """The fold that is held out, counted from 0."""
    split_file: str | None = None
    """A JSON or CSV file that lists the training cases and the held-out cases."""
    lesion_wise: bool = False
    """Also score each lesion, as BraTS 2023 does."""
    smallest_et: int = option(0, least=0)
    """Predicted enhancing regions with fewer voxels are removed."""
    split_seed: int = option(0, least=0)
    """Seed of the split into training and held-out cases."""
    unit: str | None = None
    """The patients: patient (as data.layout names them), a pattern of ids with one group, or a table case, patient."""
    workers: int = option(1, least=0)
    """Threads that load batches in advance; with 0, batches are loaded between the steps."""
    cache_bytes: int = option(4 * 2**30, least=0)
    """Bytes of preprocessed volumes that are kept in memory."""

    def validate(self) -> None:
        """Raise ConfigError for two rules of what is held out."""
        if self.folds is not None and not self.fold < self.folds:
            raise ConfigError(f"data.fold is {self.fold} of {self.folds} folds; give one from 0 to {self.folds - 1}")
        if self.folds is not None and self.split_file is not None:
            raise ConfigError("data.folds and data.split_file both say what is held out; give one of the two")
        if self.unit is not None:
            check_unit(self.unit)

    def describe_unit(self) -> str:
        """What privacy protects, for the statement of a run."""
        return "one patient: all scans of this patient, whose crops in a step have one loss"

    def find_cases(self, *, say: Callable[[str], None]) -> list[Case]:
        """The cases, in a fixed order; `say` receives lines of progress. Raises DataError."""
        raise NotImplementedError(f"{type(self).__name__} finds no cases")

    def patients(self, found: Sequence[Case]) -> list[Case]:
        """The cases with their patients by data.unit; without it, as they are. Raises DataError."""
        return list(found) if self.unit is None else with_patients(found, self.unit)

    def split(self, found: Sequence[Case]) -> tuple[list[Case], list[Case]]:
        """(training, held out): by a file, a fold, or a share of the cases."""
        if self.split_file is not None:
            return split_from_file(found, self.split_file)
        if self.folds is not None:
            return fold(found, folds=self.folds, number=self.fold, seed=self.split_seed)
        return split_cases(found, validation_fraction=self.validation_fraction, seed=self.split_seed)

    def input_modalities(self) -> tuple[str, ...]:
        """The modalities in the order of the network's input channels, without reading any file."""
        return MODALITIES

    def label_scheme(self) -> LabelScheme:
        """The meaning of the labels, without reading any file; its regions are the network's output channels."""
        return BRATS_2021

    def file_names(self) -> tuple[str, str | None]:
        """(layout, end of the mask's name) of new cases that a trained network is to segment."""
        return "brats2021", None
