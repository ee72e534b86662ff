"""Packed cells: visible cells stacked on the batch axis, and tables of what surrounds each.

Layout. A packed tensor has shape `(b * v, c, *cell)`, sorted by sample, then by cell in C order,
and is stored channels-last: one *row* holds all channels of one site, its number is
`cell * sites_per_cell + site`. A table holds row numbers; the number one past the end stands for a
site that is hidden or outside the crop. Tables are built where they are used, and remembered by
the mask.
"""

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor

from spark3d.sparse.gather import Table, gather, number_type, to_device
from spark3d.sparse.geometry import GeometryError
from spark3d.sparse.mask import CellMask


class Span(NamedTuple):
    """What a packed cell reads along each axis: `length` sites, from `before` sites before it."""

    before: tuple[int, ...]
    length: tuple[int, ...]


def to_rows(x: Tensor) -> Tensor:
    """`(n, c, *sites)` as rows `(n * sites, c)`; a view when `x` is stored channels-last."""
    return x.movedim(1, -1).reshape(-1, x.shape[1])


def from_rows(rows: Tensor, count: int, sites: Sequence[int]) -> Tensor:
    """Rows `(count * sites, c)` as `(count, c, *sites)`, stored channels-last (a view)."""
    return rows.view(count, *sites, rows.shape[-1]).movedim(-1, 1)


def as_cells(rows: Tensor, count: int, sites: Sequence[int]) -> Tensor:
    """Like `from_rows`, in place: `rows`, in whatever shape, is given up, and no gradient recorded.

    The result is no view (unless `rows` is one). That matters for what an autograd function
    returns: networks add to it and activate it in place, which autograd forbids on its views.
    """
    c = rows.numel() // (count * prod(sites))
    strides, step = [], c
    for side in reversed(sites):
        strides.insert(0, step)
        step *= side
    return rows.as_strided_((count, c, *sites), (step, 1, *strides))


def cell_at(mask: CellMask, size: Sequence[int]) -> tuple[int, ...]:
    """Sites of one cell per axis on a dense map of `size` sites.

    Raises:
        ValueError: cells do not fall on whole sites of this map.
    """
    if any(sites % cells for sites, cells in zip(size, mask.grid, strict=True)):
        raise GeometryError(
            f"a map of {tuple(size)} sites cannot be packed in {mask.grid} cells; enlarge the "
            'cells to the total stride of the network or use backend="reference" '
            "(model.backend=reference in a recipe)"
        )
    return tuple(sites // cells for sites, cells in zip(size, mask.grid, strict=True))


def pack(x: Tensor, mask: CellMask) -> Tensor:
    """Stack the visible cells of dense maps: `(b, c, *size)` to `(b * v, c, *cell)`, channels-last.

    Raises:
        ValueError: `size` is not a multiple of the grid.
    """
    cell = cell_at(mask, x.shape[2:])
    rows = gather(to_rows(x), dense_table(mask, cell, x.device))
    return from_rows(rows, mask.batch * mask.n_visible, cell)


def unpack(packed: Tensor, mask: CellMask, fill: float = 0.0) -> Tensor:
    """Put packed cells back: `(b * v, c, *cell)` to `(b, c, *size)`, `fill` where hidden."""
    cell = tuple(packed.shape[2:])
    rows = gather(to_rows(packed), grid_table(mask, cell, packed.device), fill)
    return from_rows(rows, mask.batch, full_size(mask, cell))


def full_size(mask: CellMask, cell: Sequence[int]) -> tuple[int, ...]:
    """Sites per axis of the dense map whose cells have `cell` sites."""
    return tuple(g * p for g, p in zip(mask.grid, cell, strict=True))


def dense_table(mask: CellMask, cell: Sequence[int], device: torch.device) -> Table:
    """For every packed row, the row of the dense channels-last map it comes from."""
    return _both_ways(mask, tuple(cell), device)[0]


def grid_table(mask: CellMask, cell: Sequence[int], device: torch.device) -> Table:
    """For every row of the dense channels-last map, the packed row it holds, if any."""
    return _both_ways(mask, tuple(cell), device)[1]


def halo_table(mask: CellMask, cell: Sequence[int], span: Span, device: torch.device) -> Table:
    """For every cell and every site of `span` around it, the packed row, if any.

    The order is that of a channels-last tensor `(b * v, *span.length, c)`.
    """
    key = ("halo", tuple(cell), span, device)
    n_rows = mask.batch * mask.n_visible * prod(cell)

    def build() -> Table:
        index = halo_index(mask, cell, span, device)
        read = [torch.arange(n) for n in span.length]
        return Table(index.reshape(-1), n_rows, lambda: _visible_reads(mask, cell, span, read))

    return mask.remember(key, build)


def column_table(
    mask: CellMask,
    cell: Sequence[int],
    span: Span,
    window: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]],
    device: torch.device,
) -> Table:
    """For every window (kernel, stride, dilation) over `span`, the packed rows of its taps.

    The order is that of a tensor `(b * v, *out_cell, *kernel, c)`.
    """
    n_rows = mask.batch * mask.n_visible * prod(cell)

    def build() -> Table:
        index, read = halo_index(mask, cell, span, device), []
        for axis, (k, s, d) in enumerate(zip(*window, strict=True), start=1):
            index = index.unfold(axis, d * (k - 1) + 1, s)[..., ::d]
            sites = torch.arange(span.length[axis - 1])
            read.append(sites.unfold(0, d * (k - 1) + 1, s)[..., ::d].flatten())
        return Table(index.reshape(-1), n_rows, lambda: _visible_reads(mask, cell, span, read))

    return mask.remember(("columns", tuple(cell), span, window, device), build)


