"""Segments new cases with a trained model.

    python -m memsave.predict checkpoint=outputs/brats_rev/2026-01-31_10-00-00 input=/my/new output=/my/segmentations

    checkpoint  a run's folder, or its model/ copied anywhere
    input       the folder of the cases, in the layout that the run was trained on, with segmentations or without
    output      where to write ID.nii.gz, with the case's own affine and the data set's labels
    layout, mask  of the input, where they differ from the run's; a challenge's layout brings its labels
    modalities  what the input calls those of training, in any order, as in modalities=[t1c,t1n]; another set is refused
    window      the sliding window in voxels, as in window=[96,96,96] (that of training); whole: the volume at once
    overlap     of neighbouring windows (0.5)
    flips       true: average over the volume's eight reflections (false)
    budget      live memory that a case may take, such as 16GiB
    device      auto, cpu or cuda (auto)

A case that fails or that lacks a file is named and does not stop the others. Exit codes: 0 all were segmented, 1 some
were not, 2 bad input, 130 interrupted.
"""

import itertools
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import yaml
from torch import Tensor, nn

from memsave.config import ConfigError
from memsave.data import DataError
from memsave.data.cache import NO_PLACE
from memsave.data.volumes.schemes import LabelScheme
from memsave.processes import several_processes
from memsave.profiler import MemoryRecorder, format_bytes, parse_bytes
from memsave.tasks.loading import load_unet
from memsave.training.loop import autocast
from memsave.training.memory_error import is_out_of_memory
from memsave.training.progress import Progress
from memsave.training.signals import interrupt_at_signals

if TYPE_CHECKING:
    from memsave.tasks.segmentation.unet_config import UNetConfig

KEYS = (
    "checkpoint", "input", "output", "layout", "modalities", "mask", "window", "overlap", "flips", "budget", "device"
)  # fmt: skip


