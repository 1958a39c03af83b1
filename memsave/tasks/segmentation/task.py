"""Segmentation of lesions in volumes: the task of `data=phantom` and `data=brats`.

The network returns one logit per region, because the regions WT, TC and ET overlap. The loss of an example is the mean
over its regions of soft Dice loss plus binary cross-entropy, in float32. Whole held-out volumes are segmented by a
sliding window and scored by Dice and HD95 per region, on their original grid.
"""

import csv
import hashlib
from collections.abc import Sequence
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from memsave.config.schema import TrainerConfig
from memsave.data.fingerprint import fingerprint_of
from memsave.data.loader import Index
from memsave.data.volumes.config import SegmentationData
from memsave.data.volumes.dataset import Item, TrainingCrops, Volumes, restore
from memsave.data.volumes.lesion_metrics import lesion_region_scores
from memsave.data.volumes.metrics import region_scores
from memsave.data.volumes.reader import labels_of, regions
from memsave.data.volumes.transforms import resample
from memsave.processes import map_shares, received, share
from memsave.progress import Progress
from memsave.tasks.segmentation.inference import predict, without_small
from memsave.tasks.segmentation.losses import case_losses
from memsave.tasks.segmentation.overlay import Picture, draw_overlay
from memsave.tasks.segmentation.unet_config import CONFIG, UNetConfig
from memsave.training.loop import autocast
from memsave.training.task import Batch, placed

WEIGHTS = "model.safetensors"
TABLE = "scores.csv"
PICTURES = 3  # cases in the overlay
RESAMPLES = 2000  # of the bootstrap
CHUNK_BYTES = 4096
ONE_PATIENT = "one patient: all crops of one case in a step have one loss"
ONE_SCAN = "one scan, of which a patient may have several (data.unit=patient protects patients)"
BLOCK = 4  # voxels of an edge of the blocks in a canary's mask


