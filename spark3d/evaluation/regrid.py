"""From class probabilities on the network's grid to a label map on the grid of a file.

Probabilities are interpolated and the largest wins, which keeps surfaces smoother than moving
labels does. One class is moved at a time, and only the box in which it can win.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from spark3d.data.geometry import crop_affine, resample_onto
from spark3d.data.grid import Affine, spacing_of

Box = tuple[slice, ...]


def labels_onto(
    probabilities: NDArray[np.float32],
    affine: Affine,
    size: Sequence[int],
    target_affine: Affine,
) -> NDArray[np.integer]:
    """Label map `(*size)` on another grid with parallel axes; 0 outside the given grid.

    Args:
        probabilities: `(k, i, j, l)`, not negative, summing to 1 over the classes; 0 is background.
        affine: of `probabilities`, voxel -> RAS mm.
        size: voxels of the target grid.
        target_affine: of the target grid.
    """
    classes = len(probabilities)
    labels = np.zeros(tuple(size), np.uint8 if classes <= 256 else np.int16)
    best = _moved(probabilities[0], affine, size, target_affine)
    for label in range(1, classes):
        found = _boxes(probabilities[label] >= 1 / classes, affine, size, target_affine)
        if found is None:
            continue
        source, target = found
        share = _moved(
            probabilities[label][source],
            crop_affine(affine, [s.start for s in source]),
            [s.stop - s.start for s in target],
            crop_affine(target_affine, [s.start for s in target]),
        )
        wins = share > best[target]
        best[target][wins] = share[wins]
        labels[target][wins] = label
    return labels


def _moved(
    share: NDArray[np.float32], affine: Affine, size: Sequence[int], target_affine: Affine
) -> NDArray[np.float32]:
    return resample_onto(share, affine, size, target_affine).astype(np.float32, copy=False)


def _boxes(
    can_win: NDArray[np.bool_], affine: Affine, size: Sequence[int], target_affine: Affine
) -> tuple[Box, Box] | None:
    """The part of the target grid that a class can win, and the part of its own grid that decides.

    A voxel of the target mixes voxels at most `reach` away from its centre, and the winner has at
    least 1/k of it; so the centre lies at most `reach` away from a voxel with that share.
    """
    if not can_win.any():
        return None
    lines = [np.flatnonzero(can_win.any(axis=_others(axis))) for axis in range(3)]
    low = np.array([line[0] for line in lines], float)
    high = np.array([line[-1] for line in lines], float)
    ratio = max(t / s for s, t in zip(spacing_of(affine), spacing_of(target_affine), strict=True))
    reach = max(1.0, ratio)
    step = np.linalg.inv(target_affine) @ affine
    ends = np.array(np.meshgrid(*zip(low - reach, high + reach, strict=True), indexing="ij"))
    there = step[:3, :3] @ ends.reshape(3, -1) + step[:3, 3:]
    first = np.maximum(np.floor(there.min(1)).astype(int), 0)
    last = np.minimum(np.ceil(there.max(1)).astype(int), np.asarray(size) - 1)
    if (first > last).any():
        return None
    margin = int(np.ceil(2 * reach)) + 2
    source = tuple(
        slice(max(int(a) - margin, 0), min(int(b) + margin + 1, n))
        for a, b, n in zip(low, high, can_win.shape, strict=True)
    )
    return source, tuple(slice(int(a), int(b) + 1) for a, b in zip(first, last, strict=True))


def _others(axis: int) -> tuple[int, ...]:
    return tuple(a for a in range(3) if a != axis)
