"""Segmentation of lesions in volumes: the task behind `data=phantom` and `data=brats`.

The network gives one logit per region (WT, TC, ET overlap, so each is a yes or no of its own). The loss of an example
is the mean over its regions of soft Dice loss plus binary cross-entropy, in float32; whole held-out volumes are
segmented by a sliding window and scored by Dice and HD95 per region, on the grid on which they were read.
"""

import csv
import hashlib
import shlex
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from memsave.config.schema import BratsData, MniPhantomData, PhantomData, SegmentationData, TrainerConfig
from memsave.data.errors import DataError
from memsave.data.volumes.check import check_cases
from memsave.data.volumes.dataset import Item, TrainingCrops, Volumes, restore, train_loader
from memsave.data.volumes.layouts import Case, find_cases
from memsave.data.volumes.lesion_metrics import lesion_region_scores
from memsave.data.volumes.metrics import region_scores
from memsave.data.volumes.phantoms.generate import ensure_phantoms
from memsave.data.volumes.reader import labels_of, masks_of, regions
from memsave.data.volumes.schemes import LabelScheme
from memsave.data.volumes.splits import fold, split_cases, split_from_file
from memsave.data.volumes.transforms import resample
from memsave.progress import Progress
from memsave.tasks.segmentation.overlay import Picture, draw_overlay
from memsave.tasks.segmentation.unet_config import CONFIG, UNetConfig, modalities_of, scheme_of
from memsave.training.loop import autocast, evaluating
from memsave.training.task import Batch

WEIGHTS = "model.safetensors"
TABLE = "scores.csv"
PICTURES = 3  # cases on the overlay
SMOOTH = 1.0  # voxels: an empty region that is found empty has Dice 1, and its gradient is bounded
RESAMPLES = 2000  # of the bootstrap
PIECE = 4096  # bytes


