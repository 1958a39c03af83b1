"""Models of transformers and MONAI made reversible in place."""

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("monai")

import transformers
from monai.networks.nets import BasicUNet, SegResNet

from memsave.ghost import GhostClipper, verify
from memsave.reversible import make_reversible
from tests.ghost.test_transformers import VOCABULARY, WIDE, gpt2, in_float64, llama
from tests.models.test_encoder_decoder import t5

SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [2, 4], "num_heads": [2, 2], "window_size": 4}
VIT = {"image_size": 16, "patch_size": 8, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}


def ids(**more):
    generator = torch.Generator().manual_seed(0)
    return {"input_ids": torch.randint(1, VOCABULARY, (3, 6), generator=generator), **more}


def images(side):
    generator = torch.Generator().manual_seed(0)
    return {"pixel_values": torch.randn(2, 3, side, side, generator=generator, dtype=torch.float64)}


def volume():
    return {"x": torch.randn(2, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)}


def bert():
    return transformers.BertForSequenceClassification(transformers.BertConfig(**WIDE))


def vit():
    return transformers.ViTForImageClassification(transformers.ViTConfig(**VIT, intermediate_size=24))


def resnet():
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [3, 3]}
    return transformers.ResNetForImageClassification(transformers.ResNetConfig(**sizes))


MODELS = {
    "gpt2": (gpt2, ids(use_cache=False), [("transformer.h", 2)]),
    "llama": (llama, ids(use_cache=False), [("model.layers", 2)]),
    "bert": (bert, ids(), [("bert.encoder.layer", 2)]),
    "vit": (vit, images(16), [("vit.layers", 3)]),
    "swin": (
        lambda: transformers.SwinForImageClassification(transformers.SwinConfig(**SWIN)),
        images(32),
        [("swin.encoder.layers.0.blocks", 2), ("swin.encoder.layers.1.blocks", 4)],
    ),
    "resnet": (resnet, images(32), [("resnet.encoder.stages.0.layers", 3), ("resnet.encoder.stages.1.layers", 2)]),
    "segresnet": (
        lambda: SegResNet(blocks_down=[1, 3], blocks_up=[1], in_channels=1, out_channels=2, init_filters=8),
        volume(),
        [("down_layers.1", 3)],
    ),
}


def output(model, inputs):
    found = model(**inputs)
    return found if isinstance(found, torch.Tensor) else found.logits


@pytest.mark.parametrize("name", MODELS)
def test_the_rows_of_a_library_are_found_and_train_as_stored(name):
    torch.manual_seed(0)
    make, inputs, rows = MODELS[name]
    model = in_float64(make()).double().train()
    keys = list(model.state_dict())
    conversion = make_reversible(model, **inputs)
    assert [(row.names[0].rpartition(".")[0], len(row.names)) for row in conversion.rows] == rows
    assert list(model.state_dict()) == keys
    found = []
    for recompute in (True, False):
        conversion.recompute(recompute)
        model.zero_grad()
        torch.manual_seed(1)  # dropout
        output(model, inputs).square().sum().backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for key, grad in found[1].items():
        torch.testing.assert_close(found[0][key], grad, rtol=1e-6, atol=1e-9)
    assert conversion.verify(**inputs).gradient < 1e-6


def test_a_row_with_a_cache_is_not_converted():
    conversion = make_reversible(gpt2(), **ids(use_cache=True))
    assert not conversion.rows
    assert "its blocks get a DynamicCache" in str(conversion) and "use_cache=False" in str(conversion)
    model = gpt2()
    make_reversible(model, **ids(use_cache=False))
    with pytest.raises(ValueError, match=r"got a DynamicCache.*use_cache=False"):
        model(**ids(use_cache=True))


def test_models_without_rows_say_so():
    net = BasicUNet(3, 1, 2, features=(8, 8, 8, 8, 8, 8)).double()
    large = torch.randn(1, 1, 32, 32, 32, dtype=torch.float64)
    assert str(make_reversible(net, large)) == "the model has no row of residual blocks"
    model = t5().double()
    assert not make_reversible(model, **ids(labels=ids()["input_ids"])).rows


def test_norms_of_a_converted_model_are_those_of_examples_alone():
    torch.manual_seed(0)
    model = gpt2().double().eval()
    make_reversible(model, **ids(use_cache=False))
    batch = ids()["input_ids"]

    def losses(rows):
        logits = model(input_ids=rows, use_cache=False).logits[:, :-1]
        each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none")
        return each.mean(1)

    alone = []
    for row in batch.split(1):
        grads = torch.autograd.grad(losses(row).sum(), list(model.parameters()))
        alone.append(torch.stack([grad.norm() for grad in grads]).norm())
    clipper = GhostClipper(model, max_grad_norm=1.0)
    norms = clipper.backward(losses(batch))
    torch.testing.assert_close(norms, torch.stack(alone), rtol=1e-9, atol=0)
    clipper.close()

    def of(model, batch):
        logits = model(input_ids=batch["input_ids"], use_cache=False).logits
        return logits.square().mean((1, 2))

    report = verify(model, {"input_ids": batch}, of)
    assert report.ok, report


def test_a_converted_model_is_saved_as_the_plain_one(tmp_path):
    torch.manual_seed(0)
    model = vit().eval()
    plain = model(**{key: value.float() for key, value in images(16).items()}).logits
    make_reversible(model, **{key: value.float() for key, value in images(16).items()})
    model.save_pretrained(tmp_path)
    again = transformers.ViTForImageClassification.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(**{key: value.float() for key, value in images(16).items()}).logits, plain)
