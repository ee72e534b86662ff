"""Hidden cells out of dense maps and back, and packed cells on the grid with hidden ones filled.

Reshapes and one index of whole cells; tables of sites would cost several times as much.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from spark3d.sparse.gather import to_device
from spark3d.sparse.mask import CellMask


def split_cells(x: Float[Tensor, "b c *size"], cell: Sequence[int]) -> Float[Tensor, "n c *cell"]:
    """All cells of dense maps, stacked on the batch axis by sample, then in C order.

    Raises:
        ValueError: The sites of some axis are not a multiple of the cell.
    """
    size, ndim = tuple(x.shape[2:]), len(cell)
    if any(s % p for s, p in zip(size, cell, strict=True)):
        raise ValueError(f"a map of {size} sites cannot be split into cells of {tuple(cell)}")
    sides = [n for s, p in zip(size, cell, strict=True) for n in (s // p, p)]
    apart = x.reshape(*x.shape[:2], *sides)
    grids, insides = [2 + 2 * a for a in range(ndim)], [3 + 2 * a for a in range(ndim)]
    return apart.permute(0, *grids, 1, *insides).reshape(-1, x.shape[1], *cell)


def join_cells(cells: Float[Tensor, "n c *cell"], grid: Sequence[int]) -> Tensor:
    """The dense maps that `split_cells` took apart, `(b, c, *size)`."""
    cell, ndim = tuple(cells.shape[2:]), len(grid)
    apart = cells.reshape(-1, *grid, cells.shape[1], *cell)
    pairs = [axis for a in range(ndim) for axis in (1 + a, 2 + ndim + a)]
    size = [g * p for g, p in zip(grid, cell, strict=True)]
    return apart.permute(0, 1 + ndim, *pairs).reshape(len(apart), cells.shape[1], *size)


def cut_hidden(x: Float[Tensor, "b c *size"], mask: CellMask) -> Float[Tensor, "n c *cell"]:
    """The hidden cells of dense maps, stacked on the batch axis by sample, then in C order.

    Raises:
        ValueError: The sites of some axis are not a multiple of the cells.
    """
    size = tuple(x.shape[2:])
    if any(s % g for s, g in zip(size, mask.grid, strict=True)):
        raise ValueError(f"a map of {size} sites cannot be cut into {mask.grid} cells")
    cell = [s // g for s, g in zip(size, mask.grid, strict=True)]
    return split_cells(x, cell).index_select(0, _cells(mask, False, x.device))


def paste_hidden(
    x: Float[Tensor, "b c *size"], cells: Float[Tensor, "n c *cell"], mask: CellMask
) -> Float[Tensor, "b c *size"]:
    """`x` with its hidden cells replaced by `cells`, which are ordered as `cut_hidden` does."""
    where = _cells(mask, False, x.device)
    return join_cells(split_cells(x, cells.shape[2:]).index_copy(0, where, cells), mask.grid)


def fill_hidden(
    packed: Float[Tensor, "n c *cell"], vector: Float[Tensor, "1 c *ones"], mask: CellMask
) -> Float[Tensor, "b c *size"]:
    """Packed cells on the grid, with one `vector` at every site of the hidden cells."""
    cell, ndim, channels = tuple(packed.shape[2:]), mask.ndim, packed.shape[1]
    rows = packed.movedim(1, -1)  # packed cells are stored channels-last: a view
    blank = vector.to(packed.dtype).reshape(channels).expand(mask.host.numel(), *cell, channels)
    every = blank.index_copy(0, _cells(mask, True, packed.device), rows)
    apart = every.view(mask.batch, *mask.grid, *cell, channels)
    pairs = [axis for a in range(ndim) for axis in (1 + a, 1 + ndim + a)]
    size = [g * p for g, p in zip(mask.grid, cell, strict=True)]
    whole = apart.permute(0, *pairs, 1 + 2 * ndim).reshape(mask.batch, *size, channels)
    return whole.movedim(-1, 1)


def _cells(mask: CellMask, visible: bool, device: torch.device) -> Int[Tensor, " n"]:
    """Numbers of the visible or hidden cells, found on the CPU, so that no device waits."""

    def build() -> Tensor:
        chosen = mask.host if visible else ~mask.host
        return to_device(chosen.flatten().nonzero().flatten(), device)

    return mask.remember(("cells", visible, device), build)
