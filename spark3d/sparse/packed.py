"""The fast backend: the operations of `functional.py` on visible cells only, exactly, gradients
included.

Tensors are packed, `(b * v, c, *cell)` stored channels-last (see `cells.py`). A convolution or pool
first gathers for each cell the sites around it that its windows reach, zero where hidden or
outside, and then needs no padding.
"""

from collections.abc import Callable, Sequence
from itertools import product
from math import prod
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from spark3d.sparse.cells import (
    Span,
    as_cells,
    from_rows,
    full_size,
    halo_table,
    pack,
    to_rows,
    unpack,
)
from spark3d.sparse.convolution import ConvCase, Strategy, choose, convolve
from spark3d.sparse.functional import AVG_POOL, MAX_POOL, check_pooled
from spark3d.sparse.geometry import Padding, output_size, whole_cells
from spark3d.sparse.mask import CellMask
from spark3d.sparse.rows import RowNorm, at_least_float32


class Layout(NamedTuple):
    """One mask, and the rule that says how each convolution is computed on it."""

    mask: CellMask
    strategy: Callable[[ConvCase], Strategy] = choose


def dense_size(x: Tensor, layout: Layout) -> tuple[int, ...]:
    """Sites per axis of the full map that `x` is packed from."""
    return full_size(layout.mask, x.shape[2:])


def window_span(
    cell: Sequence[int],
    layout: Layout,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Padding,
    dilation: Sequence[int],
) -> Span:
    """The sites that the windows of one output cell reach.

    Raises:
        GeometryError: the sites of an output cell are not those of an input cell at this stride.
    """
    output_size(full_size(layout.mask, cell), kernel, stride, padding, dilation)
    length = tuple(
        (q - 1) * s + d * (k - 1) + 1
        for q, k, s, d in zip(whole_cells(cell, stride), kernel, stride, dilation, strict=True)
    )
    return Span(tuple(lo for lo, _ in padding), length)


def conv(
    x: Float[Tensor, "n c_in *cell"],
    layout: Layout,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Padding,
    dilation: Sequence[int],
    groups: int,
) -> Float[Tensor, "n c_out *out_cell"]:
    """Convolution; see `functional.conv`, and `convolution.py` for the ways to compute it."""
    cell, kernel = tuple(x.shape[2:]), tuple(weight.shape[2:])
    case = ConvCase(
        cell,
        whole_cells(cell, stride),
        kernel,
        tuple(stride),
        padding,
        tuple(dilation),
        groups,
        x.shape[1],
        weight.shape[0],
        window_span(cell, layout, kernel, stride, padding, dilation),
        x.device.type,
    )
    return convolve(x, layout.mask, weight, bias, case, layout.strategy(case))


def max_pool(
    x: Float[Tensor, "n c *cell"],
    layout: Layout,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Padding,
    dilation: Sequence[int],
) -> Float[Tensor, "n c *out_cell"]:
    """Maximum over the visible sites of each window; see `functional.max_pool`."""
    span = window_span(x.shape[2:], layout, kernel, stride, padding, dilation)
    return _MaxPool.apply(x, layout, span, kernel, stride, dilation)  # pyright: ignore[reportReturnType]


