"""Resampling of volumes and labels between grids with parallel axes, oblique or not.

Separable: one sparse matrix of weights per axis, so its cost is a few multiply-adds per voxel and
axis.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from spark3d.data.grid import (
    Affine,
    Array,
    Size,
    SourceGrid,
    Volume,
    crop_affine,
    orient,
    restore,
    spacing_of,
)

__all__ = [
    "Affine",
    "Array",
    "Size",
    "SourceGrid",
    "Volume",
    "axis_weights",
    "crop_affine",
    "orient",
    "resample",
    "resample_onto",
    "resampled_grid",
    "restore",
    "spacing_of",
]


def resampled_grid(
    size: Sequence[int], affine: Affine, spacing_mm: Sequence[float]
) -> tuple[Size, Affine]:
    """The grid of `spacing_mm` with the same centre and, to half a voxel, the same extent."""
    old = spacing_of(affine)
    ratio = np.asarray(spacing_mm, np.float64) / np.asarray(old)
    new = tuple(max(1, round(n / r)) for n, r in zip(size, ratio, strict=True))
    target = affine.copy()
    target[:3, :3] = affine[:3, :3] * ratio
    centre = (np.asarray(size) - 1) / 2 - (np.asarray(new) - 1) / 2 * ratio
    target[:3, 3] = affine[:3, 3] + affine[:3, :3] @ centre
    return new, target


def resample(volume: Volume, spacing_mm: Sequence[float], label: bool = False) -> Volume:
    """Bring a volume to `spacing_mm`; the result covers the same extent, centred alike.

    Images are interpolated linearly and, where they shrink, averaged over the new voxel (see
    `axis_weights`). Labels: see `resample_onto`.

    Args:
        volume: `(c, *size)`; labels have one channel.
        spacing_mm: new millimetres per voxel, in the array's axis order.
        label: values are classes, not intensities.

    Returns:
        float32 for images (unchanged dtype if the grid stays as it is), the given dtype for labels.
    """
    size, affine = resampled_grid(volume.size, volume.affine, spacing_mm)
    if size == volume.size and np.allclose(spacing_mm, volume.spacing_mm, rtol=1e-4, atol=0):
        return volume
    array = resample_onto(volume.array, volume.affine, size, affine, label)
    return Volume(array, affine, volume.source, volume.filled)


def resample_onto(
    array: Array,
    affine: Affine,
    size: Sequence[int],
    target_affine: Affine,
    label: bool = False,
    fill: float = 0.0,
) -> Array:
    """Sample an array at the voxel centres of another grid, whose axes are parallel in any order.

    For labels each class is interpolated linearly as a share of the voxel, and the largest share
    wins (over background also in a tie). A class too thin to win anywhere keeps the one voxel where
    it covers most, so no class that lies on the target grid is lost.

    Args:
        array: `(..., i, j, k)`.
        affine: of `array`, voxel -> RAS mm.
        size: target voxels per axis.
        target_affine: of the target grid.
        label: values are classes; class 0 fills what lies outside `array`.
        fill: intensity outside the extent of `array`.

    Raises:
        ValueError: the axes of the two grids are not parallel.
    """
    order, scale, offset = _axis_maps(affine, target_affine, size)
    lead = array.ndim - 3
    moved = array.transpose(*range(lead), *(lead + axis for axis in order))
    flat = moved.reshape(-1, *moved.shape[lead:])
    sample = _sample_labels if label else _sample_intensities
    done = [sample(channel, size, scale, offset, fill) for channel in flat]
    return np.stack(done).reshape(*moved.shape[:lead], *size)


def _axis_maps(
    affine: Affine, target_affine: Affine, size: Sequence[int]
) -> tuple[tuple[int, ...], list[float], list[float]]:
    """For each target axis: the source axis along it, and index_source = scale * index + offset."""
    step = np.linalg.inv(affine) @ target_affine
    order = tuple(int(np.argmax(np.abs(step[:3, axis]))) for axis in range(3))
    stray = step[:3, :3].copy()
    stray[list(order), range(3)] = 0
    drift = np.abs(stray) @ np.asarray(size, np.float64)
    if sorted(order) != [0, 1, 2] or drift.max() > 0.05:
        raise ValueError(
            "the axes of the two grids are not parallel: one volume was rotated against the other; "
            "register or resample them to one orientation first"
        )
    return (
        order,
        [float(step[a, t]) for t, a in enumerate(order)],
        [float(step[a, 3]) for a in order],
    )


def axis_weights(
    n_in: int, n_out: int, scale: float, offset: float, widen: bool
) -> sparse.csr_matrix:
    """Weights `(n_out, n_in)` of linear sampling at `scale * index + offset`; rows sum to 1.

    With `widen`, and where a new voxel is `|scale|` > 1 old ones, the linear interpolant is
    averaged over a span of `sqrt(scale^2 - 1)` old voxels: it keeps ramps exactly and hardly
    aliases. A row outside the extent of the input (the outer faces of its voxels) is empty.
    """
    centre = scale * np.arange(n_out) + offset
    span = math.sqrt(max(0.0, scale * scale - 1)) if widen else 0.0
    reach = math.ceil(1 + span / 2)
    column = np.floor(centre)[:, None].astype(np.int64) + np.arange(-reach, reach + 2)
    away = column - centre[:, None]
    if span < 1e-3:
        weight = np.maximum(0.0, 1.0 - np.abs(away))
    else:
        weight = (_below(away + span / 2) - _below(away - span / 2)) / span
    weight[(column < 0) | (column >= n_in)] = 0
    weight[(centre < -0.5 - 1e-3) | (centre > n_in - 0.5 + 1e-3)] = 0
    total = weight.sum(1, keepdims=True)
    weight = np.divide(weight, total, out=np.zeros_like(weight), where=total > 0)
    rows = np.broadcast_to(np.arange(n_out)[:, None], column.shape)
    kept = weight > 1e-9
    entries = (weight[kept].astype(np.float32), (rows[kept], column[kept]))
    return sparse.csr_matrix(entries, shape=(n_out, n_in))


def _below(u: NDArray[np.float64]) -> NDArray[np.float64]:
    """Integral from minus infinity to `u` of the triangle between -1 and 1."""
    u = np.clip(u, -1.0, 1.0)
    return np.where(u < 0, (1 + u) ** 2 / 2, 1 - (1 - u) ** 2 / 2)


def _apply(array: Array, weights: Sequence[sparse.csr_matrix]) -> NDArray[np.float32]:
    """Multiply each axis by its weights, the axes that shrink most first."""
    ratios = [len(matrix.indptr) / (n + 1) for matrix, n in zip(weights, array.shape, strict=True)]
    result = array.astype(np.float32, copy=False)
    for axis in np.argsort(ratios, kind="stable"):
        moved = np.moveaxis(result, axis, 0)
        matrix = weights[axis]
        columns = np.ascontiguousarray(moved).reshape(moved.shape[0], math.prod(moved.shape[1:]))
        result = (matrix @ columns).reshape(len(matrix.indptr) - 1, *moved.shape[1:])
        result = np.moveaxis(result, 0, axis)
    return np.ascontiguousarray(result)


def _sample_intensities(
    array: Array, size: Sequence[int], scale: list[float], offset: list[float], fill: float
) -> NDArray[np.float32]:
    maps = zip(array.shape, size, scale, offset, strict=True)
    weights = [axis_weights(*axis, widen=True) for axis in maps]
    result = _apply(array, weights)
    for axis, matrix in enumerate(weights):
        outside = np.flatnonzero(np.diff(matrix.indptr) == 0)
        result[(slice(None),) * axis + (outside,)] = fill
    return result


def _sample_labels(
    array: Array, size: Sequence[int], scale: list[float], offset: list[float], _: float
) -> Array:
    maps = list(zip(array.shape, size, scale, offset, strict=True))
    weights = [axis_weights(*axis, widen=False) for axis in maps]
    best = np.full(size, 1e-6, np.float32)
    total = np.zeros(size, np.float32)
    result = np.zeros(size, array.dtype)
    classes = [value for value in np.unique(array) if value != 0]
    for value in classes:
        share, box = _share(array == value, weights)
        total[box] += share
        wins = share > best[box]
        best[box][wins] = share[wins]
        result[box][wins] = value
    result[best < 1 - total - 1e-4] = 0
    lost = sorted(set(classes) - set(np.unique(result)))
    wide = [axis_weights(*axis, widen=True) for axis in maps] if lost else []
    for value in lost:
        share, box = _share(array == value, wide)
        found, counts = np.unique(result, return_counts=True)
        last = found[(counts == 1) & (found != 0)]  # no rescue at the cost of another class
        share[np.isin(result[box], last)] = 0
        if share.size and share.max() > 0:
            result[box][np.unravel_index(np.argmax(share), share.shape)] = value
    return result


def _share(
    indicator: NDArray[np.bool_], weights: Sequence[sparse.csr_matrix]
) -> tuple[NDArray[np.float32], tuple[slice, ...]]:
    """Interpolated share of one class, in the box of the target grid where it can be above 0."""
    inner, outer, parts = [], [], []
    for axis, matrix in enumerate(weights):
        others = tuple(a for a in range(3) if a != axis)
        hit = np.flatnonzero(indicator.any(axis=others))
        part = matrix[:, hit[0] : hit[-1] + 1]
        rows = np.flatnonzero(np.diff(part.indptr))
        low, high = (int(rows[0]), int(rows[-1]) + 1) if rows.size else (0, 0)
        inner.append(slice(hit[0], hit[-1] + 1))
        outer.append(slice(low, high))
        parts.append(part[low:high])
    return _apply(indicator[tuple(inner)], parts), tuple(outer)
