"""The reversible U-Net inside nnU-Net v2: its preprocessing, folds, augmentation, deep supervision and inference.

    export nnUNet_extTrainer=$(python -m memsave.integrations.nnunet)
    MEMSAVE_BUDGET=8GiB nnUNetv2_train DATASET 3d_fullres 0 -tr nnUNetTrainerMemsave

Channels, strides and blocks come from nnU-Net's plans, and the patch from the budget: the largest whose training step
fits, up to the median image. Variables of the environment:

    MEMSAVE_BUDGET   bytes of the allocator for a training step, such as 8GiB; without it, the patch of nnU-Net's plans
    MEMSAVE_MEMORY   stored, checkpoint or reversible (the default); all three train the same function
"""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from torch import Tensor, distributed, nn

from memsave.models import ReversibleUNet3d
from memsave.profiler import format_bytes
from memsave.profiler.calibration import TrainingStep, calibrate
from memsave.profiler.planner import largest

TRAINERS = Path(__file__).parent / "nnunet_trainers"
"""For nnU-Net's variable nnUNet_extTrainer."""

CALIBRATED = 32**3
"""Voxels of the patch with which the planner is calibrated by a real step."""


class NNUNetReversible(ReversibleUNet3d):
    """A `ReversibleUNet3d` that returns the logits of coarser levels while `deep_supervision` is set, as nnU-Net asks.

    Its state has the same names in training and inference.
    """

    def __init__(self, in_channels: int, out_channels: int, **arguments: Any):
        super().__init__(in_channels, out_channels, deep_supervision=True, **arguments)
        self.deep_supervision = True

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Map (B, in_channels, D, H, W) to logits, or to a list of the logits of each level but the coarsest."""
        logits = self.level_logits(x, coarse=self.deep_supervision)
        return logits if self.deep_supervision else logits[0]


class nnUNetTrainerMemsave(nnUNetTrainer):
    """nnU-Net's trainer with a reversible network, and with the largest patch that fits into MEMSAVE_BUDGET.

    The patch is recorded in the plans.json of the model's folder, so that all folds, continued training, validation and
    prediction use the same.
    """

    @staticmethod
    def build_network_architecture(
        plans_manager: Any,
        configuration_manager: Any,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        """The network of nnU-Net's plans: their channels and strides, and one coupling for two of their convolutions.

        Raises ValueError for a 2D configuration.
        """
        plan = configuration_manager.network_arch_init_kwargs
        if len(plan["strides"][0]) != 3:
            raise ValueError("nnUNetTrainerMemsave trains 3D configurations, such as 3d_fullres")
        blocks = plan.get("n_blocks_per_stage") or [
            max(1, each // 2) for each in _for_each(plan["n_conv_per_stage"], len(plan["strides"]))
        ]
        network = NNUNetReversible(
            num_input_channels,
            num_output_channels,
            channels=plan["features_per_stage"],
            blocks=blocks,
            strides=plan["strides"][1:],
            memory=os.environ.get("MEMSAVE_MEMORY", "reversible"),
        )
        network.deep_supervision = enable_deep_supervision
        return network

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        """Return the logits of coarser levels, or not."""
        network: Any = self.network.module if self.is_ddp else self.network
        network.deep_supervision = enabled

    def _do_i_compile(self) -> bool:
        return False  # backward of a reversible level evaluates its blocks again

    def initialize(self) -> None:
        """Choose the patch, then build network, optimizer and loss as nnU-Net does.

        Raises ValueError if the budget is no size, fits nothing, or differs from the one of the model's folder.
        """
        if not self.was_initialized:
            chosen = [self._recorded() or self._planned()] if self.local_rank == 0 else [None]
            if self.is_ddp:
                distributed.broadcast_object_list(chosen)
            if chosen[0] is not None:
                found = chosen[0]
                own = self.plans_manager.plans["configurations"][self.configuration_name]
                for configuration in (own, self.configuration_manager.configuration):
                    configuration.update(patch_size=list(found["patch_size"]), memsave=found)
                self.print_to_log_file(found["found"])
        super().initialize()

    def _recorded(self) -> dict[str, Any] | None:
        """What the plans.json of the model's folder says, if a fold was trained there with a budget."""
        plans, budget = Path(self.output_folder_base) / "plans.json", os.environ.get("MEMSAVE_BUDGET")
        if not plans.is_file():
            return None
        found = json.loads(plans.read_text())["configurations"].get(self.configuration_name, {}).get("memsave")
        if (found or {}).get("budget") != budget and (found is None or budget is not None):
            planned = f"MEMSAVE_BUDGET={found['budget']}" if found else "no budget"
            raise ValueError(
                f"{self.output_folder_base} was trained with {planned}, not with MEMSAVE_BUDGET={budget}; give the "
                f"same for all its folds, or move that folder away"
            )
        return found

    def _planned(self) -> dict[str, Any] | None:
        """The largest patch whose training step fits into the budget; None without a budget."""
        budget = os.environ.get("MEMSAVE_BUDGET")
        if budget is None:
            return None
        shrink = torch.tensor(self.configuration_manager.pool_op_kernel_sizes).prod(dim=0).tolist()
        patches = patches_up_to(self.configuration_manager.median_image_size_in_voxels, multiples=shrink)
        examples = self.configuration_manager.batch_size
        if self.is_ddp:
            examples = -(-examples // distributed.get_world_size())

        def step_at(number: int) -> TrainingStep:
            return self._step(patches[number - 1], examples)

        self.print_to_log_file(f"memsave: looking for the largest patch whose training step fits into {budget}")
        before = list(map(int, self.configuration_manager.patch_size))

        def last(voxels: int) -> int:
            """The number of the largest patch of at most so many voxels; 1 if there is none."""
            return max(1, sum(math.prod(each) <= voxels for each in patches))

        result = largest(
            step_at,
            budget=budget,
            low=1,
            high=len(patches),
            start=last(math.prod(before)),
            power=3,
            calibration=calibrate(lambda: step_at(last(CALIBRATED)), device=self.device),
        )
        if result.size is None:
            raise ValueError(
                f"MEMSAVE_BUDGET={budget}: the smallest patch, {patches[0]} with {examples} per batch, needs "
                f"{format_bytes(result.need.total)}; raise the budget, or lower batch_size in nnU-Net's plans"
            )
        patch = patches[result.size - 1]
        return {
            "budget": budget,
            "patch_size": patch,
            "predicted_bytes": result.need.total,
            "found": (
                f"memsave: patches of {patch} with {examples} per batch (nnU-Net's plans: {before}); a step takes "
                f"{format_bytes(result.need.total)} of {budget}, predicted"
            ),
        }

    def _step(self, patch: list[int], examples: int) -> TrainingStep:
        """A training step like nnU-Net's own, without the scaling of the loss."""
        inputs = determine_num_input_channels(self.plans_manager, self.configuration_manager, self.dataset_json)
        heads = self.label_manager.num_segmentation_heads
        arguments = (self.plans_manager, self.configuration_manager, inputs, heads, self.enable_deep_supervision)
        with self.device:  # `.to(device)` fails on fake tensors
            network = self.build_network_architecture(*arguments)
        loss = self._build_loss()
        for part in loss.modules():
            if hasattr(part, "ignore_label"):
                part.ignore_label = None  # it would read how many voxels are left
        trainer: Any = self
        trainer.network = network
        try:
            optimizer, _ = self.configure_optimizers()
        finally:
            trainer.network = None
        volumes = torch.empty(examples, inputs, *patch, device=self.device).normal_()
        targets = self._targets(patch, examples)

        def run() -> None:
            with torch.autocast(self.device.type, enabled=self.device.type == "cuda"):
                value = loss(network(volumes), targets)
            value.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 12)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return TrainingStep(network, run, optimizer)

    def _targets(self, patch: list[int], examples: int) -> Any:
        """Labels, or masks of regions, of a batch; for each scale under deep supervision."""
        regions = self.label_manager.has_regions
        channels = len(self.label_manager.foreground_regions) + self.label_manager.has_ignore_label if regions else 1
        dtype = torch.bool if regions else torch.int16
        scales = self._get_deep_supervision_scales() or [[1.0] * 3]
        sizes = [[round(side * scale) for side, scale in zip(patch, each, strict=True)] for each in scales]
        targets = [torch.zeros(examples, channels, *size, dtype=dtype, device=self.device) for size in sizes]
        return targets if self.enable_deep_supervision else targets[0]


def patches_up_to(image: Sequence[float], *, multiples: Sequence[int]) -> list[list[int]]:
    """Patches of growing size, each side a multiple, up to the size that holds the image.

    The side that is the smallest part of the image's grows first, so that patches have about its shape.
    """
    most = [-(-int(side) // each) * each for side, each in zip(image, multiples, strict=True)]
    patch = [int(each) for each in multiples]
    patches = [list(patch)]
    while patch != most:
        growing = [axis for axis in range(len(patch)) if patch[axis] < most[axis]]
        axis = min(growing, key=lambda axis: patch[axis] / most[axis])
        patch[axis] += multiples[axis]
        patches.append(list(patch))
    return patches


def _for_each(number: int | Sequence[int], count: int) -> list[int]:
    return [number] * count if isinstance(number, int) else list(number)


if __name__ == "__main__":
    print(TRAINERS)
