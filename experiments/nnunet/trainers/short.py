"""Both trainers with short epochs, which write what a training step takes to `measured.json`."""

import json
import os
from pathlib import Path

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from memsave.integrations.nnunet import nnUNetTrainerMemsave
from memsave.profiler.allocator import allocator_peak


class Short(nnUNetTrainer):
    """As many epochs and steps as the environment says."""

    def __init__(self, plans, configuration, fold, dataset_json, device=torch.device("cuda")):  # noqa: B008
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs = int(os.environ["SHORT_EPOCHS"])
        self.num_iterations_per_epoch = int(os.environ["SHORT_ITERATIONS"])
        self.num_val_iterations_per_epoch = max(1, self.num_iterations_per_epoch // 10)

    def on_train_end(self):
        """Measure one more step."""
        batch = next(self.dataloader_train)
        held = [*self.network.parameters(), *self.network.buffers()]
        held += [value for state in self.optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
        self.optimizer.zero_grad(set_to_none=True)
        above = allocator_peak(lambda: self.train_step(batch), device=self.device)
        times = [self.logger.get_value(f"epoch_{end}_timestamps", step=None) for end in ("start", "end")]
        seconds = [end - start for start, end in zip(*times, strict=True)]
        measured = {
            "patch_size": list(map(int, self.configuration_manager.patch_size)),
            "batch_size": self.batch_size,
            "parameters": sum(each.numel() for each in self.network.parameters()),
            "peak_bytes": sum(each.numel() * each.element_size() for each in held) + above,
            "epoch_seconds": seconds,
        }
        Path(self.output_folder, "measured.json").write_text(json.dumps(measured))
        super().on_train_end()


class nnUNetTrainerShort(Short):
    """nnU-Net's default."""


class nnUNetTrainerMemsaveShort(Short, nnUNetTrainerMemsave):
    """The reversible network."""
