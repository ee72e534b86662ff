"""Convolution of a map that is known at visible sites and holds one vector at all hidden ones.

The library would convolve the whole grid. Here every visible row meets the kernel once, in one
matrix product, the vector meets it once for all hidden sites, and each output site sums what the
taps of its window have brought: the same numbers at the visible share of the products, and the full
map is never made.
"""

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple, TypeGuard

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from spark3d.sparse.cells import dense_table, from_rows, full_size, grid_table, to_rows
from spark3d.sparse.gather import number_type
from spark3d.sparse.mask import CellMask

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
ENOUGH = 96
"""Input channels from which on the matrix product makes good for summing the taps."""


def worthwhile(conv: nn.Module, x: Tensor) -> TypeGuard[Convolution]:
    """Whether `filled_conv` is the faster way for packed `x`: measured on CPUs only.

    In low precision it would round the sum of the taps.
    """
    plain = isinstance(conv, Convolution) and max(conv.stride) == 1
    low = torch.is_autocast_enabled("cpu") or x.dtype.itemsize < 4
    return plain and x.device.type == "cpu" and x.shape[1] >= ENOUGH and not low


def filled_conv(
    x: Float[Tensor, "n c *cell"],
    vector: Float[Tensor, "1 c *ones"],
    weight: Float[Tensor, "out c *kernel"],
    bias: Float[Tensor, " out"] | None,
    mask: CellMask,
) -> Float[Tensor, "b out *size"]:
    """Convolve packed cells on the grid, with `vector` at hidden sites and zeros outside.

    Args:
        x: packed cells, channels-last.
        vector: what hidden sites hold.
        weight: of odd kernels, whose output has the size of the input.
        bias: of each output channel.
        mask: of the cells.
    """
    rows = torch.cat([to_rows(x), vector.reshape(1, -1)])
    kernel = tuple(weight.shape[2:])
    taps = _taps(mask, tuple(x.shape[2:]), kernel, x.device)
    y: Any = _Filled.apply(rows, weight, taps)
    y = y if bias is None else y + bias
    return from_rows(y, mask.batch, full_size(mask, x.shape[2:]))


class _Taps(NamedTuple):
    """Who meets whom, for one mask, cell and kernel.

    Attributes:
        read: `(sites, taps)`; for every output site and tap the product it takes, which is that of
            row `read // taps`; the row after the packed ones is the vector, the next one is zero.
        given: `(packed rows, taps)`; for every visible row and tap the output site that takes
            their product, the number past the end for none.
    """

    read: Tensor
    given: Tensor


def _taps(
    mask: CellMask, cell: tuple[int, ...], kernel: tuple[int, ...], device: torch.device
) -> _Taps:
    def build() -> _Taps:
        size = full_size(mask, cell)
        source, n_taps = grid_table(mask, cell, device).index, prod(kernel)
        packed = mask.batch * mask.n_visible * prod(cell)
        kind = number_type((packed + 2) * n_taps)
        near = _windows(source.to(kind).view(mask.batch, *size), kernel, packed + 1)
        read = near * n_taps + torch.arange(n_taps, dtype=kind, device=device)
        sites = torch.arange(len(source), dtype=kind, device=device)
        around = _windows(sites.view(mask.batch, *size), kernel, len(source)).flip(1)
        return _Taps(read, around.index_select(0, dense_table(mask, cell, device).index))

    return mask.remember(("filled", cell, kernel, device), build)


def _windows(numbers: Tensor, kernel: Sequence[int], outside: int) -> Tensor:
    """The numbers in the window around every site, `(sites, taps)`."""
    margin = [k // 2 for k in reversed(kernel) for _ in range(2)]
    wide = F.pad(numbers, margin, value=outside)
    for axis, k in enumerate(kernel, start=1):
        wide = wide.unfold(axis, k, 1)
    return wide.reshape(numbers.numel(), -1)


class _Filled(torch.autograd.Function):
    """Rows, of which the last one is the vector, times the kernel; then the sum over each window.

    Only the rows are kept for the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, taps: _Taps) -> Tensor:
        ctx.save_for_backward(rows, weight)
        ctx.taps = taps
        matrix = _matrix(weight)
        products = rows.new_empty(len(rows) + 1, len(matrix))
        products[-1] = 0
        torch.mm(rows, matrix.t(), out=products[:-1])
        return F.embedding_bag(taps.read, products.view(-1, weight.shape[0]), mode="sum")

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None]:
        rows, weight = ctx.saved_tensors
        taps, grad = ctx.taps, grads[0]
        n_taps = taps.read.shape[1]
        packed = len(rows) - 1
        wide = torch.cat([grad, grad.new_zeros(1, grad.shape[1])])
        d_products = grad.new_empty(len(rows), n_taps * grad.shape[1])
        out = d_products[:-1].view(-1, grad.shape[1])
        torch.index_select(wide, 0, taps.given.flatten(), out=out)
        of_vector = torch.div(taps.read, n_taps, rounding_mode="floor") == packed
        d_products[-1] = (of_vector.to(grad.dtype).t() @ grad).flatten()
        d_rows = d_weight = None
        if ctx.needs_input_grad[0]:
            d_rows = d_products @ _matrix(weight)
        if ctx.needs_input_grad[1]:
            flat = d_products.t() @ rows
            by_tap = flat.view(*weight.shape[2:], weight.shape[0], -1)
            d_weight = by_tap.movedim((-2, -1), (0, 1))
        return d_rows, d_weight, None


def _matrix(weight: Tensor) -> Tensor:
    """The kernel as `(taps * out, c)`."""
    return weight.movedim((0, 1), (-2, -1)).reshape(-1, weight.shape[1])
