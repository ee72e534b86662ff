"""NIfTI files for the tests, sound or with one field of the header made wrong."""

import gzip
import math
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np

from spark3d.data.nifti import encode_nifti

Edit = Callable[[bytearray], None]
DEFAULT = np.diag([2.0, 1.5, 3.0, 1.0])
DEFAULT[:3, 3] = -20, 10, 5


def ct_like(size: tuple[int, ...] = (20, 18, 12), seed: int = 0) -> np.ndarray:
    """An int16 volume of air with a textured body of about 40 HU in the middle."""
    rng = np.random.default_rng(seed)
    array = np.full(size, -1000, np.int16)
    inner = tuple(slice(n // 6, n - n // 6) for n in size)
    shape = tuple(s.stop - s.start for s in inner)
    array[inner] = rng.normal(40, 30, shape).astype(np.int16)
    return array


def write_nifti(
    path: Path,
    array: np.ndarray | None = None,
    affine: np.ndarray = DEFAULT,
    edit: Edit | None = None,
) -> Path:
    """Write a file; `edit` changes the raw bytes before they are compressed."""
    array = ct_like() if array is None else array
    raw = bytearray(encode_nifti(array, affine, gzipped=False))
    if edit:
        edit(raw)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(bytes(raw), mtime=0) if path.suffix == ".gz" else bytes(raw))
    return path


def put(code: str, *places: tuple[int, float]) -> Edit:
    """An edit that packs numbers of one struct code at byte offsets."""

    def edit(raw: bytearray) -> None:
        for offset, value in places:
            struct.pack_into(f"<{code}", raw, offset, value)

    return edit


def both(*edits: Edit) -> Edit:
    """Several edits, one after the other."""

    def edit(raw: bytearray) -> None:
        for one in edits:
            one(raw)

    return edit


def pixdim(axis: int, value: float) -> Edit:
    """Set one voxel size (axis from 0)."""
    return put("f", (80 + 4 * axis, value))


def codes(qform: int, sform: int) -> Edit:
    """Set the codes of both forms."""
    return put("h", (252, qform), (254, sform))


def sform(affine: np.ndarray) -> Edit:
    """Set the three rows of the sform."""
    return put("f", *[(280 + 4 * k, float(v)) for k, v in enumerate(affine[:3].ravel())])


def dims(*sizes: int) -> Edit:
    """Set the number of axes and their sizes."""
    return put("h", (40, len(sizes)), *[(42 + 2 * k, n) for k, n in enumerate(sizes)])


def datatype(code: int, bits: int) -> Edit:
    """Set data type and bits per voxel."""
    return put("h", (70, code), (72, bits))


def signed_permutation(order: tuple[int, int, int], signs: tuple[int, int, int]) -> np.ndarray:
    """A 3x3 matrix that takes voxel axis k to world axis `order[k]` in direction `signs[k]`."""
    matrix = np.zeros((3, 3))
    for axis, (world, sign) in enumerate(zip(order, signs, strict=True)):
        matrix[world, axis] = sign
    return matrix


def rotation(degrees: float, axis: int) -> np.ndarray:
    """A 3x3 rotation about one world axis."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    one, two = [k for k in range(3) if k != axis]
    matrix = np.eye(3)
    matrix[one, one], matrix[one, two], matrix[two, one], matrix[two, two] = c, -s, s, c
    return matrix
