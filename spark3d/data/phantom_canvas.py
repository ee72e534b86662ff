"""A voxel grid to paint a body on: shapes by their distance in mm, edges soft, textures shared.

Coordinates are millimetres from the middle of the grid, towards the patient's right, front and
head (RAS+). A distance is negative inside; away from the surface it need only be about right.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Grid = NDArray[np.floating]
Point = Sequence[float] | NDArray[np.floating]
FAR = np.float32(1e3)


@dataclass(frozen=True)
class Shape:
    """Distances within a box of the grid; all else is far outside."""

    box: tuple[slice, ...]
    distance: Grid

    def grown(self, by_mm: float) -> "Shape":
        """The shape with a rim of `by_mm` added (or, if negative, taken off)."""
        return Shape(self.box, self.distance - np.float32(by_mm))

    def within(self, limit: Grid, margin_mm: float = 0.0) -> "Shape":
        """What of the shape lies where the whole-grid distance `limit` is below `-margin_mm`."""
        cut = limit[self.box] + np.float32(margin_mm)
        return Shape(self.box, np.maximum(self.distance, cut))

    def without(self, other: "Shape") -> "Shape":
        """The shape less another one."""
        rest = self.distance.copy()
        own, theirs = _common(self.box, other.box)
        rest[own] = np.maximum(rest[own], -other.distance[theirs])
        return Shape(self.box, rest)

    def rough(self, noise: Grid, mm: float) -> "Shape":
        """The shape with its surface moved by whole-grid `noise` times `mm`."""
        return Shape(self.box, self.distance + np.float32(mm) * noise[self.box])


class Canvas:
    """Hounsfield units and labels of a body in the making.

    Attributes:
        hu: Float32, starts as air.
        label: Uint8, starts as background.
        x: Millimetres to the right, shape `(n, 1, 1)`; `y` to the front, `z` to the head alike.
        coarse: Smooth noise of unit variance, blobs of about 2 cm.
        fine: The same, blobs of about 7 mm.
    """

    def __init__(
        self, size: Sequence[int], spacing_mm: Sequence[float], rng: np.random.Generator
    ) -> None:
        self.size, self.spacing_mm = tuple(size), tuple(spacing_mm)
        self.edge_mm = float(np.mean(spacing_mm))
        axes = [
            ((np.arange(n) - (n - 1) / 2) * s).astype(np.float32)
            for n, s in zip(size, spacing_mm, strict=True)
        ]
        self.x, self.y, self.z = np.meshgrid(*axes, indexing="ij", sparse=True)
        self.hu = np.full(self.size, -1000, dtype=np.float32)
        self.label = np.zeros(self.size, dtype=np.uint8)
        self.rng = rng
        self.coarse, self.fine = self.noise(10), self.noise(3.5)

    def noise(self, mm: float) -> Grid:
        """Smooth noise of unit variance with a correlation length of `mm`."""
        white = self.rng.standard_normal(self.size, dtype=np.float32)
        smooth = ndimage.gaussian_filter(
            white, [mm / s for s in self.spacing_mm], truncate=2.5, mode="wrap"
        )
        return smooth / smooth.std()

    def texture(self, amplitude: float) -> Grid:
        """A texture of its own for every call: the two noises, shifted at random."""
        shift = tuple(int(self.rng.integers(n)) for n in self.size)
        mix = np.roll(self.fine, shift, (0, 1, 2)) + np.roll(self.coarse, shift, (0, 1, 2))
        return np.float32(amplitude / np.sqrt(2)) * mix

    def whole(self, distance: Grid) -> Shape:
        """A shape from distances on the whole grid."""
        return Shape(tuple(slice(0, n) for n in self.size), np.broadcast_to(distance, self.size))

    def ellipsoid(self, center: Point, radii: Point, turn: NDArray | None = None) -> Shape:
        """An ellipsoid; `turn` rotates it about its centre."""
        box = self._box(np.asarray(center) - max(radii), np.asarray(center) + max(radii))
        rel = self._relative(box, center)
        if turn is not None:
            inverse = np.asarray(turn, dtype=np.float32).T
            rel = [sum(inverse[i, j] * rel[j] for j in range(3)) for i in range(3)]
        squared = [np.square(rel[i] / np.float32(radii[i])) for i in range(3)]
        k = np.sqrt(squared[0] + squared[1] + squared[2])
        return Shape(box, (k - 1) * np.float32(np.exp(np.mean(np.log(radii)))))

    def tube(self, points: Sequence[Point], radii: Point | float) -> Shape:
        """A tube through `points`, its radius running from each one's to the next one's."""
        path = np.asarray(points, dtype=np.float32)
        thick = np.broadcast_to(np.asarray(radii, dtype=np.float32), len(path))
        reach = thick.max() + 2 * self.edge_mm
        box = self._box(path.min(0) - reach, path.max(0) + reach)
        total = np.full([s.stop - s.start for s in box], FAR, dtype=np.float32)
        for a, b, ra, rb in zip(path[:-1], path[1:], thick[:-1], thick[1:], strict=True):
            reach = max(ra, rb) + 2 * self.edge_mm
            part = self._box(np.minimum(a, b) - reach, np.maximum(a, b) + reach)
            rel, along = self._relative(part, a), b - a
            t = sum(along[i] * rel[i] for i in range(3)) / max(float(along @ along), 1e-6)
            t = np.clip(t, 0, 1)
            off = sum(np.square(rel[i] - t * along[i]) for i in range(3))
            distance = np.sqrt(off) - (ra + (rb - ra) * t)
            own, _ = _common(box, part)
            np.minimum(total[own], distance, out=total[own])
        return Shape(box, total)

    def union(self, shapes: Sequence[Shape], blend_mm: float = 0.0) -> Shape:
        """Shapes melted into one; `blend_mm` rounds where they meet."""
        box = tuple(
            slice(
                min(shape.box[axis].start for shape in shapes),
                max(shape.box[axis].stop for shape in shapes),
            )
            for axis in range(3)
        )
        total = np.full([s.stop - s.start for s in box], FAR, dtype=np.float32)
        for shape in shapes:
            own, _ = _common(box, shape.box)
            there = total[own]
            if blend_mm:
                h = np.maximum(blend_mm - np.abs(there - shape.distance), 0) / np.float32(blend_mm)
                there[:] = np.minimum(there, shape.distance) - h * h * np.float32(blend_mm / 4)
            else:
                np.minimum(there, shape.distance, out=there)
        return Shape(box, total)

    def paint(
        self, shape: Shape, hu: float, label: int | None = None, texture: float = 0.0
    ) -> None:
        """Lay a shape over what is there; `label` None leaves labels, 0 wipes them out."""
        alpha = np.clip(0.5 - shape.distance / np.float32(self.edge_mm), 0, 1)
        value = np.float32(hu)
        if texture:
            value = value + self.texture(texture)[shape.box]
        under = self.hu[shape.box]
        under += alpha * (value - under)
        if label is not None:
            self.label[shape.box][shape.distance < 0] = label

    def _box(self, low: Point, high: Point) -> tuple[slice, ...]:
        out = []
        for a, b, n, s in zip(low, high, self.size, self.spacing_mm, strict=True):
            first = int(np.floor(a / s + (n - 1) / 2)) - 1
            last = int(np.ceil(b / s + (n - 1) / 2)) + 2
            out.append(slice(min(max(first, 0), n - 1), max(min(last, n), 1)))
        return tuple(out)

    def _relative(self, box: tuple[slice, ...], origin: Point) -> list[Grid]:
        return [
            self.x[box[0]] - np.float32(origin[0]),
            self.y[:, box[1]] - np.float32(origin[1]),
            self.z[:, :, box[2]] - np.float32(origin[2]),
        ]


def turn(degrees: Point) -> NDArray[np.float64]:
    """Rotation about the right-, the front- and the head-going axis, in this order."""
    total = np.eye(3)
    for axis, angle in enumerate(np.deg2rad(degrees)):
        i, j = [(1, 2), (2, 0), (0, 1)][axis]
        step = np.eye(3)
        step[[i, i, j, j], [i, j, i, j]] = (
            np.cos(angle),
            -np.sin(angle),
            np.sin(angle),
            np.cos(angle),
        )
        total = step @ total
    return total


def _common(
    one: tuple[slice, ...], other: tuple[slice, ...]
) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """The overlap of two boxes, as slices into each."""
    own, theirs = [], []
    for a, b in zip(one, other, strict=True):
        low = max(a.start, b.start)
        high = max(min(a.stop, b.stop), low)
        own.append(slice(low - a.start, high - a.start))
        theirs.append(slice(low - b.start, high - b.start))
    return tuple(own), tuple(theirs)
