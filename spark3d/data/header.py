"""What every reader says of a file before its voxels are read, and the checks they share."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from spark3d.data.checks import fault
from spark3d.data.grid import Affine

World = Literal["RAS", "LAS", "LPS"]


@dataclass(frozen=True)
class Header:
    """What is used of a file: no text field is kept.

    `shape` is in the order of the file, a fourth axis holding channels; trailing axes of length 1
    are removed beyond the third. `affine` takes a voxel to millimetres in the file's own `world`:
    `data/io.py` alone turns it to RAS. Physical intensity = stored * `slope` + `intercept`.
    """

    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype
    affine: Affine
    world: World = "RAS"
    slope: float = 1.0
    intercept: float = 0.0
    offset: int = 0

    @property
    def voxel_bytes(self) -> int:
        """Bytes of the voxels, uncompressed."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def n_bytes(self) -> int:
        """Bytes of the voxels and of all that lies before them, uncompressed."""
        return self.offset + self.voxel_bytes


def checked_shape(sizes: Sequence[int], path: Path) -> tuple[int, ...]:
    """Sizes of a volume, without trailing axes of length 1.

    Raises:
        DataError: sizes below 1, fewer than three axes, a single slice, more than four axes.
    """
    shape = list(sizes)
    while len(shape) > 3 and shape[-1] == 1:
        shape.pop()
    if not shape or min(shape) < 1:
        raise fault(
            "E-DIMENSIONS", path, f"the dimensions {shape}", "positive sizes",
            "write the header anew",
        )  # fmt: skip
    if len(shape) < 3 or min(shape[:3]) == 1:
        raise fault(
            "E-2D", path, f"an image of size {tuple(shape)}", "a volume of three axes",
            "stack its slices, or train on ordinary images with --dims 2",
        )  # fmt: skip
    if len(shape) > 4:
        raise fault(
            "E-5D", path, f"{len(shape)} axes {tuple(shape)}", "three, or four with channels last",
            "split the file into volumes",
        )  # fmt: skip
    return tuple(shape)


def check_budget(n_bytes: int, max_bytes: int, path: Path) -> None:
    """Refuse voxels that would take more memory than allowed, before any is taken."""
    if n_bytes > max_bytes:
        raise fault(
            "E-TOO-LARGE", path, f"a volume of {n_bytes / 2**30:.1f} GiB",
            f"at most {max_bytes / 2**30:.1f} GiB", "crop it, or resample it to a larger spacing",
        )  # fmt: skip
