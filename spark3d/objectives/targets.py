"""What objectives predict, cell by cell."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from jaxtyping import Bool, Float
from torch import Tensor


@dataclass(frozen=True)
class NormalisedVoxels:
    """Cells scaled to zero mean and unit variance, and what undoes it.

    Attributes:
        voxels: `(n, c, *cell)` in units of each cell's own spread.
        mean: Of every cell, channels together, `(n, 1, *ones)`.
        scale: Square root of the unbiased variance plus eps, `(n, 1, *ones)`.
        counted: False where the cell is too flat to learn from.
    """

    voxels: Float[Tensor, "n c *cell"]
    mean: Float[Tensor, "n 1 *ones"]
    scale: Float[Tensor, "n 1 *ones"]
    counted: Bool[Tensor, " n"]

    def undo(self, voxels: Float[Tensor, "n c *cell"]) -> Float[Tensor, "n c *cell"]:
        """Predicted voxels in the units of the crop."""
        return voxels.to(self.scale.dtype) * self.scale + self.mean


def normalise_cells(
    cells: Float[Tensor, "n c *cell"], eps: float = 1e-6, min_variance: float = 0.0
) -> NormalisedVoxels:
    """Scale every cell by its own mean and variance, in float32 at least (SparK, MAE).

    Args:
        cells: Cells of the crop, `(n, c, *cell)`; statistics run over all of their values jointly.
        eps: Added to the unbiased variance under the root, in squared units of the crop. Raise it
            where noise in flat cells should not count as signal (clipped air).
        min_variance: Cells that do not vary more than this are not counted; 0 counts every cell
            (a constant one too, as officially).
    """
    wide = cells.to(torch.promote_types(cells.dtype, torch.float32))
    axes = tuple(range(1, cells.ndim))
    mean = wide.mean(axes, keepdim=True)
    centred = wide - mean
    count = prod(cells.shape[1:])
    variance = centred.square().sum(axes, keepdim=True) / max(1, count - 1)
    scale = (variance + eps).sqrt()
    flat = variance.flatten()
    counted = flat > min_variance if min_variance > 0 else torch.ones_like(flat, dtype=torch.bool)
    return NormalisedVoxels(centred / scale, mean, scale, counted)
