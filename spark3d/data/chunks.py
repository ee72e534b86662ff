"""One array in one `.b2nd` file, each byte covered by a hash that is tested when it is read.

The file is an ordinary Blosc2 frame, which plain `blosc2.open` reads as well. A hash per chunk is
kept elsewhere (in the case's record), with one more over the rest of the frame, so a crop is
checked by reading only the chunks it touches: chunk -> hash -> decompress.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, cast

import blosc2
import numpy as np
import xxhash
from numpy.typing import NDArray

from spark3d.errors import DataError

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
    frame = bytes(stored.to_cframe())
    reread: Any = blosc2.ndarray_from_cframe(frame)
    pieces = [reread.schunk.get_chunk(n) for n in range(reread.schunk.nchunks)]
    head, data = _data_span(frame, pieces)
    rest = xxhash.xxh3_64_hexdigest(frame[:head] + frame[head + data :])
    hashes = "".join(xxhash.xxh3_64_hexdigest(piece) for piece in pieces)
    return frame, Frame(
        array.shape, array.dtype.str, chunk, rows, len(frame), head, data, rest, hashes
    )


def _data_span(frame: bytes, pieces: Sequence[bytes]) -> tuple[int, int]:
    """Where the chunks lie in a frame, one after the other; those of one value take no room."""
    written = b"".join(piece for piece in pieces if len(piece) > 32)
    head = frame.find(written)
    if head < 0:
        raise RuntimeError(
            f"blosc2 {blosc2.__version__} lays out frames in another way than this store relies "
            "on; install blosc2 4.x"
        )
    return (head, len(written)) if written else (len(frame), 0)


class ChunkedFile:
    """Reads boxes of one `.b2nd` file, testing the hash of each chunk each time.

    Args:
        path: the file.
        frame: what it must be.
        name: what to call it in errors (the case's id).

    Raises:
        DataError: absent, truncated or altered.
    """

    def __init__(self, path: Path, frame: Frame, name: str) -> None:
        self._frame, self._name = frame, name
        try:
            size = path.stat().st_size
            with path.open("rb") as stream:
                head = stream.read(frame.head)
                stream.seek(frame.head + frame.data)
                rest = head + stream.read()
        except OSError as error:
            raise self._damage(f"file cannot be read ({error.strerror})") from None
        if size != frame.n_bytes:
            raise self._damage(f"file has {size} bytes instead of {frame.n_bytes}")
        if xxhash.xxh3_64_hexdigest(rest) != frame.rest_hash:
            raise self._damage("frame was altered")
        try:
            self._array: Any = blosc2.open(str(path), mode="r")
        except (RuntimeError, ValueError, OSError):
            raise self._damage("frame cannot be opened") from None
        self._counts = [math.ceil(n / c) for n, c in zip(frame.shape, frame.chunk, strict=True)]

    def read(self, start: Sequence[int], size: Sequence[int]) -> NDArray[np.generic]:
        """The box `[start, start + size)`, which must lie inside the array.

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
        result = np.empty(tuple(size), frame.dtype)
        rows = math.ceil(frame.chunk[-3] / frame.rows) * frame.rows
        buffer = np.empty((*frame.chunk[:-3], rows, *frame.chunk[-2:]), frame.dtype)
        touched = [
            range(a // c, (b - 1) // c + 1)
            for a, b, c in zip(start, stop, frame.chunk, strict=True)
        ]
        for cell in product(*touched):
            self._decode(int(np.ravel_multi_index(cell, self._counts)), buffer)
            into, out_of = [], []
            for index, c, a, b in zip(cell, frame.chunk, start, stop, strict=True):
                low, high = max(a, index * c), min(b, (index + 1) * c)
                into.append(slice(low - a, high - a))
                out_of.append(slice(low - index * c, high - index * c))
            result[tuple(into)] = buffer[tuple(out_of)]
        return result

    def _decode(self, number: int, buffer: NDArray[np.generic]) -> None:
        try:
            piece = self._array.schunk.get_chunk(number)
        except (RuntimeError, ValueError, OSError):
            raise self._damage(f"chunk {number} cannot be read") from None
        expected = self._frame.chunk_hashes[number * DIGITS : (number + 1) * DIGITS]
        fits = int.from_bytes(piece[4:8], "little") == buffer.nbytes  # blosc2 does not check this
        if xxhash.xxh3_64_hexdigest(piece) != expected or not fits:
            raise self._damage(f"chunk {number} was altered")
        # one thread: blosc2's own do not survive the fork of a data worker, which then hangs
        blosc2.decompress2(piece, dst=buffer, dparams={"nthreads": 1})

    def _damage(self, found: str) -> DataError:
        return DataError(
            f"E-STORE-DAMAGED: case {self._name}: its {found}; expected what was prepared; "
            "prepare this case again"
        )
