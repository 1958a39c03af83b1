"""MONAI uses a network of memsave: in its trainer and sliding window, and as a bundle."""

import csv
import json

import numpy as np
import pytest
import torch

pytest.importorskip("monai")
pytest.importorskip("ignite")
pytest.importorskip("nibabel")

import monai
import nibabel
from monai.engines import SupervisedTrainer
from monai.inferers import SlidingWindowInferer
from monai.losses import DiceLoss

from memsave import load
from memsave.config import ConfigError
from memsave.data.volumes.layouts import find_cases
from memsave.integrations.monai import write_bundle
from memsave.models import ReversibleUNet3d


def test_the_trainer_and_the_sliding_window(tmp_path):
    torch.manual_seed(0)
    volumes = [{"image": torch.randn(2, 16, 16, 16)} for _ in range(4)]
    volumes = [{**each, "label": (each["image"][:1] > 0).float()} for each in volumes]
    network = ReversibleUNet3d(2, 1, channels=(4, 8), blocks=1, expansion=2, memory="reversible")
    loss, found = DiceLoss(sigmoid=True), []
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    trainer = SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=4,
        train_data_loader=monai.data.DataLoader(monai.data.Dataset(volumes), batch_size=2),
        network=network,
        optimizer=optimizer,
        loss_function=loss,
    )
    trainer.add_event_handler("ITERATION_COMPLETED", lambda engine: found.append(engine.state.output[0]["loss"]))
    trainer.run()
    assert len(found) == 8 and found[-1] < found[0]
    inferer = SlidingWindowInferer(roi_size=(16, 16, 16), overlap=0.5, mode="gaussian")
    with torch.no_grad():
        assert inferer(torch.randn(1, 2, 24, 16, 20), network.eval()).shape == (1, 1, 24, 16, 20)


@pytest.fixture(scope="module")
def bundle(trained, tmp_path_factory):
    return write_bundle(trained[0], tmp_path_factory.mktemp("bundles") / "brats")


def test_a_bundle_loads(trained, bundle):
    network = monai.bundle.load("brats", bundle_dir=str(bundle.parent), workflow_type="inference")
    x = torch.randn(1, 4, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(network.eval()(x), load(trained[0])(x))
    metadata = json.loads((bundle / "configs" / "metadata.json").read_text())
    assert metadata["network_data_format"]["inputs"]["image"]["num_channels"] == 4
    with pytest.raises(ConfigError, match="exists already"):
        write_bundle(trained[0], bundle)


def test_a_bundle_segments_as_the_run_did(trained, bundle, tmp_path):
    with (trained[0] / "scores.csv").open() as file:
        held_out = {row["case"] for row in csv.DictReader(file)}
    case = next(each for each in find_cases(trained[1]) if each.id in held_out)
    workflow = monai.bundle.ConfigWorkflow(
        config_file=str(bundle / "configs" / "inference.json"),
        meta_file=str(bundle / "configs" / "metadata.json"),
        workflow_type="inference",
        bundle_root=str(bundle),
        output_dir=str(tmp_path),
        datalist=[{"image": [str(path) for path in case.images]}],
        device="$torch.device('cpu')",
    )
    workflow.initialize()
    workflow.run()
    (path,) = tmp_path.rglob("*.nii.gz")
    masks = np.asarray(nibabel.load(path).dataobj)
    assert masks.shape == (*nibabel.load(case.images[0]).shape, 3)
    from memsave.predict import main

    assert main([f"checkpoint={trained[0]}", f"input={trained[1]}", f"output={tmp_path / 'own'}", "device=cpu"]) == 0
    own = np.asarray(nibabel.load(tmp_path / "own" / f"{case.id}.nii.gz").dataobj)
    whole = own > 0  # the union of all regions
    assert (masks.any(-1) == whole).mean() > 0.99