class Segmentation:
    """Training crops and held-out volumes; implements `memsave.training.task.Task`."""

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
        self.precision = trainer.precision
        found = data.patients(data.find_cases(say=self.progress.say))
        self.cases = found
        train, held_out = data.split(found)
        self.left_out = len(found) - len(train) - len(held_out)
        self.crops = TrainingCrops(
            train,
            crop_size=data.crop_size,
            seed=trainer.seed,
            spacing=data.spacing,
            foreground=data.foreground,
            augmentation=data.augmentation,
            count=data.crops_per_case,
            cache_bytes=data.cache_bytes,
        )
        self.held_out = Volumes(held_out, spacing=data.spacing)
        self.scheme = self.held_out.scheme
        self.pictures: list[Picture] = []  # of the last evaluation; on rank 0
        self.scores: dict[str, dict[str, float]] = {}  # of the last evaluation, by case
        self.canaries = self._canary_seed = 0
        patients = len(set(self.record_units))
        self.unit = ONE_PATIENT if patients == len(train) else ONE_SCAN

    goal = "dice"

    @property
    def size(self) -> int:
        """Number of training cases, and of the canaries of an audit."""
        return len(self.crops.volumes) + self.canaries

    @property
    def record_units(self) -> list[str]:
        """The patient of each training case."""
        return [case.patient or case.id for case in self.crops.volumes.cases]

    @property
    def fingerprint(self) -> str:
        """A digest of the names and files of the training cases, masks included, and of the settings of crops.

        Of each file it includes the size and some chunks, one of them at the end, where gzip stores its checksum.
        """
        cases = [(case.id, [_file_digest(path) for path in case.files]) for case in self.crops.volumes.cases]
        data, order = self.data, self.crops.volumes.cases[0].channels or ()  # of modalities in one file
        drawn = (data.crop_size, data.crops_per_case, data.foreground, data.augmentation, data.spacing, *order)
        return hashlib.sha256(repr((cases, *map(str, drawn))).encode()).hexdigest()[:16]

    @property
    def data_fingerprint(self) -> str:
        """A digest of the names and masks of all cases, held-out ones included.

        It is the same for every fold, crop and choice of modalities, because these train on the same patients.
        """
        return fingerprint_of((case.id, case.label and _file_digest(case.label)) for case in self.cases)

    @property
    def counts(self) -> dict[str, Any]:
        """Numbers of training cases, held-out cases, and unused cases (`test` of a split file)."""
        return {"examples": len(self.crops.volumes), "held_out": len(self.held_out), "left_out": self.left_out}

    def describe_counts(self) -> str:
        """The counts in one line."""
        left_out = f", left out: {self.left_out} (test of data.split_file)" if self.left_out else ""
        return f"training cases: {self.size}, held-out cases: {len(self.held_out)}{left_out}"

    def load(self, indices: Sequence[Index]) -> Batch:
        """Crops of these cases on the CPU: image (B, C, D, H, W), label (B, 1, D, H, W), id. Thread-safe.

        With K crops per case: image (B, K, C, D, H, W), label (B, K, 1, D, H, W). No indices: image (0, C, 1, 1, 1).
        """
        if not indices:
            empty = torch.zeros(0, len(self.held_out.modalities), 1, 1, 1)
            return {"image": empty, "label": empty[:, :1], "id": []}
        crops = [self._example(each) for each in indices]
        tensors = {key: torch.stack([crop[key] for crop in crops]) for key in ("image", "label")}
        return {**tensors, "id": [crop["id"] for crop in crops]}

    def _example(self, index: Index) -> Item:
        """The crops of a case, or those of a canary: a case whose mask is random blocks that belong to the canary."""
        cases = len(self.crops.volumes)
        crops = self.crops.example(index.example % cases, draw=index.draw // self.size)
        if index.example < cases:
            return crops
        label, values = crops["label"], torch.tensor(self.scheme.values, dtype=torch.uint8)
        generator = torch.Generator().manual_seed(self._canary_seed + index.example)
        blocks = values[
            torch.randint(len(values), (*[-(-size // BLOCK) for size in label.shape[-3:]],), generator=generator)
        ]
        for dim in range(3):
            blocks = blocks.repeat_interleave(BLOCK, dim)
        depth, height, width = label.shape[-3:]
        return {**crops, "label": blocks[:depth, :height, :width].expand_as(label).clone()}

    def add_canaries(self, count: int, *, seed: int) -> None:
        """Append canaries: the cases again, each with a random mask."""
        self.canaries, self._canary_seed = count, seed

    def place(self, batch: Batch) -> Batch:
        """The batch on the device, in the network's memory format."""
        return channels_last(placed(batch, self.device))

    def per_example_losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """(B,) losses, one per case over all of its crops."""
        return case_losses(model, batch, scheme=self.scheme)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Means over the held-out cases: Dice and HD95 (mm) of each region, and Dice averaged over the regions.

        The processes of a group share the cases. All of them get the scores of every case, rank 0 gets the pictures.
        """
        self.scores, self.pictures = {}, []
        numbers = range(len(self.held_out))
        lines = self.progress.lines(len(share(numbers)), unit="held-out case")
        own: list[tuple[int, Picture]] = []

        def score(number: int) -> tuple[str, dict[str, float]]:
            name, scores, drawn = self._score(model, number)
            own.extend([(number, drawn)] if drawn else [])
            lines.advance(name)
            return name, scores

        self.scores = dict(map_shares(score, numbers))
        pictures = sorted(chain.from_iterable(received(own)), key=itemgetter(0))
        self.pictures = [each for _, each in pictures]
        names = next(iter(self.scores.values()))
        mean = {key: sum(score[key] for score in self.scores.values()) / len(self.scores) for key in names}
        return {"dice": sum(mean[f"dice_{name}"] for name in self.scheme.names) / len(self.scheme.names), **mean}

    def _score(self, model: nn.Module, number: int) -> tuple[str, dict[str, float], Picture | None]:
        """Segment a held-out case: its id, its scores, and a picture of the first ones."""
        volume = self.held_out[number]
        with autocast(model, self.precision):
            prediction = self.predict(model, volume)
        truth = regions(self.held_out.truth(number), scheme=self.scheme)
        kwargs = {"spacing": volume["spacing"], "regions": self.scheme.names}
        scores = region_scores(prediction, truth, **kwargs)
        if self.data.lesion_wise:
            scores |= lesion_region_scores(prediction, truth, **kwargs)
        drawn = picture(volume, truth, prediction, scores, self.held_out.modalities) if number < PICTURES else None
        return volume["id"], scores, drawn

    def predict(self, model: nn.Module, volume: Item) -> Tensor:
        """Boolean regions (R, X, Y, Z) of a volume of `Volumes`, on the original grid of the case."""
        logits = predict(model, volume["image"].to(self.device), window=self.data.crop_size)
        found = restore(logits.float().cpu(), volume, threshold=0.0)
        found = without_small(found, self.scheme.names, smallest_et=self.data.smallest_et)
        return regions(labels_of(found, self.scheme), scheme=self.scheme)

    def show(self, folder: Path) -> list[Path]:
        """Write `overlay.png` with some cases of the last evaluation, and `scores.csv` with all of them; on rank 0."""
        path, table = folder / "overlay.png", folder / TABLE
        draw_overlay(self.pictures, path)
        with table.open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["case", *next(iter(self.scores.values()))])
            rows.writerows([name, *(f"{value:.6g}" for value in row.values())] for name, row in self.scores.items())
        return [path, table]

    def release(self, model: nn.Module, folder: Path) -> None:
        """Write the weights as `model.safetensors` and the `UNetConfig` as `config.json`."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / WEIGHTS)
        UNetConfig.of(self.data, model=model, precision=self.precision).write(folder / CONFIG)

    def summary(self, scores: dict[str, float]) -> str:
        """Dice of each region in one line, with the 95% interval of the mean for several cases."""
        each, several = [], len(self.scores) > 1
        for name in self.scheme.names:
            low, high = interval([row[f"dice_{name}"] for row in self.scores.values()])
            bounds = f" ({low:.3f} to {high:.3f})" if several else ""
            each.append(f"{name.upper()} {scores[f'dice_{name}']:.3f}{bounds}")
        note = "; in parentheses the 95% interval of the mean" if several else ""
        return f"Dice on {len(self.held_out)} held-out cases: {', '.join(each)}{note}"


def interval(values: Sequence[float], *, level: float = 0.95) -> tuple[float, float]:
    """The bootstrap interval of the mean (Efron, 1979: percentiles of resampled means), with a fixed seed."""
    drawn = np.random.default_rng(0).choice(np.asarray(values), size=(RESAMPLES, len(values)))
    low, high = np.quantile(drawn.mean(1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def picture(
    volume: Item, truth: Tensor, prediction: Tensor, scores: dict[str, float], modalities: Sequence[str]
) -> Picture:
    """A picture of an item with masks (R, X, Y, Z) on its original grid: stored voxels, reoriented and cropped."""
    orientation = volume["orientation"]
    spacing = orientation.reorder(volume["spacing"])
    step = [mm / new for mm, new in zip(spacing, volume["image_spacing"], strict=True)]
    image = resample(volume["image"], size=volume["cropped"], step=step)
    x, y, z = (slice(first, first + size) for first, size in zip(volume["start"], volume["cropped"]))
    true, found = (orientation.apply(mask)[:, x, y, z] for mask in (truth, prediction))
    return Picture(volume["id"], image, true, found, spacing, scores, modalities)


def dummy_batch(data: SegmentationData, *, count: int, device: torch.device) -> Batch:
    """A batch of zeros with the shapes of training batches."""
    crops = (count,) if data.crops_per_case == 1 else (count, data.crops_per_case)
    image = torch.zeros(*crops, len(data.input_modalities()), *data.crop_size, device=device)
    label = torch.zeros(*crops, 1, *data.crop_size, dtype=torch.uint8, device=device)
    return channels_last({"image": image, "label": label})


def channels_last(batch: Batch) -> Batch:
    """The batch with its images in the memory format of the network, which then need not copy them."""
    if batch["image"].dim() == 5:
        batch["image"] = batch["image"].contiguous(memory_format=torch.channels_last_3d)
    return batch


def _file_digest(path: Path) -> tuple[int, str]:
    """(size of the file, digest of chunks at its beginning, middle and end)."""
    size, digest = path.stat().st_size, hashlib.sha256()
    with path.open("rb") as file:
        for offset in (0, size // 2, max(0, size - CHUNK_BYTES)):
            file.seek(offset)
            digest.update(file.read(CHUNK_BYTES))
    return size, digest.hexdigest()
