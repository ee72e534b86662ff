"""Where the body is in a volume, what its intensities are like, and where each class lies."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from spark3d.data.record import BODY_CELL, IntensityStats

AIR_HU = -500
MAX_POINTS = 10_000
MAX_SAMPLE = 1_000_000


def body_mask(array: NDArray[Any], modality: str) -> NDArray[np.bool_]:
    """Voxels of the patient, not of the air or background around.

    CT: above -500 HU, with the air inside filled in slice by slice. Else: above the minimum, which
    is taken as the background; stripped or masked images have it constant.

    Args:
        array: `(c, *size)`, physical intensities; a voxel counts if any channel does.
        modality: "CT" or "MR".

    Returns:
        `(*size)`; all False for a volume of air or of one constant value.
    """
    if modality != "CT":
        floors = array.reshape(len(array), -1).min(1).reshape(-1, 1, 1, 1)
        return (array > floors).any(0)
    solid: NDArray[np.bool_] = np.any(array > AIR_HU, axis=0)
    for axial in np.moveaxis(solid, 2, 0):
        if axial.any():
            axial[:] = ndimage.binary_fill_holes(axial)
    return solid


def bounding_box(
    mask: NDArray[np.bool_], margin: int = 0
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """First voxel and size of the smallest box around the True voxels, widened by `margin`."""
    start, size = [], []
    for axis in range(mask.ndim):
        others = tuple(a for a in range(mask.ndim) if a != axis)
        hit = np.flatnonzero(mask.any(axis=others))
        low = max(0, int(hit[0]) - margin)
        high = min(mask.shape[axis], int(hit[-1]) + 1 + margin)
        start.append(low)
        size.append(high - low)
    return tuple(start), tuple(size)


def body_cells(mask: NDArray[np.bool_], side: int = BODY_CELL) -> NDArray[np.uint8]:
    """Share of True voxels in each cell of `side`^3, times 255; cut cells count what they have."""
    total: NDArray = mask.astype(np.float64)
    for axis, n in enumerate(mask.shape):
        edges = np.arange(0, n, side)
        widths = np.diff([*edges, n]).reshape([-1 if a == axis else 1 for a in range(mask.ndim)])
        total = np.add.reduceat(total, edges, axis=axis) / widths
    return np.rint(total * 255).astype(np.uint8)


def intensity_stats(array: NDArray[Any], mask: NDArray[np.bool_]) -> tuple[IntensityStats, ...]:
    """Statistics of each channel over the body; percentiles from at most a million voxels."""
    step = max(1, int(mask.sum()) // MAX_SAMPLE)
    found = []
    for channel in array:
        values = channel[mask]
        low, high = (float(v) for v in np.percentile(values[::step], (0.5, 99.5)))
        found.append(
            IntensityStats(
                float(values.min()),
                float(values.max()),
                float(values.mean(dtype=np.float64)),
                float(values.std(dtype=np.float64)),
                low,
                high,
            )
        )
    return tuple(found)


def class_points(
    label: NDArray[np.integer], classes: Sequence[int], limit: int = MAX_POINTS
) -> dict[int, NDArray[np.int32]]:
    """Up to `limit` voxels `(n, 3)` of each class, spread evenly over it, always the same ones."""
    found = {}
    for value, box in enumerate(ndimage.find_objects(label), start=1):
        if box is None or value not in classes:
            continue
        points = np.argwhere(label[box] == value) + [edge.start for edge in box]
        if len(points) > limit:
            points = points[np.linspace(0, len(points) - 1, limit).astype(np.int64)]
        found[value] = points.astype(np.int32)
    return found
