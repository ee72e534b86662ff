"""Flat pictures of volumes: three planes through a point, turned as radiologists look at them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

Array = np.ndarray

NAMES = {2: "axial", 1: "coronal", 0: "sagittal"}
EDGES = {2: ("R", "L"), 1: ("R", "L"), 0: ("A", "P")}
"""What lies at the left and right edge of each plane of a RAS+ volume."""


@dataclass(frozen=True)
class Plane:
    """One plane of a volume: the axis it is perpendicular to, and where it lies on that axis."""

    axis: int
    index: int

    @property
    def name(self) -> str:
        """Axial, coronal or sagittal."""
        return NAMES[self.axis]

    def cut(self, volume: Array) -> Array:
        """The picture `(rows, columns)` of a volume `(x, y, z)` in RAS+ order.

        Anterior or superior is at the top, the patient's right (or anterior) at the left.
        """
        flat = np.take(volume, self.index, axis=self.axis)
        return flat[::-1, ::-1].T

    def extent_mm(self, size: Sequence[int], spacing_mm: Sequence[float]) -> tuple[float, float]:
        """Width and height of the picture in mm."""
        width, height = (size[a] * spacing_mm[a] for a in range(3) if a != self.axis)
        return width, height


def centre_planes(size: Sequence[int]) -> tuple[Plane, ...]:
    """Axial, coronal and sagittal plane through the middle."""
    return tuple(Plane(axis, size[axis] // 2) for axis in (2, 1, 0))


def fullest_planes(foreground: Array) -> tuple[Plane, ...]:
    """Along each axis the plane with the largest sum; the middle if there is no foreground."""
    if not foreground.any():
        return centre_planes(foreground.shape)
    others = {axis: tuple(a for a in range(3) if a != axis) for axis in (2, 1, 0)}
    return tuple(
        Plane(axis, int(np.argmax(foreground.sum(axis=rest)))) for axis, rest in others.items()
    )


def foreground_box(foreground: Array, margin: Sequence[int]) -> tuple[slice, ...]:
    """The box of all foreground with a margin in voxels per axis; everything if there is none."""
    box = []
    for axis in range(foreground.ndim):
        line = np.flatnonzero(foreground.any(axis=tuple(a for a in range(3) if a != axis)))
        low, high = (line[0], line[-1] + 1) if line.size else (0, foreground.shape[axis])
        box.append(slice(max(0, low - margin[axis]), high + margin[axis]))
    return tuple(box)


def as_array(values: Array | Tensor) -> Array:
    """A numpy array of a tensor on any device, or of an array."""
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
