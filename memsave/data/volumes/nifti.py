"""Reading NIfTI files: one reader for training, the check and prediction.

Whether a file is compressed, and whether it is NIfTI-1 or NIfTI-2, follows from its first bytes and not from its name.
Intensities become float32, labels keep their own numbers. nibabel is imported when a file is read.
"""

import gzip
import math
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from memsave.data.errors import DataError

LARGEST = 1e15  # z-scoring sums squares in float32: those of 10^8 such voxels are still finite
_GZIP = b"\x1f\x8b"
_HEADER_BYTES = 540  # of NIfTI-2; NIfTI-1 has 348


def read_nifti(path: Path) -> Any:
    """The NIfTI image at `path`, from its complete bytes: gzip then verifies the checksum of the whole file."""
    with _Readable(path):
        content = path.read_bytes()
        if content.startswith(_GZIP):
            content = gzip.decompress(content)
        image = _image_class(content).from_bytes(content)
    _check_dtype(path, image)
    return image


def read_header(path: Path) -> Any:
    """The NIfTI image at `path` without its voxels; DataError where the file is shorter than its header promises."""
    with _Readable(path), path.open("rb") as file:
        compressed = file.read(len(_GZIP)) == _GZIP
        file.seek(0)
        stream: Any = gzip.GzipFile(fileobj=file) if compressed else file
        start = stream.read(_HEADER_BYTES)
        stream.seek(0)
        image = _image_class(start).from_stream(stream)
        promised = image.dataobj.offset + math.prod(image.shape) * image.get_data_dtype().itemsize
        length = _length(file, compressed=compressed)
    _check_dtype(path, image)
    if length != promised:
        read_values(path, read_nifti(path))  # raises where voxels are missing; a file may be longer than it need be
    return image


def read_intensities(path: Path, image: Any) -> np.ndarray:
    """The voxels of an image as float32; DataError where they are too large for it."""
    with _Readable(path), np.errstate(over="ignore"):  # there may be fewer bytes than the header promises
        voxels = image.get_fdata(dtype=np.float32, caching="unchanged")
    if not max(voxels.max(initial=0), -voxels.min(initial=0)) > LARGEST:  # also where it is NaN
        return voxels
    exact = np.abs(read_values(path, image))
    largest = exact[np.isfinite(exact)].max(initial=0)
    if largest > LARGEST:
        raise DataError(
            f"{path} holds voxels of up to {largest:.3g} as {_type_name(image)}, and more than {LARGEST:g} cannot be "
            f"normalised in float32: rescale the image and export it again."
        )
    return voxels  # infinite in the file


def read_values(path: Path, image: Any) -> np.ndarray:
    """The voxels of an image in the type that they are stored in, or as float64 where the header scales them."""
    with _Readable(path):
        return np.asanyarray(image.dataobj)


def step_of(image: Any) -> float:
    """The distance of neighbouring values in a file of integers that the header scales; 0 in a file of floats."""
    return abs(float(image.dataobj.slope)) if image.get_data_dtype().kind in "iu" else 0.0


def _image_class(content: bytes) -> Any:
    """The class of nibabel that reads a file of these first bytes."""
    from nibabel import Nifti1Image, Nifti2Image

    for kind in (Nifti1Image, Nifti2Image):
        if kind.header_class.may_contain_header(content):
            return kind
    raise ValueError("it does not begin with a NIfTI header")


def _check_dtype(path: Path, image: Any) -> None:
    """Refuse types whose values are no single real number of at most 64 bits."""
    dtype = image.get_data_dtype()
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        raise DataError(
            f"{path} holds voxels of type {_type_name(image)}, and float32 cannot hold them: "
            f"export it with one real number per voxel, as float32 or int16."
        )


def _type_name(image: Any) -> str:
    return str(image.header.get_value_label("datatype"))


def _length(file: Any, *, compressed: bool) -> int:
    """The bytes of an open file, uncompressed: gzip ends with their number modulo 2^32."""
    size = file.seek(0, os.SEEK_END)
    if not compressed:
        return size
    file.seek(-4, os.SEEK_END)
    return int.from_bytes(file.read(4), "little")


class _Readable:
    """Whatever reading a damaged file raises, as a DataError."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        from nibabel.filebasedimages import ImageFileError
        from nibabel.spatialimages import HeaderDataError
        from nibabel.wrapstruct import WrapStructError

        of_nibabel = (ImageFileError, HeaderDataError, WrapStructError)
        if isinstance(error, (OSError, EOFError, ValueError, TypeError, zlib.error, *of_nibabel)):
            cause = " ".join(str(error).split()) or type(error).__name__
            raise DataError(
                f"{self.path} is not a readable NIfTI file ({cause}): download or copy it again."
            ) from error
