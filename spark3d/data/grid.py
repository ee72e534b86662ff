"""Voxel grids in space: a file's own, and the same in RAS+ order.

Every affine is 4x4, float64, and maps a voxel index (the centre of that voxel) to millimetres in
RAS+ world space (x to the patient's Right, y Anterior, z Superior). Grids may be oblique, never
sheared.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from nibabel.orientations import io_orientation
from numpy.typing import NDArray

Array = NDArray[np.generic]
Affine = NDArray[np.float64]
Size = tuple[int, ...]


@dataclass(frozen=True)
class SourceGrid:
    """The grid of a file in its own axis order: `size` in voxels, `affine` voxel -> RAS mm."""

    size: Size
    affine: Affine

    def ras(self) -> tuple[Size, Affine]:
        """The same grid with its axes permuted and flipped to RAS+."""
        order, flips = ras_axes(self.affine)
        size = tuple(self.size[axis] for axis in order)
        return size, _orient_affine(self.affine, self.size, order, flips)

    def to_json(self) -> dict[str, object]:
        """Plain numbers, exact."""
        return {"size": list(self.size), "affine": self.affine.tolist()}

    @classmethod
    def from_json(cls, data: dict) -> "SourceGrid":
        """Undo `to_json`."""
        return cls(tuple(int(n) for n in data["size"]), np.asarray(data["affine"], np.float64))


@dataclass(frozen=True)
class Volume:
    """Array `(c, *size)` in RAS+ axis order, its affine, and the grid of the file it came from.

    `filled` counts the voxels that were NaN or infinite and were given another value.
    """

    array: Array
    affine: Affine
    source: SourceGrid
    filled: int = 0

    @property
    def size(self) -> Size:
        """Voxels per spatial axis."""
        return self.array.shape[1:]

    @property
    def spacing_mm(self) -> tuple[float, ...]:
        """Millimetres per voxel along each axis of the array."""
        return spacing_of(self.affine)


def spacing_of(affine: Affine) -> tuple[float, ...]:
    """Length in mm of one step along each voxel axis."""
    return tuple(float(s) for s in np.linalg.norm(affine[:3, :3], axis=0))


def ras_axes(affine: Affine) -> tuple[tuple[int, ...], tuple[bool, ...]]:
    """Which source axis runs closest to R, A and S, and whether it must be reversed to do so."""
    orientation = io_orientation(affine)  # per source axis: world axis, direction
    order = tuple(int(np.flatnonzero(orientation[:, 0] == world)[0]) for world in range(3))
    return order, tuple(bool(orientation[axis, 1] < 0) for axis in order)


def _orient_affine(
    affine: Affine, size: Sequence[int], order: Sequence[int], flips: Sequence[bool]
) -> Affine:
    step = np.zeros((4, 4))
    step[3, 3] = 1
    for new, (old, flip) in enumerate(zip(order, flips, strict=True)):
        step[old, new] = -1 if flip else 1
        step[old, 3] = size[old] - 1 if flip else 0
    return affine @ step


def orient(array: Array, affine: Affine) -> tuple[Array, Affine]:
    """Permute and flip the last three axes to RAS+, without touching a value.

    Args:
        array: `(..., i, j, k)` in the order of `affine`'s columns.
        affine: voxel -> RAS mm.

    Returns:
        A view of the array in RAS+ order, and its affine.
    """
    order, flips = ras_axes(affine)
    lead = array.ndim - 3
    moved = array.transpose(*range(lead), *(lead + axis for axis in order))
    moved = moved[(..., *(slice(None, None, -1 if flip else 1) for flip in flips))]
    return moved, _orient_affine(affine, array.shape[lead:], order, flips)


def restore(array: Array, source: SourceGrid) -> Array:
    """Undo `orient`: from RAS+ order on the source's grid back to the file's own axis order."""
    expected, _ = source.ras()
    lead = array.ndim - 3
    if array.shape[lead:] != expected:
        raise ValueError(
            f"an array of size {array.shape[lead:]} is not on the source grid, whose size in RAS+ "
            f"order is {expected}; resample it with resample_onto first"
        )
    order, flips = ras_axes(source.affine)
    moved = array[(..., *(slice(None, None, -1 if flip else 1) for flip in flips))]
    inverse = np.argsort(order)
    return moved.transpose(*range(lead), *(lead + int(axis) for axis in inverse))


def crop_affine(affine: Affine, start: Sequence[float]) -> Affine:
    """The affine of the sub-volume whose first voxel is `start`."""
    moved = affine.copy()
    moved[:3, 3] += affine[:3, :3] @ np.asarray(start, np.float64)
    return moved
