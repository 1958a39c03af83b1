"""Segment new cases with a trained model.

    python -m memsave.predict checkpoint=outputs/brats_rev/2026-01-31_10-00-00 input=/my/new output=/my/segmentations

    checkpoint  a run's folder, or a copy of its model/; the mean of several, as in checkpoint=[RUN,RUN], such as folds
    input       folder of the cases, with or without segmentations
    output      folder for the files ID.nii.gz, which keep each case's affine and use the labels of the data set
    layout      naming of the input's files (default: that of training); another challenge's layout also sets its labels
    mask        layout=folder: the end of the mask's file name (default: that of training)
    modalities  the input's names for the modalities of training, in any order, as in modalities=[t1c,t1n]
    window      the sliding window in voxels, as in window=[96,96,96] (default: that of training), or whole
    overlap     overlap of neighbouring windows (default 0.5)
    flips       true: average over the eight reflections of the volume (default false)
    budget      limit of the live memory that a case may take, such as 16GiB
    device      auto, cpu or cuda (default auto)

Several processes, each with a GPU of its own, share the cases:

    torchrun --nproc_per_node=4 -m memsave.predict checkpoint=... input=... output=...

A case that fails or lacks a file is reported, and the other cases are segmented. Exit codes: 0 all cases were
segmented, 1 some failed, 2 bad input, 130 interrupted.
"""

import itertools
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from omegaconf import MISSING
from torch import Tensor, nn

from memsave.arguments import names_in, parse_arguments
from memsave.command_line import run_command
from memsave.config import ConfigError
from memsave.data import DataError
from memsave.files import NOT_WRITABLE, replacing
from memsave.process_group import own_device
from memsave.processes import broadcast, on_main, process_count, process_rank, received, together
from memsave.profiler import MemoryRecorder, format_bytes, parse_bytes
from memsave.progress import Progress
from memsave.tasks.segmentation.ensemble import load_networks
from memsave.training.loop import autocast
from memsave.training.memory_error import is_out_of_memory
from memsave.training.signals import interrupt_at_signals

if TYPE_CHECKING:
    from memsave.data.volumes.layouts import Case
    from memsave.tasks.segmentation.unet_config import UNetConfig

OVERLAP = "a number from 0 to below 1, such as 0.5"


@dataclass
class Arguments:
    """The command-line arguments, described at the top of this file."""

    checkpoint: str = MISSING
    input: str = MISSING
    output: str = MISSING
    layout: str | None = None
    modalities: str | None = None
    mask: str | None = None
    window: Any = field(default=None, metadata={"expects": "three numbers of voxels, as in window=[96,96,96]"})
    overlap: float = field(default=0.5, metadata={"expects": OVERLAP})
    flips: bool = field(default=False, metadata={"expects": "flips=true or flips=false"})
    budget: str | None = None
    device: str = "auto"


