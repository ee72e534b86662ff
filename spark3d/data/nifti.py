"""NIfTI files, read to their last byte so that checksums count, and never trusted about their size.

nibabel knows the fields of the header; its own reader stops before the checksum of a gzip stream.
"""

import gzip
import io
import math
from pathlib import Path
from typing import BinaryIO

import numpy as np
from nibabel.nifti1 import Nifti1Header
from numpy.typing import NDArray

from spark3d.data.checks import fault
from spark3d.data.grid import Affine
from spark3d.data.header import Header
from spark3d.data.nifti_header import Geometry, header_length, parse_header
from spark3d.data.streams import MAX_BYTES, check_claim, fill, opened, pull


def read_header(path: Path, geometry: Geometry = "agree") -> Header:
    """Read and check a header; cheap, it takes the first kilobyte of the file.

    Raises:
        DataError: not a NIfTI file, or a header that cannot be trusted.
    """
    with opened(path) as stream:
        return parse_header(_read_block(stream, path), path, geometry)


def read_nifti(
    path: Path, geometry: Geometry = "agree", max_bytes: int = MAX_BYTES
) -> tuple[Header, NDArray[np.generic]]:
    """Read header and raw voxels (in file axis order, before slope and intercept).

    Raises:
        DataError: as `read_header`; a truncated, damaged or oversized file.
    """
    with opened(path) as stream:
        block = _read_block(stream, path)
        header = parse_header(block, path, geometry)
        check_claim(header, path, isinstance(stream, gzip.GzipFile), max_bytes)
        buffer = bytearray(header.n_bytes)
        buffer[: len(block)] = block
        fill(stream, memoryview(buffer)[len(block) :], path)
    voxels = np.frombuffer(buffer, header.dtype, math.prod(header.shape), header.offset)
    return header, voxels.reshape(header.shape, order="F")


def _read_block(stream: BinaryIO, path: Path) -> bytes:
    block = pull(stream, 352, path)
    if len(block) == 352 and 540 in (header_length(block, "<"), header_length(block, ">")):
        block += pull(stream, 544 - 352, path)
    if len(block) < 352:
        raise fault(
            "E-TRUNCATED", path, f"{len(block)} bytes", "at least a NIfTI header of 352 bytes",
            "copy the file again",
        )  # fmt: skip
    return block


def encode_nifti(voxels: NDArray[np.generic], affine: Affine, gzipped: bool) -> bytes:
    """The bytes of a NIfTI-1 file in mm with sform and qform, the same for the same input."""
    header = Nifti1Header()
    header.set_data_dtype(voxels.dtype)
    header.set_data_shape(voxels.shape)
    header.set_sform(affine, code=1)
    header.set_qform(affine, code=1, strip_shears=True)
    header.set_xyzt_units("mm")
    header.set_slope_inter(1, 0)
    header["vox_offset"] = 352
    header["magic"] = b"n+1"
    body = io.BytesIO()
    body.write(header.binaryblock + b"\0\0\0\0")
    body.write(voxels.astype(header.get_data_dtype(), copy=False).tobytes(order="F"))
    raw = body.getvalue()
    return gzip.compress(raw, compresslevel=5, mtime=0) if gzipped else raw