class Segmentation:
    """Crops to train on, whole volumes to evaluate on; implements `memsave.training.task.Task`."""

    def __init__(
        self,
        data: SegmentationData,
        *,
        trainer: TrainerConfig,
        device: torch.device,
        progress: Progress | None = None,
    ):
        self.progress = progress or Progress()
        self.data, self.device = data, device
        self.batch_size, self.precision = trainer.batch_size, trainer.precision
        found = cases(data)
        train, held_out = split(found, data)
        self.left_out = len(found) - len(train) - len(held_out)
        self.crops = TrainingCrops(
            train,
            crop_size=data.crop_size,
            length=trainer.steps_for(len(train)) * trainer.batch_size,
            seed=trainer.seed,
            spacing=data.spacing,
            foreground=data.foreground,
            augmentation=data.augmentation,
            count=data.crops_per_case,
            cache_bytes=data.cache_bytes,
        )
        self.held_out = Volumes(held_out, spacing=data.spacing)
        self.scheme = self.held_out.scheme
        self.pictures: list[Picture] = []  # of the last evaluation
        self.scores: dict[str, dict[str, float]] = {}  # of the last evaluation, by case

    unit = "one patient: all that is drawn of one case in a step has one loss"
    goal = "dice"

    @property
    def size(self) -> int:
        """Training cases."""
        return len(self.crops.volumes)

    @property
    def fingerprint(self) -> str:
        """A digest of the training cases' names and files, masks included, and of how crops are drawn.

        A file counts by its size and by pieces of it, its end among them, where gzip has the checksum of the whole.
        """
        cases = [(case.id, [_pieces(path) for path in case.files]) for case in self.crops.volumes.cases]
        data, order = self.data, self.crops.volumes.cases[0].channels or ()  # of modalities that share a file
        drawn = (data.crop_size, data.crops_per_case, data.foreground, data.augmentation, data.spacing, *order)
        return hashlib.sha256(repr((cases, *map(str, drawn))).encode()).hexdigest()[:16]

    @property
    def counts(self) -> dict[str, Any]:
        """Cases that train, that are scored, and that are used for nothing (`test` of a split file)."""
        return {"examples": self.size, "held_out": len(self.held_out), "left_out": self.left_out}

    def told_counts(self) -> str:
        """The same in one line."""
        left_out = f", left out: {self.left_out} (test of data.split_file)" if self.left_out else ""
        return f"training cases: {self.size}, held-out cases: {len(self.held_out)}{left_out}"

    def gather(self, indices: Sequence[int], *, step: int) -> Batch:
        """The crops of each of these cases; for none, images (0, C, 1, 1, 1)."""
        if not indices:
            empty = torch.zeros(0, len(self.held_out.modalities), 1, 1, 1, device=self.device)
            return {"image": empty, "label": empty[:, :1], "id": []}
        crops = [self.crops.example(index, draw=step * self.size + index) for index in indices]
        tensors = {key: torch.stack([crop[key] for crop in crops]).to(self.device) for key in ("image", "label")}
        return {**tensors, "id": [crop["id"] for crop in crops]}

    def batches(self, *, start: int) -> Generator[Batch]:
        """Logical batches from number `start` on: image (B, C, D, H, W), label (B, 1, D, H, W), id.

        With K crops a case, which are one example, (B, K, C, D, H, W) and (B, K, 1, D, H, W).
        """
        loader = train_loader(self.crops, batch_size=self.batch_size, workers=self.data.workers, start=start)
        yield from map(self._placed, loader)  # which holds on to no batch, as a loop's variable would

    def _placed(self, batch: Batch) -> Batch:
        """On the device."""
        placed = {key: value.to(self.device) if isinstance(value, Tensor) else value for key, value in batch.items()}
        return laid_out(placed)

    def per_example_losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """(B,) losses: each of one case, over all of its crops."""
        return case_losses(model, batch, scheme=self.scheme)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """The mean over the held-out cases of Dice and HD95 (mm) of each region, and of Dice over the regions."""
        self.scores, self.pictures = {}, []
        lines = self.progress.lines(len(self.held_out), unit="held-out case")
        for number in range(len(self.held_out)):
            self._score(model, number)
            lines.advance(self.held_out.cases[number].id)
        names = next(iter(self.scores.values()))
        mean = {key: sum(score[key] for score in self.scores.values()) / len(self.scores) for key in names}
        return {"dice": sum(mean[f"dice_{name}"] for name in self.scheme.names) / len(self.scheme.names), **mean}

    def _score(self, model: nn.Module, number: int) -> None:
        """Segment a held-out case and note its scores."""
        volume = self.held_out[number]
        with autocast(model, self.precision):
            prediction = self.predict(model, volume)
        truth = regions(self.held_out.truth(number), scheme=self.scheme)
        known = {"spacing": volume["spacing"], "regions": self.scheme.names}
        scores = region_scores(prediction, truth, **known)
        if self.data.lesion_wise:
            scores |= lesion_region_scores(prediction, truth, **known)
        self.scores[volume["id"]] = scores
        if len(self.pictures) < PICTURES:
            self.pictures.append(picture(volume, truth, prediction, scores, self.held_out.modalities))

    def predict(self, model: nn.Module, volume: Item) -> Tensor:
        """Regions (R, X, Y, Z), boolean, of a volume of `Volumes`, on the case's own grid: those of its label file."""
        logits = predict(model, volume["image"].to(self.device), window=self.data.crop_size)
        found = restore(logits.float().cpu(), volume, threshold=0.0)
        found = without_small(found, self.scheme.names, smallest_et=self.data.smallest_et)
        return regions(labels_of(found, self.scheme), scheme=self.scheme)

    def show(self, folder: Path) -> list[Path]:
        """Draw cases of the last evaluation as `overlay.png`, truth beside prediction, and list all in `scores.csv`."""
        path, table = folder / "overlay.png", folder / TABLE
        draw_overlay(self.pictures, path)
        with table.open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["case", *next(iter(self.scores.values()))])
            rows.writerows([name, *(f"{value:.6g}" for value in row.values())] for name, row in self.scores.items())
        return [path, table]

    def release(self, model: nn.Module, folder: Path) -> None:
        """Write the weights as `model.safetensors`, and how they are used as `config.json`."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / WEIGHTS)
        UNetConfig.of(self.data, model=model, precision=self.precision).write(folder / CONFIG)

    def summary(self, scores: dict[str, float]) -> str:
        """Dice of each region, with the 95% interval of the mean where there are several cases."""
        each, several = [], len(self.scores) > 1
        for name in self.scheme.names:
            low, high = interval([row[f"dice_{name}"] for row in self.scores.values()])
            spread = f" ({low:.3f} to {high:.3f})" if several else ""
            each.append(f"{name.upper()} {scores[f'dice_{name}']:.3f}{spread}")
        note = "; in parentheses the 95% interval of the mean" if several else ""
        return f"Dice on {len(self.held_out)} held-out cases: {', '.join(each)}{note}"


def interval(values: Sequence[float], *, level: float = 0.95) -> tuple[float, float]:
    """The bootstrap interval of the mean of `values` (Efron, 1979: percentiles of resampled means), always the same."""
    drawn = np.random.default_rng(0).choice(np.asarray(values), size=(RESAMPLES, len(values)))
    low, high = np.quantile(drawn.mean(1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def without_small(masks: Tensor, names: Sequence[str], *, smallest_et: int) -> Tensor:
    """Masks (R, X, Y, Z) in which an enhancing region of fewer voxels than that is empty: it is often a false one."""
    masks = masks.clone()
    for name, mask in zip(names, masks, strict=True):
        if name == "et" and int(mask.sum()) < smallest_et:
            mask.zero_()
    return masks


def picture(
    volume: Item, truth: Tensor, prediction: Tensor, scores: dict[str, float], modalities: Sequence[str]
) -> Picture:
    """An item with masks (R, X, Y, Z) of its original grid, to be looked at: voxels as stored, turned, cropped."""
    orientation = volume["orientation"]
    spacing = orientation.reorder(volume["spacing"])
    step = [mm / new for mm, new in zip(spacing, volume["image_spacing"], strict=True)]
    image = resample(volume["image"], size=volume["cropped"], step=step)
    x, y, z = (slice(first, first + size) for first, size in zip(volume["start"], volume["cropped"]))
    true, found = (orientation.apply(mask)[:, x, y, z] for mask in (truth, prediction))
    return Picture(volume["id"], image, true, found, spacing, scores, modalities)


def case_losses(model: nn.Module, batch: Batch, *, scheme: LabelScheme) -> Tensor:
    """(B,) losses of image (B, C, D, H, W) and label (B, 1, D, H, W), or of K crops a case, with K in second place."""
    image, label = batch["image"], batch["label"]
    several = image.dim() == 6
    if several:
        image, label = image.flatten(0, 1), label.flatten(0, 1)
    logits, target = model(image), masks_of(label, scheme=scheme)
    losses = region_losses(logits, target) if isinstance(logits, Tensor) else supervised_losses(logits, target)
    return losses.view(len(batch["image"]), -1).mean(1) if several else losses


def dummy_batch(data: SegmentationData, *, count: int, device: torch.device) -> Batch:
    """A batch of the shapes that training has, with nothing in it."""
    crops = (count,) if data.crops_per_case == 1 else (count, data.crops_per_case)
    image = torch.zeros(*crops, channels(data)[0], *data.crop_size, device=device)
    return laid_out(
        {"image": image, "label": torch.zeros(*crops, 1, *data.crop_size, dtype=torch.uint8, device=device)}
    )


def laid_out(batch: Batch) -> Batch:
    """The batch with its images as the network wants them in memory: a whole volume has no room for a copy."""
    if batch["image"].dim() == 5:
        batch["image"] = batch["image"].contiguous(memory_format=torch.channels_last_3d)
    return batch


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
    """Logits (R, D, H, W) of a whole volume (C, D, H, W), by overlapping windows of the training size."""
    from monai.inferers import sliding_window_inference

    with evaluating(model):
        logits = sliding_window_inference(
            image[None], roi_size=tuple(window), sw_batch_size=2, predictor=model, overlap=overlap, mode="gaussian"
        )
    assert isinstance(logits, Tensor)
    return logits[0]


def cases(data: SegmentationData) -> list[Case]:
    """The cases that the config names; phantoms are made when they are not in the cache."""
    if isinstance(data, PhantomData):
        x, y, z = data.size
        anatomy = "mni152" if isinstance(data, MniPhantomData) else "drawn"
        return ensure_phantoms(
            data.root, cases=data.cases, size=(x, y, z), seed=data.seed, anatomy=anatomy, progress=Progress().say
        )
    assert isinstance(data, BratsData)
    known: dict[str, Any] = {"scheme": data.scheme, "modalities": data.modalities, "mask": data.mask}
    found = find_cases(str(data.root), data.layout, **known)
    if data.check != "none":
        faults = check_cases(found, images=data.check == "all", workers=max(1, data.workers))
        if len(faults) > 1:
            told = [f"{key}={_plain(value)}" for key, value in known.items() if value is not None]
            given = [f"root={data.root}", f"layout={data.layout}", *told]
            command = shlex.join(["python", "-m", "memsave.data.check", *given])
            raise DataError(f"{faults[0].removesuffix('.')}; {len(faults) - 1} more faults are listed by {command}.")
        if faults:
            raise DataError(faults[0])
    return found


def _plain(value: object) -> str:
    return f"[{','.join(value)}]" if isinstance(value, list) else str(value)


def split(found: Sequence[Case], data: SegmentationData) -> tuple[list[Case], list[Case]]:
    """(training, held out): by a file, a fold, or a share of the cases."""
    if data.split_file is not None:
        return split_from_file(found, data.split_file)
    if data.folds is not None:
        return fold(found, folds=data.folds, number=data.fold, seed=data.split_seed)
    return split_cases(found, validation_fraction=data.validation_fraction, seed=data.split_seed)


def channels(data: SegmentationData) -> tuple[int, int]:
    """(modalities, regions) of the data, without a look at it."""
    return len(modalities_of(data)), len(scheme_of(data).names)


def _pieces(path: Path) -> tuple[int, str]:
    """The size of a file, and a digest of a piece of its beginning, its middle and its end."""
    size, digest = path.stat().st_size, hashlib.sha256()
    with path.open("rb") as file:
        for place in (0, size // 2, max(0, size - PIECE)):
            file.seek(place)
            digest.update(file.read(PIECE))
    return size, digest.hexdigest()