@dataclass(frozen=True)
class Options:
    """Options of sliding-window inference."""

    window: Sequence[int] | None
    """Voxels of the sliding window; None is the whole volume."""
    overlap: float = 0.5
    flips: bool = False
    budget: int | None = None
    """Bytes."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""

    def body(given: list[str]) -> int:
        return predict_folder(parse_arguments(given, Arguments, example="input=/my/new"), progress=Progress())

    return run_command(
        body,
        arguments,
        help_text=__doc__ or "",
        extra="brats",
        interrupted="interrupted; the files that were written are complete",
    )


def predict_folder(arguments: Arguments, *, progress: Progress) -> int:
    """Segment every case of the input folder; returns the exit code."""
    from memsave.data.volumes.layouts import duplicates, scan
    from memsave.experiment import choose_device

    with together():
        model = load_networks(_folders(arguments.checkpoint))
        options, kwargs = _options(arguments, model.config), _scan_kwargs(arguments, model.config)
        device = own_device(choose_device(arguments.device, key="device"))
        found = scan(arguments.input, **kwargs, labelled=False)
        repeated = duplicates(found.cases)
        faults = found.faults + repeated
        if not found.cases or repeated:  # repeated ids would be written to one file
            raise DataError(faults[0])
        model = model.to(device)
    output = on_main(lambda: _output_folder(arguments.output))
    for fault in faults:
        progress.say(f"failed: {fault}")
    done, total = 0, len(found.cases) + len(found.incomplete)
    for number, (case, labels) in enumerate(_segmented(found.cases, model, options, device=device), start=1):
        path = output / f"{case.id}.nii.gz"
        reason = labels if isinstance(labels, str) else _written(path, labels, case)
        done += reason is None
        said = str(path) if reason is None else f"{case.id} failed: {reason}"
        progress.say(f"{number} of {len(found.cases)}: {said}")
    progress.say(f"segmented {done} of {total} cases into {output}")
    return broadcast(1 if done < total or faults else 0)


def _segmented(
    cases: Sequence["Case"], model: Any, options: Options, *, device: torch.device
) -> Iterator[tuple["Case", np.ndarray | str]]:
    """Yield each case with its labels, or with the reason why it failed; on the first process, in order.

    In each round, every process segments one case and the first one receives the results, of which it holds one.
    """
    count, rank = process_count(), process_rank()
    for first in range(0, len(cases), count):
        part = cases[first : first + count]
        mine: np.ndarray | str = ""
        if rank < len(part):
            try:
                mine = _segment_case(part[rank], model, options, device=device)
            except Exception as error:  # any error of one case is reported, and the others continue
                mine = _reason(error)
        for other, found in enumerate(received(mine)):  # takes all: a process waits until its value is received
            if other < len(part):
                yield part[other], found


def _segment_case(case: "Case", model: Any, options: Options, *, device: torch.device) -> np.ndarray:
    """The labels (X, Y, Z) uint8 of a case on the grid of its files."""
    from memsave.data.volumes.dataset import Volumes
    from memsave.data.volumes.nifti import read_header
    from memsave.data.volumes.reader import labels_of
    from memsave.tasks.segmentation.inference import without_small

    config = model.config
    precision = config.precision
    precision = "float32" if precision == "float16" and device.type != "cuda" else precision
    read_header(case.images[0])  # first: writing the result needs it
    volume = Volumes([replace(case, label=None)], scheme=case.scheme, spacing=config.spacing)[0]
    with autocast(model, precision):
        masks = segment(model, volume, options, device=device)
    masks = without_small(masks, case.scheme.names, smallest_et=config.smallest_et)
    return labels_of(masks, case.scheme).numpy()


def _written(path: Path, labels: np.ndarray, case: "Case") -> str | None:
    """Write the labels of a case; returns the reason if this fails."""
    from memsave.data.volumes.nifti import read_header

    try:
        write_labels(path, labels, reference=read_header(case.images[0]))
    except Exception as error:  # as in `_segmented`
        return _reason(error)
    return None


def _folders(given: str) -> list[str]:
    """The folders of checkpoint=RUN or checkpoint=[RUN,RUN]."""
    folders = names_in(given) if given.startswith("[") and given.endswith("]") else [given]
    if not folders:
        raise ConfigError("checkpoint names no run; give checkpoint=RUN, or several as checkpoint=[RUN,RUN]")
    return folders


def _output_folder(path: str) -> Path:
    """Create the output folder; ConfigError if it cannot be created or written to."""
    folder = Path(path).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise ConfigError(f"output {folder} cannot be written to ({error.strerror}); give another folder") from error


def _reason(error: Exception) -> str:
    if is_out_of_memory(error):
        return "it does not fit into memory; give a smaller window"
    if isinstance(error, OSError) and error.errno in NOT_WRITABLE and error.filename is None:
        return f"its file cannot be written ({error.strerror}); free space or give another output="
    return str(error) if isinstance(error, (ConfigError, DataError, OSError)) else f"{type(error).__name__}: {error}"


def segment(model: nn.Module, volume: dict[str, Any], options: Options, *, device: torch.device) -> Tensor:
    """Segment an item of `Volumes`: boolean regions (R, X, Y, Z) on the grid of the case's files.

    Raises ConfigError if this takes more live memory than `options.budget`.
    """
    from memsave.data.volumes.dataset import restore
    from memsave.tasks.segmentation.inference import predict

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
    """Logits (R, x, y, z); with `options.flips` the logit of the mean probability over the reflections."""
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


def write_labels(path: Path, labels: np.ndarray, *, reference: Any) -> None:
    """Write labels (X, Y, Z) uint8 as a NIfTI file with the geometry of `reference`.

    `reference` is an image of the case (`memsave.data.volumes.nifti.read_header`). The file keeps its whole header,
    because programs differ in which of the two affines of a header they read.
    """
    import nibabel

    image = type(reference)(labels, reference.affine, reference.header, dtype=np.uint8)
    image.header["cal_min"] = image.header["cal_max"] = 0  # the display window of an intensity
    image.header["descrip"], image.header["intent_code"] = b"", 0
    with replacing(path) as draft:
        nibabel.save(image, draft)


def _options(arguments: Arguments, config: "UNetConfig") -> Options:
    window = list(config.crop_size) if arguments.window is None else arguments.window
    whole = window == "whole"
    if not whole and not (
        isinstance(window, list) and len(window) == 3 and all(type(n) is int and n > 0 for n in window)
    ):
        raise ConfigError(f"window is {window}; give three numbers of voxels, as in window=[96,96,96], or window=whole")
    if not 0 <= arguments.overlap < 1:
        raise ConfigError(f"overlap is {arguments.overlap:g}; give {OVERLAP}")
    try:
        budget = None if arguments.budget is None else parse_bytes(arguments.budget)
    except ValueError as error:
        raise ConfigError(f"budget: {error}") from error
    return Options(None if whole else window, overlap=arguments.overlap, flips=arguments.flips, budget=budget)


def _scan_kwargs(arguments: Arguments, config: "UNetConfig") -> dict[str, Any]:
    """The keyword arguments of `scan`: those of training, replaced by the given ones.

    Another layout sets its own label scheme if this has the regions of the model.
    """
    from memsave.data.volumes.layouts import LAYOUTS

    layout, scheme = arguments.layout or config.layout, config.regions
    if layout != config.layout and layout in LAYOUTS and LAYOUTS[layout].scheme.names == scheme.names:
        scheme = LAYOUTS[layout].scheme
    mask = arguments.mask or (config.mask if layout == config.layout else None)
    modalities = _modalities(arguments.modalities, layout, trained=config.modalities)
    return {"layout": layout, "modalities": modalities, "mask": mask, "scheme": scheme.name}


def _modalities(given: str | None, layout: str, *, trained: Sequence[str]) -> list[str]:
    """The input's names of the modalities of training, in the order of the model's input channels."""
    from memsave.data.volumes.layouts import LAYOUTS, canonical_name, in_order

    names = list(trained) if given is None else names_in(given)
    of_layout = LAYOUTS[layout].modalities if layout in LAYOUTS else {}
    ordered = in_order(names, trained)
    if ordered is None:
        files = "" if of_layout else ", and end the files' names with them"
        raise ConfigError(
            f"the input's modalities are {', '.join(names)}, and the run was trained on {', '.join(trained)}; give "
            f"these, in any order, as in modalities=[{','.join(trained)}]{files}"
        )
    if not of_layout:
        return ordered
    lacking = [name for name in ordered if canonical_name(name) not in of_layout]
    if lacking:
        raise ConfigError(
            f"the run was trained on {', '.join(trained)}, and layout={layout} has no {lacking[0]}; give layout=folder "
            f"and files whose names end with these"
        )
    return list(map(canonical_name, ordered))


if __name__ == "__main__":
    interrupt_at_signals()
    sys.exit(main())
