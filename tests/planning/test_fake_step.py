"""The batch and the noise of a planned private step."""

import numpy as np
import pytest
import torch

pytest.importorskip("monai")
pytest.importorskip("transformers")

from memsave.config.compose import compose, to_objects
from memsave.planning.fake_step import dummy_task, fake_step, largest_batch
from memsave.profiler import peak_on_fake
from memsave.tasks.definition import definition_of
from tests.support.tiny_configs import TINY_GPT2_DP, TINY_UNET

CPU = torch.device("cpu")


def config(*overrides):
    return to_objects(compose([*TINY_GPT2_DP, "trainer.batch_size=50", "trainer.micro_batch_size=null", *overrides]))


def test_a_private_batch_is_planned_as_large_as_it_becomes():
    """Its size is random: a plan for the expected size would be exceeded by every second batch."""
    planned = largest_batch(config("trainer.steps=100"))
    largest = np.random.default_rng(0).poisson(50, (2000, 100)).max(1)
    assert 70 < planned < 120
    assert (largest > planned).mean() <= 1e-3
    assert len(dummy_task(config("trainer.steps=100"), device=CPU).batch["input_ids"]) == planned
    assert largest_batch(config("trainer.steps=100000")) > planned
    assert largest_batch(config("privacy=none")) == 50


def test_truncated_batches_are_planned_with_their_limit():
    truncated = config("privacy.sampler=truncated_poisson", "privacy.largest_batch=60")
    assert largest_batch(truncated) == 60
    assert len(dummy_task(truncated, device=CPU).batch["input_ids"]) == 60


def test_the_calibration_of_a_private_unet_is_a_step_of_one_crop():
    """With the largest batch, the real step would take minutes."""
    private = [*TINY_UNET, "privacy=ghost", "privacy.noise_multiplier=1"]
    small = definition_of(to_objects(compose(private))).calibration_config()[0]
    assert largest_batch(small) == small.trainer.batch_size == 1


def test_a_micro_batch_is_planned_as_given():
    small = config("trainer.micro_batch_size=5")
    assert len(dummy_task(small, device=CPU).batch["input_ids"]) == 10  # two micro-batches


@pytest.mark.slow
def test_banded_noise_is_planned_with_its_copies_and_regenerated_noise_without():
    def live_bytes(*overrides):
        planned = config("trainer.micro_batch_size=2", *overrides)
        return peak_on_fake(lambda: fake_step(planned, device=CPU)).peak_bytes

    numbers = sum(p.numel() for p in fake_step(config(), device=CPU).model.parameters())
    cyclic = ["privacy.sampler=cyclic"]
    usual = live_bytes(*cyclic)
    banded = live_bytes("privacy.noise=banded", "privacy.bands=4", *cyclic)
    regenerated = live_bytes("privacy.noise=regenerated", "privacy.bands=4", *cyclic)
    assert banded - usual == pytest.approx(3 * 4 * numbers, rel=0.02)
    assert abs(regenerated - usual) <= 8 * numbers
