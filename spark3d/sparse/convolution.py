"""Convolution of packed cells: four exact ways, and the rule that chooses one for each layer.

"local"    no window leaves its cell: convolve as it is, by a matrix product where that does
"halo"     gather every cell with its surroundings, convolve without padding
"columns"  gather every window (im2col), one matrix product: for cells of very few sites
"grid"     unpack to the full grid, convolve, pack: depthwise kernels far wider than a cell

"halo" and "columns" save the packed input only and gather again in backward. At stride 1 the
gradient of the input is the same operation on the output's gradient with the flipped kernel, since
gradients are zero where outputs are hidden; at other strides it is the adjoint of the gather.
"""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from spark3d.sparse import depthwise
from spark3d.sparse.cells import (
    Span,
    as_cells,
    column_table,
    from_rows,
    halo_table,
    pack,
    to_rows,
    unpack,
)
from spark3d.sparse.functional import CONV
from spark3d.sparse.gather import Table
from spark3d.sparse.geometry import Padding
from spark3d.sparse.mask import CellMask

CONV_TRANSPOSE: dict[int, Callable[..., Tensor]] = {
    1: F.conv_transpose1d,
    2: F.conv_transpose2d,
    3: F.conv_transpose3d,
}

Strategy = Literal["local", "halo", "columns", "grid"]


class ConvCase(NamedTuple):
    """One convolution on packed cells: all that a strategy is chosen from, and run with."""

    cell: tuple[int, ...]
    out_cell: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: Padding
    dilation: tuple[int, ...]
    groups: int
    channels: int
    out_channels: int
    span: Span
    device: str = "cpu"

    @property
    def depthwise(self) -> bool:
        """Every channel has one kernel of its own."""
        return 1 < self.groups == self.channels == self.out_channels

    @property
    def own_gradients(self) -> bool:
        """Gradients as forward convolutions: the library's are slow for such a kernel on a CPU."""
        return self.depthwise and self.device == "cpu"

    @property
    def local(self) -> bool:
        """No window leaves its cell."""
        fits = all(n <= p for n, p in zip(self.span.length, self.cell, strict=True))
        return fits and not any(self.span.before)

    @property
    def mirrored(self) -> "ConvCase":
        """The convolution that takes output gradients to input gradients (stride 1 only)."""
        reach = [d * (k - 1) for k, d in zip(self.kernel, self.dilation, strict=True)]
        padding = tuple((r - lo, r - hi) for r, (lo, hi) in zip(reach, self.padding, strict=True))
        span = Span(tuple(lo for lo, _ in padding), self.span.length)
        return self._replace(padding=padding, span=span)


def choose(case: ConvCase) -> Strategy:
    """The way that was fastest for such a case (docs/performance.md): on a CPU, and on a GPU, where
    gathering every window hardly ever was.
    """
    if case.local:
        return "local"
    if case.depthwise and max(case.stride) == 1:
        wide = any(n > 3 * p for n, p in zip(case.span.length, case.cell, strict=True))
        return "grid" if wide else "halo"
    sites = prod(case.out_cell)
    few = sites <= 2 or (sites <= 8 and case.channels >= 128)
    return "columns" if few and case.groups == 1 and case.device == "cpu" else "halo"


def convolve(
    x: Tensor,
    mask: CellMask,
    weight: Tensor,
    bias: Tensor | None,
    case: ConvCase,
    strategy: Strategy,
) -> Tensor:
    """Run `case` on packed `x` by `strategy`; `(n, c_in, *cell)` to `(n, c_out, *out_cell)`.

    Raises:
        ValueError: the strategy cannot compute this case.
    """
    x, weight, bias = depthwise.autocast(x, weight, bias)
    if strategy == "local":
        return _local(x, weight, bias, case)
    if strategy == "grid":
        return _on_grid(x, mask, weight, bias, case)
    if strategy == "columns":
        if case.groups > 1:
            raise ValueError('the strategy "columns" is for ungrouped convolutions; use "halo"')
        return _Columns.apply(x, weight, bias, mask, case)  # pyright: ignore[reportReturnType]
    return _Halo.apply(x, weight, bias, mask, case)  # pyright: ignore[reportReturnType]


def _local(x: Tensor, weight: Tensor, bias: Tensor | None, case: ConvCase) -> Tensor:
    """No window leaves its cell: rows, or blocks of rows, times a matrix."""
    if not case.local:
        raise ValueError('the strategy "local" needs windows that stay in their cell; use "halo"')
    tiles = case.kernel == case.stride and max(case.dilation) == 1
    if case.groups == 1 and (tiles or prod(case.kernel) == 1):
        return _Blocks.apply(x, weight, bias, case)  # pyright: ignore[reportReturnType]
    return _valid(x, weight, bias, case)