@dataclass(frozen=True)
class Options:
    """How volumes are segmented."""

    window: Sequence[int] | None
    """Voxels of the sliding window; None takes the whole volume at once."""
    overlap: float = 0.5
    flips: bool = False
    budget: int | None = None
    """Bytes."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or {"-h", "--help"} & set(given):
        print(__doc__)
        return 0 if given else 2
    try:
        found = several_processes()
        if found is not None:
            raise ConfigError(f"{found}, and each would write the same files; start one, without torchrun or srun")
        return predict_folder(parse(given), progress=Progress())
    except (ConfigError, DataError) as error:
        message: object = error
    except ModuleNotFoundError as error:
        message = f"the package {error.name} is not installed; install it with: pip install 'memsave[brats]'"
    except KeyboardInterrupt:
        print("interrupted; what was written is whole", file=sys.stderr)
        return 130
    print(f"memsave: {message}", file=sys.stderr)
    return 2


def parse(arguments: Sequence[str]) -> dict[str, Any]:
    """The key=value arguments, values read as YAML; ConfigError for what is none, unknown or missing."""
    from memsave.config.fields import closest

    found: dict[str, Any] = {}
    for each in arguments:
        key, equals, value = each.partition("=")
        if not equals:
            raise ConfigError(f"{each!r} cannot be read; arguments have the form key=value")
        if key not in KEYS:
            raise ConfigError(f"{key} is not known; valid are {', '.join(KEYS)}{closest(key, KEYS)}")
        found[key] = value if key in ("checkpoint", "input", "output", "budget") else yaml.safe_load(value)
    for key in ("checkpoint", "input", "output"):
        if not found.get(key):
            raise ConfigError(f"{key} is not given; name a folder, as in {key}=/my/{key}")
    return found


def predict_folder(given: dict[str, Any], *, progress: Progress) -> int:
    """Segment every case of the input folder; the exit code."""
    from memsave.data.volumes.dataset import Volumes
    from memsave.data.volumes.layouts import duplicates, scan
    from memsave.data.volumes.nifti import read_header
    from memsave.experiment import choose_device
    from memsave.tasks.segmentation.task import without_small

    model = load_unet(Path(given["checkpoint"]).expanduser())
    config, options = model.config, _options(given, model.config)
    known = _input(given, config)
    device = choose_device(str(given.get("device", "auto")), key="device")
    there = scan(given["input"], **known, labelled=False)
    found, faults = there.cases, there.faults + duplicates(there.cases)
    if not found or duplicates(found):  # which would be written to one file
        raise DataError(faults[0])
    output = _output(given["output"])
    for fault in faults:
        progress.say(f"failed: {fault}")
    model = model.to(device)
    precision = config.precision
    precision = "float32" if precision == "float16" and device.type != "cuda" else precision
    failed, total = len(there.incomplete), len(found) + len(there.incomplete)
    for number, case in enumerate(found, start=1):
        try:
            reference = read_header(case.images[0])  # before the work, for the file is needed after it
            volume = Volumes([replace(case, label=None)], scheme=case.scheme, spacing=config.spacing)[0]
            with autocast(model, precision):
                masks = segment(model, volume, options, device=device)
            masks = without_small(masks, case.scheme.names, smallest_et=config.smallest_et)
            path = output / f"{case.id}.nii.gz"
            write_labels(path, masks, scheme=case.scheme, reference=reference)
            progress.say(f"{number} of {len(found)}: {path}")
        except Exception as error:  # of this case alone, whatever it is
            failed += 1
            progress.say(f"{number} of {len(found)}: {case.id} failed: {_reason(error)}")
    progress.say(f"segmented {total - failed} of {total} cases into {output}")
    return 1 if failed or faults else 0


def _output(given: str) -> Path:
    """The folder to write to; ConfigError where it cannot be made or written to."""
    folder = Path(given).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise ConfigError(f"output {folder} cannot be written to ({error.strerror}); give another folder") from error


def _reason(error: Exception) -> str:
    if is_out_of_memory(error):
        return "it does not fit into memory; give a smaller window"
    if isinstance(error, OSError) and error.errno in NO_PLACE and error.filename is None:
        return f"its file cannot be written ({error.strerror}); free space or give another output="
    return str(error) if isinstance(error, (ConfigError, DataError, OSError)) else f"{type(error).__name__}: {error}"


def segment(model: nn.Module, volume: dict[str, Any], options: Options, *, device: torch.device) -> Tensor:
    """Regions (R, X, Y, Z), boolean, of an item of `Volumes`, on the case's own grid."""
    from memsave.data.volumes.dataset import restore
    from memsave.tasks.segmentation.task import predict

    image = volume["image"].to(device)
    window = options.window or image.shape[1:]
    recorder = None if options.budget is None else MemoryRecorder(model)
    with recorder or nullcontext():
        logits = _averaged(model, image, window=window, options=options, predict=predict)
        found = restore(logits.cpu(), volume, threshold=0.0)
    peak = 0 if recorder is None else recorder.report().peak_bytes
    if options.budget is not None and peak > options.budget:
        raise ConfigError(
            f"{volume['id']} took {format_bytes(peak)} of live memory, more than the budget of "
            f"{format_bytes(options.budget)}; give a smaller window"
        )
    return found


def _averaged(model: nn.Module, image: Tensor, *, window: Sequence[int], options: Options, predict: Any) -> Tensor:
    """Logits, or those of the mean probability over reflections."""
    if not options.flips:
        return predict(model, image, window=window, overlap=options.overlap).float()
    total: Tensor | float = 0.0
    for axes in _reflections():
        logits = predict(model, image.flip(axes), window=window, overlap=options.overlap).float()
        total = total + logits.sigmoid().flip(axes)
    return torch.logit(torch.as_tensor(total) / 8, eps=1e-6)


def _reflections() -> Iterator[tuple[int, ...]]:
    """The axes of each of the eight reflections of a volume (C, X, Y, Z)."""
    return itertools.chain.from_iterable(itertools.combinations((1, 2, 3), count) for count in range(4))


