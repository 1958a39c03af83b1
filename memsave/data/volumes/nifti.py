"""Reading NIfTI files for training, the data check and prediction.

The first bytes of a file, not its name, decide whether it is compressed and whether it is NIfTI-1 or NIfTI-2.
Intensities become float32; labels keep their type. nibabel is imported when a file is read.
"""

import gzip
import math
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from memsave.data.errors import DataError

LARGEST = 1e15  # z-scoring sums squares in float32, which stay finite for 10^8 such voxels
_GZIP = b"\x1f\x8b"
_HEADER_BYTES = 540  # of NIfTI-2; NIfTI-1 has 348


def read_nifti(path: Path) -> Any:
    """The NIfTI image at `path`. The whole file is read, so gzip verifies its checksum."""
    with _Readable(path):
        content = path.read_bytes()
        if content.startswith(_GZIP):
            content = gzip.decompress(content)
        image = _image_class(content).from_bytes(content)
    _check_dtype(path, image)
    return image


def read_header(path: Path) -> Any:
    """The NIfTI image at `path` without its voxels; DataError if the file is shorter than its header requires."""
    with _Readable(path), path.open("rb") as file:
        compressed = file.read(len(_GZIP)) == _GZIP
        file.seek(0)
        stream: Any = gzip.GzipFile(fileobj=file) if compressed else file
        start = stream.read(_HEADER_BYTES)
        stream.seek(0)
        image = _image_class(start).from_stream(stream)
        expected_bytes = image.dataobj.offset + math.prod(image.shape) * image.get_data_dtype().itemsize
        length = _length(file, compressed=compressed)
    _check_dtype(path, image)
    if length != expected_bytes:
        read_values(path, read_nifti(path))  # raises if voxels are missing; a longer file is valid
    return image


def read_intensities(path: Path, image: Any) -> np.ndarray:
    """The voxels of an image as float32; DataError if they are larger than LARGEST."""
    with _Readable(path), np.errstate(over="ignore"):  # the file may be truncated
        voxels = image.get_fdata(dtype=np.float32, caching="unchanged")
    if not max(voxels.max(initial=0), -voxels.min(initial=0)) > LARGEST:  # also True for NaN
        return voxels
    exact = np.abs(read_values(path, image))
    largest = exact[np.isfinite(exact)].max(initial=0)
    if largest > LARGEST:
        raise DataError(
            f"{path} holds voxels of up to {largest:.3g} as {_type_name(image)}, and more than {LARGEST:g} cannot be "
            f"normalised in float32: rescale the image and export it again."
        )
    return voxels  # the file itself contains infinite voxels


def read_values(path: Path, image: Any) -> np.ndarray:
    """The voxels of an image in their stored type, or as float64 if the header scales them."""
    with _Readable(path):
        return np.asanyarray(image.dataobj)


def step_of(image: Any) -> float:
    """The difference of neighbouring values in a file of integers that the header scales; 0 in a file of floats."""
    return abs(float(image.dataobj.slope)) if image.get_data_dtype().kind in "iu" else 0.0


def _image_class(content: bytes) -> Any:
    """The nibabel class for a file that starts with these bytes."""
    from nibabel import Nifti1Image, Nifti2Image

    for kind in (Nifti1Image, Nifti2Image):
        if kind.header_class.may_contain_header(content):
            return kind
    raise ValueError("it does not begin with a NIfTI header")


def _check_dtype(path: Path, image: Any) -> None:
    """Raise DataError unless a voxel is one real number of at most 64 bits."""
    dtype = image.get_data_dtype()
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        raise DataError(
            f"{path} holds voxels of type {_type_name(image)}, and float32 cannot hold them: "
            f"export it with one real number per voxel, as float32 or int16."
        )


def _type_name(image: Any) -> str:
    return str(image.header.get_value_label("datatype"))


def _length(file: Any, *, compressed: bool) -> int:
    """The uncompressed size of an open file; a gzip file ends with this size modulo 2^32."""
    size = file.seek(0, os.SEEK_END)
    if not compressed:
        return size
    file.seek(-4, os.SEEK_END)
    return int.from_bytes(file.read(4), "little")


class _Readable:
    """Context that converts the errors of reading a damaged file to DataError."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        from nibabel.filebasedimages import ImageFileError
        from nibabel.spatialimages import HeaderDataError
        from nibabel.wrapstruct import WrapStructError

        of_nibabel = (ImageFileError, HeaderDataError, WrapStructError)
        if isinstance(error, (OSError, EOFError, ValueError, TypeError, OverflowError, zlib.error, *of_nibabel)):
            cause = " ".join(str(error).split()) or type(error).__name__
            raise DataError(
                f"{self.path} is not a readable NIfTI file ({cause}): download or copy it again."
            ) from error