def _on_grid(
    x: Tensor, mask: CellMask, weight: Tensor, bias: Tensor | None, case: ConvCase
) -> Tensor:
    """The dense convolution of the unpacked map."""
    x = unpack(x, mask)
    padding = [lo for lo, _ in case.padding]
    if any(lo != hi for lo, hi in case.padding):
        x = F.pad(x, [n for pair in reversed(case.padding) for n in pair])
        padding = [0] * len(padding)
    if case.depthwise:
        y = depthwise.depthwise_conv(x, weight, bias, case.stride, padding, case.dilation)
    else:
        convolution = CONV[x.ndim - 2]
        y = convolution(x, weight, bias, case.stride, padding, case.dilation, case.groups)
    return pack(y, mask)


def surround(x: Tensor, mask: CellMask, span: Span) -> Tensor:
    """Every cell with the sites of `span` around it, zero where hidden (no gradient)."""
    table = halo_table(mask, x.shape[2:], span, x.device)
    return from_rows(table.gather(to_rows(x)), x.shape[0], span.length)


class _Halo(torch.autograd.Function):
    """Gather every cell with its surroundings, convolve without padding."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, mask: CellMask, case: ConvCase
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.mask, ctx.case = mask, case
        return _valid(surround(x, mask, case.span), weight, bias, case)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        mask, case, need = ctx.mask, ctx.case, ctx.needs_input_grad
        grad = _channels_last(grads[0])
        d_x = d_weight = None
        if need[1]:
            wide = surround(x, mask, case.span)
            d_weight = _weight_gradient(wide, grad, weight, case)
        if need[0]:
            d_x = _input_gradient(grad, weight, x, mask, case)
        return d_x, d_weight, _bias_gradient(grad) if need[2] else None, None, None


class _Columns(torch.autograd.Function):
    """Gather every window, one matrix product."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, mask: CellMask, case: ConvCase
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.mask, ctx.case = mask, case
        columns, matrix, _ = _product(_taps(x, mask, case), weight)
        return as_cells(F.linear(columns, matrix, bias), x.shape[0], case.out_cell)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        mask, case, need = ctx.mask, ctx.case, ctx.needs_input_grad
        rows, taps = to_rows(grads[0]), _taps(x, mask, case)
        columns, matrix, taps_last = _product(taps, weight)
        d_x = d_weight = None
        if need[1]:
            d_weight = _as_weight(rows.t() @ columns, weight, taps_last)
        if need[0]:
            d_taps = (rows @ matrix).view(taps.shape[0], *_order(taps.shape[1:], taps_last))
            d_taps = d_taps.transpose(1, 2) if taps_last else d_taps
            d_rows = _column_table(mask, case, x.device).scatter(d_taps.reshape(-1, x.shape[1]))
            d_x = as_cells(d_rows, x.shape[0], case.cell)
        return d_x, d_weight, _bias_gradient(rows) if need[2] else None, None, None