def write_labels(path: Path, masks: Tensor, *, scheme: LabelScheme, reference: Any) -> None:
    """The masks (R, X, Y, Z) as one NIfTI file of the scheme's labels, with the geometry of `reference`.

    That is an image of the case (`memsave.data.volumes.nifti.read_header`). Its header is kept, because programs differ
    in which of the two affines of a header they read.
    """
    import nibabel

    from memsave.data.volumes.reader import labels_of

    labels = labels_of(masks, scheme).squeeze(0).numpy()
    image = type(reference)(labels, reference.affine, reference.header, dtype=np.uint8)
    image.header["cal_min"] = image.header["cal_max"] = 0  # the display window of an intensity
    image.header["descrip"], image.header["intent_code"] = b"", 0
    draft = path.with_name(f".{path.name.removesuffix('.nii.gz')}.new.nii.gz")
    try:
        nibabel.save(image, draft)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def _options(given: dict[str, Any], config: "UNetConfig") -> Options:
    window = given.get("window", list(config.crop_size))
    whole = window == "whole"
    if not whole and not (
        isinstance(window, list) and len(window) == 3 and all(type(n) is int and n > 0 for n in window)
    ):
        raise ConfigError(f"window is {window}; give three numbers of voxels, as in window=[96,96,96], or window=whole")
    overlap = given.get("overlap", 0.5)
    if not isinstance(overlap, (int, float)) or not 0 <= overlap < 1:
        raise ConfigError(f"overlap is {overlap}; give a number from 0 to below 1, such as 0.5")
    flips = given.get("flips", False)
    if not isinstance(flips, bool):
        raise ConfigError(f"flips is {flips}; give flips=true or flips=false")
    try:
        budget = parse_bytes(given["budget"]) if "budget" in given else None
    except ValueError as error:
        raise ConfigError(f"budget: {error}") from error
    return Options(None if whole else window, overlap=overlap, flips=flips, budget=budget)


def _input(given: dict[str, Any], config: "UNetConfig") -> dict[str, Any]:
    """How to read the input's cases: as the run's own, but for what is given.

    Another layout brings its own labels along where they make up the regions that the model knows.
    """
    from memsave.data.volumes.layouts import LAYOUTS

    layout, scheme = str(given.get("layout", config.layout)), config.regions
    other = LAYOUTS[layout].scheme if layout in LAYOUTS else scheme
    use = other if layout != config.layout and other.names == scheme.names else scheme
    mask = given.get("mask", config.mask if layout == config.layout else None)
    modalities = _modalities(given.get("modalities"), layout, trained=config.modalities)
    return {"layout": layout, "modalities": modalities, "mask": mask, "scheme": use.name}


def _modalities(given: Any, layout: str, *, trained: Sequence[str]) -> list[str]:
    """The input's names for the modalities that the model was trained on, in the order of its input channels."""
    from memsave.data.volumes.layouts import LAYOUTS, in_order, meaning

    several = given if isinstance(given, list) else str(given).split(",")
    names = [str(name).strip() for name in several] if given else list(trained)
    known = LAYOUTS[layout].modalities if layout in LAYOUTS else {}
    ordered = in_order(names, trained)
    if ordered is None:
        files = "" if known else ", and have the files' names end in them"
        raise ConfigError(
            f"the input's modalities are {', '.join(names)}, and the run was trained on {', '.join(trained)}; give "
            f"these, in any order, as in modalities=[{','.join(trained)}]{files}"
        )
    if not known:
        return ordered
    lacking = [name for name in ordered if meaning(name) not in known]
    if lacking:
        raise ConfigError(
            f"the run was trained on {', '.join(trained)}, and layout={layout} has no {lacking[0]}; give layout=folder "
            f"and files whose names end in these"
        )
    return list(map(meaning, ordered))


if __name__ == "__main__":
    interrupt_at_signals()
    sys.exit(main())
