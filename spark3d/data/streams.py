"""Bytes of files, plain or compressed, read to their last one so that checksums count.

The size that a header claims is held against the file before memory is taken, and a compressed
stream is read to its end, where its checksum stands.
"""

import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Protocol, cast

from spark3d.data.checks import fault
from spark3d.data.header import Header, check_budget
from spark3d.errors import DataError

MAX_BYTES = 8 * 2**30
GZIP = b"\x1f\x8b"
DEFLATE_LIMIT = 1032  # no deflate stream expands further
PIECE = 2**20


class Stream(Protocol):
    """Anything with bytes that come one after the other."""

    def read(self, n: int, /) -> bytes: ...


class ZlibStream:
    """The contents of a zlib stream, as MetaImage files have it; its checksum is tested."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw, self._inflate = raw, zlib.decompressobj()

    def read(self, n: int) -> bytes:
        """Up to `n` bytes; none only at the end.

        Raises:
            EOFError: the stream ends before its checksum.
            zlib.error: its coding or checksum is wrong.
        """
        while not self._inflate.eof:
            data = self._inflate.unconsumed_tail or self._raw.read(PIECE)
            if not data:
                raise EOFError
            if piece := self._inflate.decompress(data, n):
                return piece
        return b""


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """A file as it is; a gzip file by its contents.

    Raises:
        DataError: it cannot be opened, or is called `.gz` and is not gzip.
    """
    with opened_raw(path) as raw:
        start = pull(raw, 2, path)
        raw.seek(0)
        if path.name.endswith(".gz") and start != GZIP:
            raise fault(
                "E-NOT-GZIP", path, "a file that is not gzip" if start else "an empty file",
                "a gzip-compressed volume",
                "download it again (an error page is often saved in its place)",
            )  # fmt: skip
        if start == GZIP:
            with gzip.GzipFile(fileobj=raw, mode="rb") as stream:
                yield cast(BinaryIO, stream)
        else:
            yield raw


@contextmanager
def opened_raw(path: Path) -> Iterator[BinaryIO]:
    """A file as it is.

    Raises:
        DataError: it cannot be opened.
    """
    try:
        raw = path.open("rb")
    except OSError as error:
        raise unreadable(path, error) from None
    with raw:
        yield raw


def unreadable(path: Path, error: OSError) -> DataError:
    """The fault of a file that the system will not read."""
    return fault(
        "E-UNREADABLE", path, f"a file that cannot be read ({error.strerror})", "a readable file",
        "check that it exists, its permissions and its disk",
    )  # fmt: skip


def pull(stream: Stream, n: int, path: Path) -> bytes:
    """Up to `n` bytes.

    Raises:
        DataError: a compressed stream that ends early or is damaged, a disk that fails.
    """
    try:
        return stream.read(n)
    except EOFError:
        raise fault(
            "E-TRUNCATED", path, "a compressed stream that ends early", "the whole file",
            "copy it again",
        ) from None  # fmt: skip
    except (gzip.BadGzipFile, zlib.error):
        raise fault(
            "E-DAMAGED", path, "a compressed stream whose checksum or coding is wrong",
            "an intact file", "copy it again from the original",
        ) from None  # fmt: skip
    except OSError as error:
        raise unreadable(path, error) from None


def fill(stream: Stream, rest: memoryview, path: Path, spare: int = 2**26) -> None:
    """Read exactly `rest`, then on to the end of the stream, where its checksum stands.

    Args:
        stream: at the first of these bytes.
        rest: is filled.
        path: for messages.
        spare: bytes that may follow.

    Raises:
        DataError: as `pull`; too few bytes, or far too many.
    """
    done = 0
    while done < len(rest):
        piece = pull(stream, min(len(rest) - done, 2**24), path)
        if not piece:
            raise fault(
                "E-TRUNCATED", path, f"{len(rest) - done} bytes fewer than its header claims",
                "the whole file", "copy it again",
            )  # fmt: skip
        rest[done : done + len(piece)] = piece
        done += len(piece)
    extra = 0
    while piece := pull(stream, PIECE, path):
        extra += len(piece)
        if extra > spare:
            raise fault(
                "E-TRAILING", path, f"more than {spare} bytes after the voxels its header claims",
                "a file that ends with its voxels", "write the volume anew",
            )  # fmt: skip


def check_claim(
    header: Header, data: Path, compressed: bool, max_bytes: int, before: int = 0
) -> None:
    """Hold the claimed size against the budget and the file, before any memory is taken.

    Args:
        header: with the claim.
        data: file of the voxels.
        compressed: by deflate (gzip or zlib).
        max_bytes: budget.
        before: uncompressed bytes of `data` that lie before what the header counts.

    Raises:
        DataError: more than the file can hold, or than the budget.
    """
    try:
        on_disk = data.stat().st_size
    except OSError as error:
        raise unreadable(data, error) from None
    possible = on_disk * DEFLATE_LIMIT if compressed else on_disk - before
    if header.n_bytes > possible:
        raise fault(
            "E-TRUNCATED", header.path,
            f"a header that claims {header.n_bytes} bytes in a file of {on_disk}",
            "a file as large as its header says", "copy it again",
        )  # fmt: skip
    check_budget(header.n_bytes, max_bytes, header.path)
