"""nnU-Net's default trainer and nnUNetTrainerMemsave at the same memory budget, on phantoms in nnU-Net's raw format.

    python -m experiments.nnunet                 # needs nnunetv2; writes the table of README.md
    python -m experiments.nnunet --quick         # minutes on two CPU cores; nothing is written

nnU-Net plans for the budget by its own constants (`-gpu_memory_target`); memsave by its planner. Both train the same
fold with the same augmentation, loss, optimizer and number of steps.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch

from experiments.record import insert, keep, machine, median
from memsave.data.volumes.layouts import Case
from memsave.data.volumes.phantoms.generate import ensure_phantoms
from memsave.integrations.nnunet import TRAINERS
from memsave.profiler import format_bytes, parse_bytes

HERE = Path(__file__).parent
DATASET = "Dataset901_Phantoms"
REGIONS = {"whole tumour": [1, 2, 3], "tumour core": [1, 3], "enhancing": [3]}
WAYS = {"nnUNetTrainerShort": "nnU-Net's default", "nnUNetTrainerMemsaveShort": "memsave, reversible"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes; nothing is written")
    parser.add_argument("--budget", default="8GiB")
    parser.add_argument("--size", type=int, nargs=3, default=(160, 192, 144), help="voxels of a phantom")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--iterations", type=int, default=50, help="training steps of an epoch")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--folder", type=Path, help="where nnU-Net's folders are kept; default: a temporary one")
    given = parser.parse_args()
    if given.quick:
        given.budget, given.size, given.epochs, given.iterations = "1GiB", (64, 64, 48), 2, 5
    folder = given.folder or Path(tempfile.mkdtemp(prefix="memsave-nnunet-"))
    rows = measure(given, folder)
    text = table(rows, budget=given.budget)
    print(text)
    if not given.quick:
        size = "x".join(map(str, given.size))
        shown = f"{machine()}; phantoms of {size}, {given.epochs} epochs of {given.iterations} steps"
        command = shlex.join(["python", "-m", "experiments.nnunet", *sys.argv[1:]])
        keep(HERE / "results.json", command=command, results={"setting": shown, "rows": rows})
        insert(HERE / "README.md", name="nnunet", text=f"{shown}:\n\n{text}")
    if given.folder is None:
        shutil.rmtree(folder)


def measure(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What each trainer took and reached, by its name."""
    cases = ensure_phantoms(cases=20, size=tuple(given.size), progress=print)
    write_raw(cases, folder / "raw" / DATASET)
    environment = {
        **os.environ,
        "nnUNet_raw": str(folder / "raw"),
        "nnUNet_preprocessed": str(folder / "preprocessed"),
        "nnUNet_results": str(folder / "results"),
        "nnUNet_extTrainer": os.pathsep.join(map(str, (TRAINERS, HERE / "trainers"))),
        "PYTHONPATH": os.pathsep.join((str(HERE.parents[1]), os.environ.get("PYTHONPATH", ""))),
        "nnUNet_compile": "false",
        "MEMSAVE_BUDGET": given.budget,
        "SHORT_EPOCHS": str(given.epochs),
        "SHORT_ITERATIONS": str(given.iterations),
    }
    target = str(parse_bytes(given.budget) / 2**30)
    plan = f"plan_and_preprocess -d 901 -c 3d_fullres -gpu_memory_target {target} -np {os.cpu_count()}"
    run(plan.split(), environment)
    shutil.rmtree(folder / "results", ignore_errors=True)  # of other settings
    rows = {}
    for trainer, name in WAYS.items():
        fold = folder / "results" / DATASET / f"{trainer}__nnUNetPlans__3d_fullres" / "fold_0"
        run(["train", DATASET, "3d_fullres", "0", "-tr", trainer, "-device", given.device], environment)
        scores = json.loads((fold / "validation" / "summary.json").read_text())["mean"]
        dice = {region: scores[str(tuple(labels))]["Dice"] for region, labels in REGIONS.items()}
        rows[name] = {**json.loads((fold / "measured.json").read_text()), "dice": dice}
    return rows


def run(command: list[str], environment: dict[str, str]) -> None:
    program = Path(sys.executable).parent / f"nnUNetv2_{command[0]}"
    subprocess.run([str(program), *command[1:]], env=environment, check=True)


def write_raw(cases: list[Case], folder: Path) -> None:
    """nnU-Net's raw format: one file per modality, labels 1, 2, 3, and the regions of BraTS."""
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for case in cases:
        for number, image in enumerate(case.images):
            shutil.copyfile(image, folder / "imagesTr" / f"{case.id}_{number:04d}.nii.gz")
        label = nibabel.load(case.label)
        values = np.asarray(label.dataobj).astype(np.uint8)
        values[values == 4] = 3
        nibabel.save(nibabel.Nifti1Image(values, label.affine), folder / "labelsTr" / f"{case.id}.nii.gz")
    content = {
        "channel_names": dict(enumerate(cases[0].modalities)),
        "labels": {"background": 0, **REGIONS},
        "regions_class_order": [2, 1, 3],
        "numTraining": len(cases),
        "file_ending": ".nii.gz",
        "overwrite_image_reader_writer": "NibabelIO",
    }
    (folder / "dataset.json").write_text(json.dumps(content, indent=2))


def table(rows: dict[str, Any], *, budget: str) -> str:
    lines = [
        f"| trainer, budget {budget} | patch, batch | parameters | peak of a step | time per epoch | "
        f"{' | '.join(f'Dice, {each}' for each in REGIONS)} |",
        "|---" * (5 + len(REGIONS)) + "|",
    ]
    for name, row in rows.items():
        patch = "x".join(map(str, row["patch_size"]))
        cells = [
            name,
            f"{patch}, {row['batch_size']}",
            f"{row['parameters'] / 1e6:.1f} M",
            format_bytes(row["peak_bytes"]),
        ]
        cells += [f"{median(row['epoch_seconds']):.1f} s", *(f"{value:.3f}" for value in row["dice"].values())]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