class _Blocks(torch.autograd.Function):
    """Kernel 1, or kernel equal to stride: the rows each output reads, times a matrix."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, case: ConvCase) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.case = case
        matrix = weight.movedim(1, -1).flatten(1)
        return as_cells(F.linear(_blocks(x, case), matrix, bias), x.shape[0], case.out_cell)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        case, need, rows = ctx.case, ctx.needs_input_grad, to_rows(grads[0])
        d_x = d_weight = None
        if need[1]:
            d_weight = _as_weight(rows.t() @ _blocks(x, case), weight, taps_last=False)
        if need[0]:
            d_rows = rows @ weight.movedim(1, -1).flatten(1)
            d_x = _unblock(d_rows, x, case)
        return d_x, d_weight, _bias_gradient(rows) if need[2] else None, None


def _blocks(x: Tensor, case: ConvCase) -> Tensor:
    """The rows that every output of `_Blocks` reads, `(n * out_sites, taps * c)`."""
    if prod(case.kernel) == 1:
        return to_rows(x[(..., *(slice(None, None, s) for s in case.stride))])
    n, axes = x.shape[0], len(case.cell)
    split = [side for pair in zip(case.out_cell, case.stride, strict=True) for side in pair]
    order = [0, *range(1, 2 * axes, 2), *range(2, 2 * axes + 1, 2), 2 * axes + 1]
    blocks = x.movedim(1, -1).reshape(n, *split, -1).permute(order)
    return blocks.reshape(n * prod(case.out_cell), -1)


def _unblock(rows: Tensor, x: Tensor, case: ConvCase) -> Tensor:
    """The adjoint of `_blocks`."""
    n, c, axes = x.shape[0], x.shape[1], len(case.cell)
    if prod(case.kernel) == 1 and max(case.stride) == 1:
        return as_cells(rows, n, case.cell)
    if prod(case.kernel) == 1:
        out = rows.new_zeros(n, *case.cell, c)
        every = (slice(None), *(slice(None, None, s) for s in case.stride))
        out[every] = rows.view(n, *case.out_cell, c)
        return as_cells(out.view(-1, c), n, case.cell)
    order = [0, *(a for i in range(axes) for a in (1 + i, 1 + axes + i)), 2 * axes + 1]
    blocks = rows.view(n, *case.out_cell, *case.stride, c).permute(order)
    return as_cells(blocks.reshape(-1, c), n, case.cell)


def _column_table(mask: CellMask, case: ConvCase, device: torch.device) -> Table:
    window = case.kernel, case.stride, case.dilation
    return column_table(mask, case.cell, case.span, window, device)


def _taps(x: Tensor, mask: CellMask, case: ConvCase) -> Tensor:
    """The rows of every window, `(windows, taps, c)`."""
    taken = _column_table(mask, case, x.device).gather(to_rows(x))
    return taken.view(-1, prod(case.kernel), x.shape[1])


def _product(taps: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, bool]:
    """Columns and weights as matrices in one order; the smaller of both is the one copied."""
    taps_last = taps.numel() < weight.numel()
    if taps_last:
        return taps.transpose(1, 2).flatten(1), weight.flatten(1), True
    return taps.flatten(1), weight.movedim(1, -1).flatten(1), False


def _order(shape: Sequence[int], taps_last: bool) -> tuple[int, int]:
    return (shape[1], shape[0]) if taps_last else (shape[0], shape[1])


def _as_weight(flat: Tensor, weight: Tensor, taps_last: bool) -> Tensor:
    """A gradient in matrix form, shaped as the weight."""
    if taps_last:
        return flat.view(weight.shape)
    return flat.view(weight.shape[0], *weight.shape[2:], -1).movedim(-1, 1)


def _valid(x: Tensor, weight: Tensor, bias: Tensor | None, case: ConvCase) -> Tensor:
    return CONV[x.ndim - 2](x, weight, bias, case.stride, 0, case.dilation, case.groups)


def _weight_gradient(wide: Tensor, grad: Tensor, weight: Tensor, case: ConvCase) -> Tensor:
    if case.own_gradients:
        none = (0,) * len(case.cell)
        return depthwise.weight_gradient(wide, grad, case.kernel, case.stride, none, case.dilation)
    return _library_gradient(wide, grad, weight, case, of=1)


def _input_gradient(
    grad: Tensor, weight: Tensor, x: Tensor, mask: CellMask, case: ConvCase
) -> Tensor:
    if max(case.stride) == 1:
        mirrored = case.mirrored
        wide = surround(grad, mask, mirrored.span)
        if case.own_gradients:
            return _valid(wide, weight.flip(tuple(range(2, weight.ndim))), None, mirrored)
        reach = [d * (k - 1) for k, d in zip(case.kernel, case.dilation, strict=True)]
        transposed = CONV_TRANSPOSE[x.ndim - 2]
        return transposed(wide, weight, None, 1, reach, 0, case.groups, case.dilation)
    table = halo_table(mask, case.cell, case.span, x.device)
    if case.own_gradients:
        wide = depthwise.input_gradient(
            grad, weight, case.span.length, case.stride, (0,) * len(case.cell), case.dilation
        )
    else:
        shape = (x.shape[0], *case.span.length, x.shape[1])
        empty = x.new_empty(shape).movedim(-1, 1)
        wide = _library_gradient(empty, grad, weight, case, of=0)
    return as_cells(table.scatter(to_rows(wide)), x.shape[0], case.cell)


def _library_gradient(
    wide: Tensor, grad: Tensor, weight: Tensor, case: ConvCase, of: int
) -> Tensor:
    """PyTorch's gradient of the unpadded convolution: of its input (0) or its weight (1)."""
    none, need = [0] * len(case.kernel), [of == 0, of == 1, False]
    backward: Callable[..., Any] = torch.ops.aten.convolution_backward
    stride, dilation = list(case.stride), list(case.dilation)
    return backward(
        grad, wide, weight, None, stride, none, dilation, False, none, case.groups, need
    )[of]


def _bias_gradient(grad: Tensor) -> Tensor:
    sites = (0, *range(2, grad.ndim))
    return grad.sum(sites, dtype=torch.promote_types(grad.dtype, torch.float32)).to(grad.dtype)


def _channels_last(grad: Tensor) -> Tensor:
    return grad.movedim(1, -1).contiguous().movedim(-1, 1)
