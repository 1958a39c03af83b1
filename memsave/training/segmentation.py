"""Brain-tumour segmentation: the task behind `data=phantom` and `data=brats`.

The network gives one logit per region (WT, TC, ET overlap, so each is a yes or no of its own). The loss of an example
is the mean over its regions of soft Dice loss plus binary cross-entropy, in float32; whole held-out volumes are
segmented by a sliding window and scored by Dice and HD95 per region.
"""

import hashlib
from collections.abc import Generator, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from memsave.config import BratsData, PhantomData, SegmentationData, TrainerConfig
from memsave.data.brats import MODALITIES, REGIONS, Case, find_cases, regions, split_cases
from memsave.data.phantom import ensure_phantoms
from memsave.data.scores import region_scores
from memsave.data.segmentation import TrainingCrops, Volumes, train_loader
from memsave.training.loop import autocast, evaluating
from memsave.training.overlay import Picture, draw_overlay
from memsave.training.task import Batch

IN_CHANNELS, OUT_CHANNELS = len(MODALITIES), len(REGIONS)
WEIGHTS = "model.safetensors"
PICTURES = 3  # cases on the overlay
SMOOTH = 1.0  # voxels: an empty region that is found empty has Dice 1, and its gradient is bounded


class Segmentation:
    """Crops to train on, whole volumes to evaluate on; implements `memsave.training.task.Task`."""

    def __init__(self, data: SegmentationData, *, trainer: TrainerConfig, device: torch.device):
        self.device = device
        self.batch_size = trainer.batch_size
        self.precision = trainer.precision
        self.workers = data.workers
        self.crop_size = data.crop_size
        train, held_out = split_cases(cases(data), validation_fraction=data.validation_fraction, seed=data.split_seed)
        self.crops = TrainingCrops(
            train,
            crop_size=data.crop_size,
            length=trainer.steps * trainer.batch_size,
            seed=trainer.seed,
            cache_bytes=data.cache_bytes,
        )
        self.held_out = Volumes(held_out)
        self.pictures: list[Picture] = []  # of the last evaluation

    unit = "one patient: all that is drawn of one case in a step has one loss"
    goal = "dice"

    @property
    def size(self) -> int:
        """Training cases."""
        return len(self.crops.volumes)

    @property
    def fingerprint(self) -> str:
        """A digest of the training cases' names and files' sizes, and of the crops' size."""
        cases = [(case.id, [path.stat().st_size for path in case.images]) for case in self.crops.volumes.cases]
        return hashlib.sha256(repr((cases, list(self.crop_size))).encode()).hexdigest()[:16]

    def gather(self, indices: Sequence[int], *, step: int) -> Batch:
        """A crop of each of these cases; for none, images (0, 4, 1, 1, 1)."""
        if not indices:
            empty = torch.zeros(0, IN_CHANNELS, 1, 1, 1, device=self.device)
            return {"image": empty, "label": empty[:, :1], "id": []}
        crops = [self.crops.crop(index, draw=step * self.size + index) for index in indices]
        tensors = {key: torch.stack([crop[key] for crop in crops]).to(self.device) for key in ("image", "label")}
        return {**tensors, "id": [crop["id"] for crop in crops]}

    def batches(self, *, start: int) -> Generator[Batch]:
        """Logical batches from number `start` on: image (B, 4, D, H, W), label (B, 1, D, H, W), id."""
        for batch in train_loader(self.crops, batch_size=self.batch_size, workers=self.workers, start=start):
            yield {key: value.to(self.device) if isinstance(value, Tensor) else value for key, value in batch.items()}

    def per_example_losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """(B,) losses of image (B, 4, D, H, W) against label (B, 1, D, H, W)."""
        logits, target = model(batch["image"]), regions(batch["label"])
        return region_losses(logits, target) if isinstance(logits, Tensor) else supervised_losses(logits, target)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """The mean over the held-out cases of Dice and HD95 (mm) of each region, and of Dice over the regions."""
        scores, self.pictures = [], []
        for number in range(len(self.held_out)):
            volume = self.held_out[number]
            truth = regions(volume["label"])
            with autocast(model, self.precision):
                prediction = predict(model, volume["image"].to(self.device), window=self.crop_size).cpu()
            scores.append(region_scores(prediction, truth, spacing=volume["spacing"]))
            if len(self.pictures) < PICTURES:
                image, spacing = volume["image"], volume["spacing"]
                self.pictures.append(Picture(volume["id"], image, truth, prediction, spacing, scores[-1]))
        mean = {key: sum(score[key] for score in scores) / len(scores) for key in scores[0]}
        return {"dice": sum(mean[f"dice_{name}"] for name in REGIONS) / len(REGIONS), **mean}

    def show(self, folder: Path) -> list[Path]:
        """Draw cases of the last evaluation, truth beside prediction, as `overlay.png`."""
        path = folder / "overlay.png"
        draw_overlay(self.pictures, path)
        return [path]

    def release(self, model: nn.Module, folder: Path) -> None:
        """Write the weights as `model.safetensors`."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / WEIGHTS)

    def summary(self, scores: dict[str, float]) -> str:
        """Dice of each region."""
        each = ", ".join(f"{name.upper()} {scores[f'dice_{name}']:.3f}" for name in REGIONS)
        return f"Dice on {len(self.held_out)} held-out cases: {each}"


def region_losses(logits: Tensor, target: Tensor) -> Tensor:
    """Soft Dice loss plus binary cross-entropy, one per example, in float32: (B, 3, D, H, W) twice to (B,).

    Dice = (2 sum(p t) + s) / (sum(p) + sum(t) + s) for each example and region (Milletari et al., "V-Net", 2016).
    """
    logits, target = logits.float().flatten(2), target.float().flatten(2)  # (B, 3, V)
    probability = logits.sigmoid()
    overlap = (probability * target).sum(2)
    dice = (2 * overlap + SMOOTH) / (probability.sum(2) + target.sum(2) + SMOOTH)  # (B, 3)
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean(2)  # (B, 3)
    return (1 - dice + entropy).mean(1)


def supervised_losses(levels: Sequence[Tensor], target: Tensor) -> Tensor:
    """`region_losses` of logits at several resolutions, finest first, averaged with weights 1, 1/2, 1/4, ...: (B,).

    A coarser target is the nearest voxel of the finest one (Isensee et al., "nnU-Net", 2021).
    """
    total = target.new_zeros(len(target), dtype=torch.float32)
    for number, logits in enumerate(levels):
        nearest = F.interpolate(target.float(), size=logits.shape[2:], mode="nearest")
        total = total + 0.5**number * region_losses(logits, nearest)
    return total / sum(0.5**number for number in range(len(levels)))


def predict(model: nn.Module, image: Tensor, *, window: Sequence[int], overlap: float = 0.5) -> Tensor:
    """Regions (3, D, H, W), boolean, of a whole volume (4, D, H, W), by overlapping windows of the training size."""
    from monai.inferers import sliding_window_inference

    with evaluating(model):
        logits = sliding_window_inference(
            image[None], roi_size=tuple(window), sw_batch_size=2, predictor=model, overlap=overlap, mode="gaussian"
        )
    assert isinstance(logits, Tensor)
    return logits[0] > 0


def cases(data: SegmentationData) -> list[Case]:
    """The cases that the config names; phantoms are made when they are not in the cache."""
    if isinstance(data, PhantomData):
        x, y, z = data.size
        return ensure_phantoms(data.root, cases=data.cases, size=(x, y, z), seed=data.seed)
    assert isinstance(data, BratsData)
    return find_cases(str(data.root))