def halo_index(
    mask: CellMask, cell: Sequence[int], span: Span, device: torch.device
) -> Int[Tensor, "n *length"]:
    """The rows of `halo_table`, by cell and site. The host says which cells are neighbours, the
    device counts sites: they can be millions.
    """
    cells = mask.host.nonzero()
    hidden = len(cells) * prod(cell)
    reach = _reach(cell, span)
    sides = [g + lo + hi for g, (lo, hi) in zip(mask.grid, reach, strict=True)]
    first = torch.full((mask.batch, *sides), hidden)  # row of every cell, with a margin
    inner = tuple(slice(lo, lo + g) for g, (lo, _) in zip(mask.grid, reach, strict=True))
    first[(slice(None), *inner)][mask.host] = torch.arange(len(cells)) * prod(cell)
    near, inside = [], []
    for axis, (before, length, side) in enumerate(zip(span.before, span.length, cell, strict=True)):
        offset = torch.arange(length) - before
        step = torch.div(offset, side, rounding_mode="floor")
        along = cells[:, axis + 1, None] + step + reach[axis][0]
        near.append(along * prod(sides[axis + 1 :]))
        inside.append((offset - step * side)[None] * prod(cell[axis + 1 :]))
    near[0] += cells[:, :1] * prod(sides)
    kind = number_type(max(hidden, first.numel()))
    neighbour, local = _sums_over_axes([near, inside], kind, device)
    rows = to_device(first.flatten().to(kind), device)
    found = rows.index_select(0, neighbour.flatten()).view(neighbour.shape)
    return found.add_(local.masked_fill(found == hidden, 0))


def _sums_over_axes(
    parts: Sequence[Sequence[Tensor]], kind: torch.dtype, device: torch.device
) -> list[Tensor]:
    """For each list of `(n, sites)`, one an axis, their sums `(n, *sites)` on `device`, to which
    the parts go in one copy.
    """
    flat = [part for axes in parts for part in axes]
    there = to_device(torch.cat([part.flatten() for part in flat]).to(kind), device)
    moved = iter(there.split([part.numel() for part in flat]))
    sums = []
    for axes in parts:
        total: Tensor | None = None
        for axis, part in enumerate(axes):
            shape = [1] * len(axes)
            shape[axis] = part.shape[1]
            term = next(moved).view(len(part), *shape)
            total = term if total is None else total + term
        assert total is not None
        sums.append(total)
    return sums


def _visible_reads(mask: CellMask, cell: Sequence[int], span: Span, read: Sequence[Tensor]) -> int:
    """How many of the sites that all cells read are visible.

    Args:
        read: per axis the sites of `span` that one cell reads, as often as it reads them.
    """
    reach = _reach(cell, span)
    found = F.pad(mask.host.long(), [n for pair in reversed(reach) for n in pair])
    for axis, (sites, before, side, (first, _), cells) in enumerate(
        zip(read, span.before, cell, reach, mask.grid, strict=True), start=1
    ):
        step = torch.div(sites - before, side, rounding_mode="floor")
        times = zip(*(n.tolist() for n in step.unique(return_counts=True)), strict=True)
        shifted = [n * found.narrow(axis, first + s, cells) for s, n in times]
        found = torch.stack(shifted).sum(0)
    return int(found[mask.host].sum())


def _both_ways(mask: CellMask, cell: tuple[int, ...], device: torch.device) -> tuple[Table, Table]:
    """The tables of packing and unpacking: no row is named twice, each is the other's adjoint."""

    def build() -> tuple[Table, Table]:
        size, cells = full_size(mask, cell), mask.host.nonzero()
        along = [
            (cells[:, axis + 1, None] * side + torch.arange(side)) * prod(size[axis + 1 :])
            for axis, side in enumerate(cell)
        ]
        along[0] += cells[:, :1] * prod(size)
        n_dense, kind = mask.batch * prod(size), number_type(mask.batch * prod(size))
        there = _sums_over_axes([along], kind, device)[0].flatten()
        n_rows = len(there)
        back = torch.full((n_dense,), n_rows, dtype=kind, device=device)
        back[there] = torch.arange(n_rows, dtype=kind, device=device)
        pair = Table(there, n_dense, lambda: n_rows), Table(back, n_rows, lambda: n_rows)
        pair[0].inverse, pair[1].inverse = pair[1], pair[0]
        return pair

    return mask.remember(("dense", cell, device), build)


def _reach(cell: Sequence[int], span: Span) -> list[tuple[int, int]]:
    """How many neighbouring cells a span touches on either side of each axis."""
    return [
        (max(0, -(-before // side)), max(0, (length - before - 1) // side))
        for before, length, side in zip(span.before, span.length, cell, strict=True)
    ]