class _MaxPool(torch.autograd.Function):
    """Saves the packed input only, and pools again in backward to find the winners."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: Layout, span: Span, *window: Sequence[int]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.table = halo_table(layout.mask, x.shape[2:], span, x.device)
        ctx.span, ctx.window = span, window
        return _MaxPool.pool(ctx, _MaxPool.wide(ctx, x))

    @staticmethod
    def wide(ctx: Any, x: Tensor) -> Tensor:
        """Every cell with its surroundings, minus infinity where hidden or outside."""
        rows = ctx.table.gather(to_rows(x), -torch.inf)
        return from_rows(rows, x.shape[0], ctx.span.length)

    @staticmethod
    def pool(ctx: Any, wide: Tensor) -> Tensor:
        """The maximum of every window, zero for windows without a visible site."""
        kernel, stride, dilation = ctx.window
        y = MAX_POOL[wide.ndim - 2](wide, kernel, stride, dilation=dilation)
        return y.masked_fill(y == -torch.inf, 0)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        wide = _MaxPool.wide(ctx, x)
        if x.is_cuda:  # PyTorch's own gradient adds in whatever order the threads arrive
            d_wide = max_pool_gradient(wide, grads[0], *ctx.window)
        else:
            with torch.enable_grad():
                wide.requires_grad_()
                (d_wide,) = torch.autograd.grad(_MaxPool.pool(ctx, wide), wide, grads[0])
        d_x = as_cells(ctx.table.scatter(to_rows(d_wide)), x.shape[0], x.shape[2:])
        return d_x, None, None, None, None, None


def max_pool_gradient(
    wide: Float[Tensor, "n c *sites"],
    grad: Float[Tensor, "n c *out_cell"],
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
) -> Float[Tensor, "n c *sites"]:
    """Gradient of an unpadded max pooling with respect to `wide`, one place of the window after the
    other: the same bits on every run. Windows that hold nothing but minus infinity pass none on.
    """
    sites = wide.shape[2:]
    y, winner = MAX_POOL[len(sites)](wide, kernel, stride, dilation=dilation, return_indices=True)
    grad = grad.masked_fill(y == -torch.inf, 0)
    number = torch.arange(prod(sites), device=wide.device).view(sites)
    found = torch.zeros_like(wide)
    for place in product(*map(range, kernel)):
        windows = tuple(
            slice(d * o, d * o + (q - 1) * s + 1, s)
            for o, d, s, q in zip(place, dilation, stride, y.shape[2:], strict=True)
        )
        found[(..., *windows)] += torch.where(winner == number[windows], grad, 0)
    return found


def avg_pool(
    x: Float[Tensor, "n c *cell"],
    layout: Layout,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
) -> Float[Tensor, "n c *out_cell"]:
    """Average pooling; see `functional.avg_pool`. Padded or rounded-up windows take a detour over
    the full grid.
    """
    pool = AVG_POOL[x.ndim - 2]
    aligned = all(
        k == s and p % s == 0 for k, s, p in zip(kernel, stride, x.shape[2:], strict=True)
    )
    if aligned and not any(padding):
        return pool(x, kernel, stride)
    whole_cells(x.shape[2:], stride)
    full = unpack(x, layout.mask)
    if x.is_cuda:  # PyTorch's gradient of padded channels-last maps is wrong there (its #188344)
        full = full.contiguous()
    y = pool(full, kernel, stride, padding, ceil_mode, count_include_pad)
    check_pooled(dense_size(x, layout), y.shape[2:], stride)
    return pack(y, layout.mask)


def row_norm(
    x: Float[Tensor, "n c *cell"], layout: Layout, norm: RowNorm
) -> Float[Tensor, "n c *cell"]:
    """BatchNorm: every site is visible; see `functional.row_norm`."""
    del layout
    return norm(x)


def group_norm(
    x: Float[Tensor, "n c *cell"],
    layout: Layout,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Float[Tensor, "n c *cell"]:
    """GroupNorm per sample: the cells of a sample are one long map; see `functional.group_norm`."""
    return _GroupNorm.apply(x, weight, bias, layout.mask.batch, groups, eps)  # pyright: ignore[reportReturnType]


class _GroupNorm(torch.autograd.Function):
    """PyTorch's own group norm of one long map per sample, returned as cells."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        batch: int,
        groups: int,
        eps: float,
    ) -> Tensor:
        long = _GroupNorm.long(x, batch)
        sizes = batch, x.shape[1], long.shape[2], groups
        scale = None if weight is None else at_least_float32(weight)
        offset = None if bias is None else at_least_float32(bias)
        # PyTorch's channels-last kernel takes E[x^2] - E[x]^2, which cancels unless E[x] is small
        centre = long.mean(2).view(batch, groups, -1).mean(2)
        long = long - centre.repeat_interleave(x.shape[1] // groups, dim=1)[..., None, None]
        y, mean, rstd = torch.native_group_norm(long, scale, offset, *sizes, eps)
        ctx.save_for_backward(x, weight, mean + centre, rstd)
        ctx.sizes, ctx.with_bias = sizes, bias is not None
        y = y.to(x.dtype).contiguous(memory_format=torch.channels_last)
        return as_cells(y, x.shape[0], x.shape[2:])

    @staticmethod
    def long(x: Tensor, batch: int) -> Tensor:
        """`(b, c, visible sites, 1)`, wide enough for statistics, stored as the device's kernel
        takes it: channels-last on the CPU, channels first elsewhere.
        """
        wide = at_least_float32(to_rows(x).view(batch, -1, 1, x.shape[1]).movedim(-1, 1))
        return wide if x.device.type == "cpu" else wide.contiguous()

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        # in float32: the CPU's bfloat16 gradient of a channels-last map takes seven times as long
        x, weight, mean, rstd = ctx.saved_tensors
        batch, affine = ctx.sizes[0], weight is not None
        d_long, d_weight, d_bias = torch.ops.aten.native_group_norm_backward(
            _GroupNorm.long(grads[0], batch),
            _GroupNorm.long(x, batch),
            mean,
            rstd,
            at_least_float32(weight) if affine else None,
            *ctx.sizes,
            [ctx.needs_input_grad[0], affine, ctx.with_bias],
        )
        d_x = None
        if d_long is not None:
            d_x = from_rows(to_rows(d_long.to(x.dtype)), x.shape[0], x.shape[2:])
        d_weight = d_weight.to(weight.dtype) if affine else None
        d_bias = d_bias.to(weight.dtype) if affine and ctx.with_bias else d_bias
        return d_x, d_weight, d_bias, None, None, None


def sample_mean(x: Float[Tensor, "n c *cell"], layout: Layout) -> Float[Tensor, "b c"]:
    """Mean over the visible sites of each sample."""
    return at_least_float32(per_sample(x, layout)).mean(dim=1).to(x.dtype)


def sample_max(x: Float[Tensor, "n c *cell"], layout: Layout) -> Float[Tensor, "b c"]:
    """Maximum over the visible sites of each sample."""
    return per_sample(x, layout).amax(dim=1)


def sample_l2(x: Float[Tensor, "n c *cell"], layout: Layout) -> Float[Tensor, "b c"]:
    """L2 norm over the visible sites of each sample."""
    return at_least_float32(per_sample(x, layout)).norm(dim=1).to(x.dtype)


def over_sites(
    values: Float[Tensor, "b k"], x: Float[Tensor, "n c *cell"], layout: Layout
) -> Float[Tensor, "n k *ones"]:
    """Values of each sample, repeated for each of its cells and shaped to broadcast over their
    sites.
    """
    values = values.repeat_interleave(layout.mask.n_visible, dim=0)
    return values.view(*values.shape, *(1,) * (x.ndim - 2))


def per_sample(x: Float[Tensor, "n c *cell"], layout: Layout) -> Float[Tensor, "b sites c"]:
    """The rows of each sample."""
    return to_rows(x).view(layout.mask.batch, -1, x.shape[1])
