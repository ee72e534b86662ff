"""One array in one `.b2nd` file, each byte covered by a hash that is tested when it is read.

The file is an ordinary Blosc2 frame, which plain `blosc2.open` reads as well. A hash per chunk is
kept elsewhere (in the case's record), with one more over the rest of the frame, so a crop is
checked by reading only the chunks it touches: chunk -> hash -> decompress.
"""

import contextlib
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any, cast

import blosc2
import numpy as np
import xxhash
from numpy.typing import DTypeLike, NDArray

from spark3d.errors import DataError

REPAIR = "run the same 'spark3d prepare' with --verify to prepare this case again"
DIGITS = 16  # hex digits of a 64-bit hash


@dataclass(frozen=True)
class Frame:
    """What is known of a `.b2nd` file from outside it.

    `head` and `data` are byte counts: of the frame's header, and of the chunks that follow it.
    `rest_hash` covers header and trailer; `rows` is the thickness of a block (a chunk is padded to
    a multiple of it along its third axis from the end; blocks are whole along the last two);
    `chunk_hashes` holds 16 hex digits per chunk, in C order of the grid of chunks.
    """

    shape: tuple[int, ...]
    dtype: str
    chunk: tuple[int, ...]
    rows: int
    n_bytes: int
    head: int
    data: int
    rest_hash: str
    chunk_hashes: str

    def to_json(self) -> dict[str, object]:
        """Plain values, for the record."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in self.__dict__.items()}

    @classmethod
    def from_json(cls, data: dict) -> "Frame":
        """Undo `to_json`."""
        return cls(**{**data, "shape": tuple(data["shape"]), "chunk": tuple(data["chunk"])})


def encode(array: NDArray[np.generic], side: int = 64) -> tuple[bytes, Frame]:
    """Compress an array `(..., i, j, k)` into a frame of `side`^3 chunks (LZ4-5, bit shuffle).

    Returns:
        The bytes of the file, the same for the same input, and what to check them by.
    """
    chunk = (*(1,) * (array.ndim - 3), *(min(side, n) for n in array.shape[-3:]))
    rows = max(1, min(chunk[-3], 2**15 // (chunk[-2] * chunk[-1])))
    stored: Any = blosc2.asarray(
        cast(Any, np.ascontiguousarray(array)),
        chunks=chunk,
        blocks=(*chunk[:-3], rows, *chunk[-2:]),
        cparams={
            "codec": blosc2.Codec.LZ4,
            "clevel": 5,
            "filters": [blosc2.Filter.BITSHUFFLE],
            "filters_meta": [0],
            "nthreads": 1,
        },
    )
    frame = cast(bytes, stored.to_cframe())
    del stored  # the frame holds all of it; two copies of a volume are enough
    head, spans = _layout(frame)
    reread: Any = blosc2.ndarray_from_cframe(frame)
    whole = memoryview(frame)
    hashes = "".join(
        xxhash.xxh3_64_hexdigest(whole[begin : begin + length] if length else _piece(reread, n))
        for n, (begin, length) in enumerate(spans)
    )
    data = sum(length for _, length in spans)
    head = head if data else len(frame)
    rest = xxhash.xxh3_64_hexdigest(frame[:head] + frame[head + data :])
    return frame, Frame(
        array.shape, array.dtype.str, chunk, rows, len(frame), head, data, rest, hashes
    )


def _piece(array: Any, number: int) -> bytes:
    """A chunk of one value, which blosc2 makes from its table of chunks."""
    return array.schunk.get_chunk(number)


def _layout(frame: bytes) -> tuple[int, list[tuple[int, int]]]:
    """Bytes of a frame's header, and offset and length of each chunk, from the frame's own fields.

    Chunks lie one after the other; those of one value take no room. Every chunk tells its own
    length, which must agree: another layout of a later blosc2 is met here, not by a reader.

    Raises:
        RuntimeError: it does not agree.
    """
    head = int.from_bytes(frame[11:15], "big")
    data = int.from_bytes(frame[39:47], "big")
    table = head + data
    length = int.from_bytes(frame[table + 12 : table + 16], "little")
    spans: list[tuple[int, int]] = []
    if 0 < length <= len(frame) - table:
        with contextlib.suppress(RuntimeError, ValueError):  # no table there: told below
            spans = _spans(frame[table : table + length], head, data)
    stored = [(begin, size) for begin, size in spans if size]
    told = [int.from_bytes(frame[begin + 12 : begin + 16], "little") for begin, _ in stored]
    if not spans or told != [size for _, size in stored] or sum(told) != data:
        raise RuntimeError(
            f"blosc2 {blosc2.__version__} lays out frames in another way than this store relies "
            "on; install blosc2 4.x"
        )
    return head, spans


class ChunkedFile:
    """Reads boxes of one `.b2nd` file, testing the hash of each chunk each time.

    A chunk goes by one system call from the file into a buffer that stays in the processor's cache,
    is hashed there and decompressed from there; blosc2's own reader would copy it three times,
    which costs as much as to decompress it.

    Args:
        path: the file; it is opened anew for each box, so nothing is held between two reads.
        frame: what it must be.
        name: what to call it in errors (the case's id).

    Raises:
        DataError: absent, truncated or altered.
    """

    def __init__(self, path: Path, frame: Frame, name: str) -> None:
        self._path, self._frame, self._name = path, frame, name
        try:
            size = path.stat().st_size
            with path.open("rb") as stream:
                head = stream.read(frame.head)
                stream.seek(frame.head + frame.data)
                tail = stream.read()
        except OSError as error:
            raise self._damage(f"file cannot be read ({error.strerror})") from None
        if size != frame.n_bytes:
            raise self._damage(f"file has {size} bytes instead of {frame.n_bytes}")
        if xxhash.xxh3_64_hexdigest(head + tail) != frame.rest_hash:
            raise self._damage("frame was altered")
        self._counts = [math.ceil(n / c) for n, c in zip(frame.shape, frame.chunk, strict=True)]
        hashes = frame.chunk_hashes
        self._hashes = [int(hashes[n : n + DIGITS], 16) for n in range(0, len(hashes), DIGITS)]
        self._spans = _spans_of(tail, frame)
        self._longest = max((length for _, length in self._spans), default=0)

    def read(
        self, start: Sequence[int], size: Sequence[int], dtype: DTypeLike | None = None
    ) -> NDArray[Any]:
        """The box `[start, start + size)`, which must lie inside the array.

        Args:
            start: first voxel.
            size: voxels per axis.
            dtype: of the result; None is that of the array.

        Raises:
            ValueError: the box does not lie inside.
            DataError: a chunk was altered.
        """
        frame = self._frame
        stop = [a + n for a, n in zip(start, size, strict=True)]
        if (
            min(start) < 0
            or min(size) < 1
            or any(b > n for b, n in zip(stop, frame.shape, strict=True))
        ):
            raise ValueError(
                f"{self._name}: the box from {tuple(start)} to {tuple(stop)} does not lie inside "
                f"the array of shape {frame.shape}"
            )
        result = np.empty(tuple(size), frame.dtype if dtype is None else dtype)
        rows = math.ceil(frame.chunk[-3] / frame.rows) * frame.rows
        decoded = np.empty((*frame.chunk[:-3], rows, *frame.chunk[-2:]), frame.dtype)
        touched = [
            range(a // c, (b - 1) // c + 1)
            for a, b, c in zip(start, stop, frame.chunk, strict=True)
        ]
        cells = {self._number(cell): cell for cell in product(*touched)}
        packed = memoryview(bytearray(self._longest))
        try:
            with self._path.open("rb", buffering=0) as stream:
                self._announce(stream.fileno(), cells)
                for number, cell in cells.items():
                    self._decode(number, self._load(stream.fileno(), number, packed), decoded)
                    into, out_of = [], []
                    for index, c, a, b in zip(cell, frame.chunk, start, stop, strict=True):
                        low, high = max(a, index * c), min(b, (index + 1) * c)
                        into.append(slice(low - a, high - a))
                        out_of.append(slice(low - index * c, high - index * c))
                    result[tuple(into)] = decoded[tuple(out_of)]
        except OSError as error:
            raise self._damage(f"file cannot be read ({error.strerror})") from None
        return result

    def verify(self) -> None:
        """Test the hash of every chunk, decompressing none.

        Raises:
            DataError: a chunk was altered.
        """
        packed = memoryview(bytearray(self._longest))
        try:
            with self._path.open("rb", buffering=0) as stream:
                for number in range(len(self._hashes)):
                    self._test(number, self._load(stream.fileno(), number, packed))
        except OSError as error:
            raise self._damage(f"file cannot be read ({error.strerror})") from None

    def _number(self, cell: Sequence[int]) -> int:
        """Place of a chunk in C order."""
        number = 0
        for index, count in zip(cell, self._counts, strict=True):
            number = number * count + index
        return number

    def _announce(self, handle: int, numbers: Iterable[int]) -> None:
        """Let the disk fetch all chunks at once, neighbours in one request, and nothing else."""
        if not hasattr(os, "posix_fadvise"):
            return
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_RANDOM)
        begin = end = 0
        for offset, length in (self._spans[number] for number in numbers):
            if offset != end and end > begin:
                os.posix_fadvise(handle, begin, end - begin, os.POSIX_FADV_WILLNEED)
            begin, end = (begin if offset == end else offset), offset + length
        if end > begin:
            os.posix_fadvise(handle, begin, end - begin, os.POSIX_FADV_WILLNEED)

    def _load(self, handle: int, number: int, packed: memoryview) -> memoryview:
        """The compressed bytes of a chunk, at the front of `packed` if they lie in the file."""
        offset, length = self._spans[number]
        if length == 0:  # a chunk of one value: blosc2 makes it from its table of chunks
            try:
                return memoryview(self._plain.schunk.get_chunk(number))
            except (RuntimeError, ValueError):
                raise self._damage(f"chunk {number} cannot be read") from None
        piece = packed[:length]
        if os.preadv(handle, [piece], offset) != length:
            raise self._damage(f"chunk {number} cannot be read")
        return piece

    @cached_property
    def _plain(self) -> Any:
        return blosc2.open(str(self._path), mode="r")

    def _decode(self, number: int, piece: memoryview, decoded: NDArray[np.generic]) -> None:
        self._test(number, piece)
        if int.from_bytes(piece[4:8], "little") != decoded.nbytes:  # blosc2 does not check this
            raise self._damage(f"chunk {number} has another size than the record says")
        # one thread: blosc2's own do not survive the fork of a data worker, which then hangs
        blosc2.decompress2(piece, dst=decoded, dparams={"nthreads": 1})

    def _test(self, number: int, piece: memoryview) -> None:
        """Refuse a chunk that has not the hash it was stored with."""
        if xxhash.xxh3_64_intdigest(piece) != self._hashes[number]:
            raise self._damage(f"chunk {number} was altered")

    def _damage(self, found: str) -> DataError:
        return DataError(
            f"E-STORE-DAMAGED: case {self._name}: its {found}; expected what was prepared; {REPAIR}"
        )


def _spans(table: bytes, head: int, data: int) -> list[tuple[int, int]]:
    """Offset and length of each chunk in the file; length 0 for one that takes no room in it.

    `table` holds 64-bit offsets from the end of the header, compressed as a chunk is; a negative
    one marks a chunk of one value.
    """
    offsets = np.frombuffer(cast(bytes, blosc2.decompress2(table, dparams={"nthreads": 1})), "<i8")
    stored = np.flatnonzero(offsets >= 0)
    spans = [(0, 0)] * len(offsets)
    ends = [*offsets[stored[1:]].tolist(), data][: len(stored)]
    for number, begin, end in zip(stored.tolist(), offsets[stored].tolist(), ends, strict=True):
        spans[number] = (head + begin, end - begin)
    return spans


def _spans_of(tail: bytes, frame: Frame) -> list[tuple[int, int]]:
    """`_spans` from the trailer of a known frame, which the table opens."""
    if frame.data == 0:
        return [(0, 0)] * (len(frame.chunk_hashes) // DIGITS)
    return _spans(tail[: int.from_bytes(tail[12:16], "little")], frame.head, frame.data)
