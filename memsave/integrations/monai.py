"""A trained network as a MONAI bundle, for MONAI Label, MONAI Deploy, and whoever uses `monai.bundle`.

    from memsave.integrations.monai import write_bundle
    write_bundle("outputs/brats_rev/2026-01-31_10-00-00", "bundles/brats")

    network = monai.bundle.load("brats", bundle_dir="bundles", workflow_type="inference")
    python -m monai.bundle run --config_file bundles/brats/configs/inference.json --datalist "[{'image': [...]}]"

The network is the class of memsave, or one's own, so that package must be installed where the bundle is used.
"""

import json
from pathlib import Path
from typing import Any

import monai
import numpy as np
import torch

from memsave._version import __version__
from memsave.config import ConfigError
from memsave.tasks.loading import load_unet


def write_bundle(run: str | Path, folder: str | Path, *, description: str = "", version: str = "0.1.0") -> Path:
    """Write the trained network of a run (or of its `model/`) as a bundle; returns its folder.

    `configs/inference.json` prepares volumes as in training (orientation, crop to the brain, z-score of each modality),
    segments them by a sliding window of the training crop, and writes one mask per region. Cases are given by
    `datalist`: [{"image": [a file for each modality, in the order of configs/metadata.json]}].

    Args:
        run: the folder of a finished segmentation run, or a copy of its model/.
        folder: the bundle, which must not exist.
        description, version: for metadata.json.

    Raises ConfigError if the folder exists, or the run has no segmentation network.
    """
    network, folder = load_unet(Path(run).expanduser()), Path(folder).expanduser()
    if folder.exists():
        raise ConfigError(f"{folder} exists already; give another folder for the bundle")
    for name in ("configs", "models", "docs"):
        (folder / name).mkdir(parents=True)
    torch.save(network.state_dict(), folder / "models" / "model.pt")
    files = {"metadata.json": _metadata(network.config, description, version), "inference.json": _inference(network)}
    for name, content in files.items():
        (folder / "configs" / name).write_text(json.dumps(content, indent=2) + "\n")
    (folder / "docs" / "README.md").write_text(_readme(network.config, description))
    return folder


def _network_def(network: Any) -> dict[str, Any]:
    found = network.config.model
    if "target" in found:
        return {"_target_": found["target"], **found["arguments"]}
    return {"_target_": "memsave.models.ReversibleUNet3d", **found}


def _inference(network: Any) -> dict[str, Any]:
    config = network.config
    spacing = (
        [] if config.spacing is None else [{"_target_": "Spacingd", "keys": "image", "pixdim": list(config.spacing)}]
    )
    return {
        "imports": ["$import torch"],
        "bundle_root": ".",
        "output_dir": "$@bundle_root + '/eval'",
        "datalist": [],
        "device": "$torch.device('cuda' if torch.cuda.is_available() else 'cpu')",
        "network_def": _network_def(network),
        "network": "$@network_def.to(@device)",
        "preprocessing": {
            "_target_": "Compose",
            "transforms": [
                {"_target_": "LoadImaged", "keys": "image"},
                {"_target_": "EnsureChannelFirstd", "keys": "image"},
                {"_target_": "Orientationd", "keys": "image", "axcodes": "LPS", "labels": None},
                *spacing,
                {
                    "_target_": "CropForegroundd",
                    "keys": "image",
                    "source_key": "image",
                    "select_fn": "$lambda image: image != 0",
                    "allow_smaller": True,
                },
                {"_target_": "NormalizeIntensityd", "keys": "image", "nonzero": True, "channel_wise": True},
            ],
        },
        "dataset": {"_target_": "Dataset", "data": "@datalist", "transform": "@preprocessing"},
        "dataloader": {"_target_": "DataLoader", "dataset": "@dataset", "batch_size": 1},
        "inferer": {
            "_target_": "SlidingWindowInferer",
            "roi_size": list(config.crop_size),
            "sw_batch_size": 2,
            "overlap": 0.5,
            "mode": "gaussian",
        },
        "postprocessing": {
            "_target_": "Compose",
            "transforms": [
                {"_target_": "Activationsd", "keys": "pred", "sigmoid": True},
                {
                    "_target_": "Invertd",
                    "keys": "pred",
                    "transform": "@preprocessing",
                    "orig_keys": "image",
                    "nearest_interp": False,
                },
                {"_target_": "AsDiscreted", "keys": "pred", "threshold": 0.5},
                {"_target_": "SaveImaged", "keys": "pred", "output_dir": "@output_dir", "separate_folder": False},
            ],
        },
        "handlers": [
            {
                "_target_": "CheckpointLoader",
                "load_path": "$@bundle_root + '/models/model.pt'",
                "load_dict": {"model": "@network"},
                "map_location": "@device",
            }
        ],
        "evaluator": {
            "_target_": "SupervisedEvaluator",
            "device": "@device",
            "val_data_loader": "@dataloader",
            "network": "@network",
            "inferer": "@inferer",
            "postprocessing": "@postprocessing",
            "val_handlers": "@handlers",
        },
        "run": ["$@evaluator.run()"],
    }


def _metadata(config: Any, description: str, version: str) -> dict[str, Any]:
    regions = list(config.regions.names)
    image = {"type": "image", "dtype": "float32", "spatial_shape": ["n", "n", "n"], "is_patch_data": True}
    channels = dict(enumerate(config.modalities))
    return {
        "version": version,
        "changelog": {version: "written by memsave"},
        "monai_version": monai.__version__,
        "pytorch_version": torch.__version__.partition("+")[0],
        "numpy_version": np.__version__,
        "required_packages_version": {"memsave": __version__},
        "task": "segmentation of " + ", ".join(regions),
        "description": description or f"A network that segments {', '.join(regions)}, trained with memsave",
        "authors": "",
        "copyright": "",
        "intended_use": "research; not for diagnosis",
        "network_data_format": {
            "inputs": {
                "image": {
                    **image,
                    "format": "magnitude",
                    "modality": "MR",
                    "num_channels": len(channels),
                    "value_range": [],
                    "channel_def": channels,
                }
            },
            "outputs": {
                "pred": {
                    **image,
                    "format": "segmentation",
                    "num_channels": len(regions),
                    "value_range": [0, 1],
                    "channel_def": dict(enumerate(regions)),
                }
            },
        },
    }


def _readme(config: Any, description: str) -> str:
    return (
        f"# Segmentation of {', '.join(config.regions.names)}\n\n{description}\n\n"
        f"Input: {', '.join(config.modalities)}, in this order. Output: one mask for each region.\n\n"
        "    python -m monai.bundle run --config_file configs/inference.json --bundle_root . "
        "--datalist \"[{'image': ['t1.nii.gz', ...]}]\"\n"
    )
