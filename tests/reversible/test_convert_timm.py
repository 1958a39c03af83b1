"""`make_reversible` on models of timm."""

import pytest
import torch

pytest.importorskip("timm")

import timm

from memsave import make_reversible

pytestmark = pytest.mark.slow

MODELS = {
    "vit_tiny_patch16_224": (64, [("blocks", 12)]),
    "mixer_s32_224": (224, [("blocks", 8)]),
    "convnext_atto": (
        64,
        [("stages.0.blocks", 2), ("stages.1.blocks", 2), ("stages.2.blocks", 6), ("stages.3.blocks", 2)],
    ),
    "eva02_tiny_patch14_224": (56, [("blocks", 12)]),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_rows_are_found_and_train_as_stored(name):
    size, rows = MODELS[name]
    torch.manual_seed(0)
    options = {} if name in ("mixer_s32_224", "convnext_atto") else {"img_size": size}
    model = timm.create_model(name, num_classes=3, **options).double().train()
    images = torch.randn(2, 3, size, size, dtype=torch.float64)
    conversion = make_reversible(model, images)
    assert [(row.names[0].rpartition(".")[0], len(row.names)) for row in conversion.rows] == rows
    assert conversion.verify(images).gradient < 1e-9
    assert model(images).shape == (2, 3)
