"""NIfTI files, read to their last byte so that checksums count, and never trusted about their size.

The size that a header claims is held against the file before memory is taken, and a gzip stream is
read to its end, where its checksum stands.
"""

import gzip
import io
import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
from nibabel.nifti1 import Nifti1Header
from numpy.typing import NDArray

from spark3d.data.checks import fault
from spark3d.data.grid import Affine
from spark3d.data.nifti_header import Geometry, NiftiHeader, header_length, parse_header
from spark3d.errors import DataError

MAX_BYTES = 8 * 2**30
GZIP = b"\x1f\x8b"
DEFLATE_LIMIT = 1032  # no deflate stream expands further


def read_header(path: Path, geometry: Geometry = "agree") -> NiftiHeader:
    """Read and check a header; cheap, it takes the first kilobyte of the file.

    Raises:
        DataError: not a NIfTI file, or a header that cannot be trusted.
    """
    with _opened(path) as stream:
        return parse_header(_read_block(stream, path), path, geometry)


def read_nifti(
    path: Path, geometry: Geometry = "agree", max_bytes: int = MAX_BYTES
) -> tuple[NiftiHeader, NDArray[np.generic]]:
    """Read header and raw voxels (in file axis order, before slope and intercept).

    Raises:
        DataError: as `read_header`; a truncated, damaged or oversized file.
    """
    with _opened(path) as stream:
        block = _read_block(stream, path)
        header = parse_header(block, path, geometry)
        _check_claim(header, isinstance(stream, gzip.GzipFile), max_bytes)
        buffer = bytearray(header.n_bytes)
        buffer[: len(block)] = block
        _fill(stream, memoryview(buffer)[len(block) :], path)
    voxels = np.frombuffer(buffer, header.dtype, math.prod(header.shape), header.offset)
    return header, voxels.reshape(header.shape, order="F")


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    try:
        raw = path.open("rb")
    except OSError as error:
        raise _unreadable(path, error) from None
    with raw:
        start = raw.read(2)
        raw.seek(0)
        if path.name.endswith(".gz") and start != GZIP:
            raise fault(
                "E-NOT-GZIP", path, "a file that is not gzip" if start else "an empty file",
                "a gzip-compressed NIfTI",
                "download it again (an error page is often saved in its place)",
            )  # fmt: skip
        if start == GZIP:
            with gzip.GzipFile(fileobj=raw, mode="rb") as stream:
                yield cast(BinaryIO, stream)
        else:
            yield raw


def _unreadable(path: Path, error: OSError) -> DataError:
    return fault(
        "E-UNREADABLE", path, f"a file that cannot be read ({error.strerror})", "a readable file",
        "check that it exists, its permissions and its disk",
    )  # fmt: skip


def _pull(stream: BinaryIO, n: int, path: Path) -> bytes:
    try:
        return stream.read(n)
    except EOFError:
        raise fault(
            "E-TRUNCATED", path, "a gzip stream that ends early", "the whole file", "copy it again"
        ) from None
    except (gzip.BadGzipFile, zlib.error):
        raise fault(
            "E-DAMAGED", path, "a gzip stream whose checksum or coding is wrong", "an intact file",
            "copy it again from the original",
        ) from None  # fmt: skip
    except OSError as error:
        raise _unreadable(path, error) from None


def _read_block(stream: BinaryIO, path: Path) -> bytes:
    block = _pull(stream, 352, path)
    if len(block) == 352 and 540 in (header_length(block, "<"), header_length(block, ">")):
        block += _pull(stream, 544 - 352, path)
    if len(block) < 352:
        raise fault(
            "E-TRUNCATED", path, f"{len(block)} bytes", "at least a NIfTI header of 352 bytes",
            "copy the file again",
        )  # fmt: skip
    return block


def _fill(stream: BinaryIO, rest: memoryview, path: Path) -> None:
    """Read exactly `rest`, then on to the end of the stream, where gzip keeps its checksum."""
    done = 0
    while done < len(rest):
        piece = _pull(stream, min(len(rest) - done, 2**24), path)
        if not piece:
            raise fault(
                "E-TRUNCATED", path, f"{len(rest) - done} bytes fewer than its header claims",
                "the whole file", "copy it again",
            )  # fmt: skip
        rest[done : done + len(piece)] = piece
        done += len(piece)
    extra = 0
    while piece := _pull(stream, 2**20, path):
        extra += len(piece)
        if extra > 2**26:
            raise fault(
                "E-TRAILING", path, "more than 64 MiB after the voxels its header claims",
                "a file that ends with its voxels", "write the volume anew",
            )  # fmt: skip


def _check_claim(header: NiftiHeader, gzipped: bool, max_bytes: int) -> None:
    """Hold the claimed size against the budget and the file, before any memory is taken."""
    on_disk = header.path.stat().st_size
    possible = on_disk * DEFLATE_LIMIT if gzipped else on_disk
    if header.n_bytes > possible:
        raise fault(
            "E-TRUNCATED", header.path,
            f"a header that claims {header.n_bytes} bytes in a file of {on_disk}",
            "a file as large as its header says", "copy it again",
        )  # fmt: skip
    if header.n_bytes > max_bytes:
        raise fault(
            "E-TOO-LARGE", header.path, f"a volume of {header.n_bytes / 2**30:.1f} GiB",
            f"at most {max_bytes / 2**30:.1f} GiB", "crop it, or raise the memory limit",
        )  # fmt: skip


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
