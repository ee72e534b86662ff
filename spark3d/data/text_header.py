"""Volumes described by lines of text, as NRRD and MetaImage files are.

The libraries for these formats return normally from a damaged or truncated file, so the fields are
read here, and the voxels as those of NIfTI are: to the last byte, with their checksum.
"""

import gzip
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

from spark3d.data.checks import fault
from spark3d.data.header import Header
from spark3d.data.streams import Stream, ZlibStream, check_claim, fill, opened_raw
from spark3d.errors import DataError

MOST_HEADER_BYTES = 2**16
Coding = Literal["raw", "gzip", "zlib"]


@dataclass(frozen=True)
class Layout:
    """Where the voxels of a header lie.

    Attributes:
        header: what is used of it; a fourth axis holds channels.
        data: file of the voxels.
        before: bytes of that file before them; -1 if the voxels end the file.
        coding: how they are compressed.
        channels_first: in the file, the channels of a voxel lie side by side.
    """

    header: Header
    data: Path
    before: int
    coding: Coding
    channels_first: bool = False


Parse = Callable[[Path, BinaryIO], Layout]


def read_layout(path: Path, parse: Parse) -> Layout:
    """Read the header alone.

    Raises:
        DataError: from `parse`, or the file cannot be opened.
    """
    with opened_raw(path) as stream:
        return parse(path, stream)


def read_body(path: Path, parse: Parse, max_bytes: int) -> tuple[Header, NDArray[np.generic]]:
    """Read header and stored voxels, in file axis order with channels last.

    Raises:
        DataError: as `read_layout`; a truncated, damaged or oversized file.
    """
    layout = read_layout(path, parse)
    header, data = layout.header, layout.data
    before = layout.before
    with opened_raw(data) as raw:
        if before < 0:
            before = max(0, data.stat().st_size - header.voxel_bytes)
        check_claim(header, data, layout.coding != "raw", max_bytes, before)
        buffer = bytearray(header.voxel_bytes)
        raw.seek(before)
        fill(_decoded(raw, layout.coding), memoryview(buffer), data, spare=0)
    flat = np.frombuffer(buffer, header.dtype)
    if not layout.channels_first:
        return header, flat.reshape(header.shape, order="F")
    *size, channels = header.shape
    return header, np.moveaxis(flat.reshape((channels, *size), order="F"), 0, -1)


def _decoded(raw: BinaryIO, coding: Coding) -> Stream:
    if coding == "gzip":
        return gzip.GzipFile(fileobj=raw, mode="rb")
    return ZlibStream(raw) if coding == "zlib" else raw


def text_lines(stream: BinaryIO, path: Path, last: Callable[[str], bool]) -> list[str]:
    """The lines of a header, up to one that is `last` or the end of the file.

    Raises:
        DataError: more than 64 KiB without such a line.
    """
    lines, total = [], 0
    while total < MOST_HEADER_BYTES:
        raw = stream.readline(MOST_HEADER_BYTES)
        total += len(raw)
        line = raw.decode("latin-1").strip()
        lines.append(line)
        if not raw or last(line):
            return lines
    raise bad_header(path, "no end of its header within 64 KiB")


def numbers(text: str, path: Path, what: str) -> list[float]:
    """Finite numbers below 2^31 between blanks, commas and brackets.

    Raises:
        DataError: anything else.
    """
    try:
        values = [float(part) for part in text.translate(BLANKS).split()]
    except ValueError:
        values = [math.nan]
    if not all(math.isfinite(value) and abs(value) < 2**31 for value in values):
        raise bad_header(path, f"a {what} that is not made of finite numbers below 2^31")
    return values


BLANKS = str.maketrans("(),", "   ")


def whole_numbers(text: str, path: Path, what: str) -> list[int]:
    """As `numbers`, whole."""
    values = numbers(text, path, what)
    if not all(value.is_integer() for value in values):
        raise bad_header(path, f"a {what} that is not made of whole numbers")
    return [int(value) for value in values]


def beside(path: Path, name: str) -> Path:
    """The data file of a detached header, which must lie in its folder or below.

    Raises:
        DataError: it leads elsewhere.
    """
    relative = Path(name)
    if not name or "\0" in name or relative.is_absolute() or ".." in relative.parts:
        raise bad_header(path, "a data file outside of its folder, or none")
    return path.parent / relative


def bad_header(path: Path, found: str) -> DataError:
    """The fault of a header that cannot be used."""
    return fault(
        "E-HEADER", path, found, "a header as the format describes it",
        "write the volume anew, e.g. as NIfTI",
    )  # fmt: skip
