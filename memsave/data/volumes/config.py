"""`SegmentationData`: the config and the questions that all sources of segmentation cases have in common."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from memsave.config import ConfigError, option
from memsave.config.schema import DataConfig
from memsave.data.volumes.layouts import MODALITIES, Case
from memsave.data.volumes.schemes import BRATS_2021, LabelScheme
from memsave.data.volumes.splits import fold, split_cases, split_from_file


@dataclass
class SegmentationData(DataConfig):
    """What every source of segmentation cases has in common."""

    root: str | None = None
    """Folder of the cases; for phantoms, of their cache."""
    crop_size: list[int] = option([48, 48, 48], least=1, length=3)
    """Voxels of a training crop."""
    crops_per_case: int = option(1, least=1)
    """Crops of one case in a step; together they are one example, with one loss."""
    foreground: float = option(1 / 3, least=0, most=1)
    """Share of the crops that are centred on tumour."""
    augmentation: str = option("light", choices=("light", "full"))
    """light (flips, scale, shift) | full (rotations, zoom, noise, blur and gamma, too)."""
    spacing: list[float] | None = option(None, least=1e-3, length=3, example=(1, 1, 1))
    """Millimetres of a voxel that volumes are resampled to, as in [1,1,1]; null leaves them as they are."""
    validation_fraction: float = option(0.2, least=0.001, most=0.999)
    """Share of the patients that are held out, with all of their scans."""
    folds: int | None = option(None, least=2)
    """Given, fold number `fold` of so many is held out instead."""
    fold: int = option(0, least=0)
    split_file: str | None = None
    """Given, a JSON or CSV file says which cases train and which are held out."""
    lesion_wise: bool = False
    """Score lesion by lesion, too, as BraTS 2023 does."""
    smallest_et: int = option(0, least=0)
    """An enhancing region of fewer predicted voxels is taken for none."""
    split_seed: int = option(0, least=0)
    workers: int = option(1, least=0)
    """Threads that load ahead of training; 0 loads between the steps."""
    cache_bytes: int = option(4 * 2**30, least=0)
    """Preprocessed volumes kept in memory."""

    def validate(self) -> None:
        """Raise ConfigError for two rules of what is held out."""
        if self.folds is not None and not self.fold < self.folds:
            raise ConfigError(f"data.fold is {self.fold} of {self.folds} folds; give one from 0 to {self.folds - 1}")
        if self.folds is not None and self.split_file is not None:
            raise ConfigError("data.folds and data.split_file both say what is held out; give one of the two")

    def find_cases(self, *, say: Callable[[str], None]) -> list[Case]:
        """The cases, in a fixed order; `say` receives lines of progress. Raises DataError."""
        raise NotImplementedError(f"{type(self).__name__} finds no cases")

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
