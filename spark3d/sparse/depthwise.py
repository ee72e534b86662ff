"""Depthwise convolution whose gradients are forward convolutions: exact, and fast on a CPU.

PyTorch's CPU gradients of a large depthwise kernel take 10 to 90 times as long as its forward. The
gradient of the input is the forward of the flipped kernel; the gradient of the kernel is a forward
depthwise convolution in which every pair of sample and channel is a channel of its own, the input
its map and the output gradient its kernel. On other devices the library's own gradients are used.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from spark3d.sparse.functional import CONV
from spark3d.sparse.rows import at_least_float32

THICK = 8
"""Slices of a 3D output from which on the gradient of its kernel is taken slice by slice."""


def depthwise_conv(
    x: Float[Tensor, "n c *size"],
    weight: Float[Tensor, "c 1 *kernel"],
    bias: Float[Tensor, " c"] | None = None,
    stride: Sequence[int] | int = 1,
    padding: Sequence[int] | int = 0,
    dilation: Sequence[int] | int = 1,
) -> Float[Tensor, "n c *out"]:
    """Convolve every channel with its own kernel; the same numbers as `F.conv{1,2,3}d`.

    Serves dense networks too: give it the arguments of a layer with `groups == channels`.
    """
    ndim = x.ndim - 2
    stride, padding, dilation = (
        (v,) * ndim if isinstance(v, int) else tuple(v) for v in (stride, padding, dilation)
    )
    if x.device.type != "cpu":
        return CONV[ndim](x, weight, bias, stride, padding, dilation, x.shape[1])
    x, weight, bias = autocast(x, weight, bias)
    return _Depthwise.apply(x, weight, bias, stride, padding, dilation)  # pyright: ignore[reportReturnType]


def autocast(
    x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The operands of a convolution in the precision that autocast wants on their device."""
    kind = x.device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return x, weight, bias
    low = torch.get_autocast_dtype(kind)
    return x.to(low), weight.to(low), None if bias is None else bias.to(low)


def input_gradient(
    grad: Tensor,
    weight: Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """Gradient of the input, of `size` sites: spread `grad`, convolve with the flipped kernel."""
    ndim, spread = weight.ndim - 2, spread_sites(grad, stride)
    before = [d * (k - 1) - p for k, d, p in zip(weight.shape[2:], dilation, padding, strict=True)]
    after = [n + p - m for n, p, m in zip(size, padding, spread.shape[2:], strict=True)]
    flipped = weight.flip(tuple(range(2, weight.ndim)))
    if before != after or min(before) < 0:
        pads = [n for pair in zip(reversed(before), reversed(after), strict=True) for n in pair]
        spread, before = F.pad(spread, pads), [0] * ndim
    return CONV[ndim](spread, flipped, None, 1, before, tuple(dilation), weight.shape[0])


def spread_sites(grad: Tensor, stride: Sequence[int]) -> Tensor:
    """Put `stride - 1` zeros between the sites of every axis."""
    if all(s == 1 for s in stride):
        return grad
    size = [(n - 1) * s + 1 for n, s in zip(grad.shape[2:], stride, strict=True)]
    out = grad.new_zeros(grad.shape[0], *size, grad.shape[1]).movedim(-1, 1)
    out[(..., *(slice(None, None, s) for s in stride))] = grad
    return out


def weight_gradient(
    x: Tensor,
    grad: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """Gradient of the kernel, `(c, 1, *kernel)`: `x` convolved with `grad`, map by map.

    Thick maps of more than two axes are convolved slice by slice along the first, which is faster.
    """
    n, c, ndim = x.shape[0], x.shape[1], x.ndim - 2
    # sites first, then one channel per pair of sample and channel
    maps = x.movedim(1, -1).movedim(0, -2).flatten(-2)
    kernels = grad.flatten(0, 1).unsqueeze(1)
    if ndim > 2 and grad.shape[2] >= THICK:
        total = _by_slices(maps, kernels, kernel, stride, padding, dilation)
    else:
        folded = maps.unsqueeze(0).movedim(-1, 1)
        total = CONV[ndim](folded, kernels, None, dilation, padding, stride, n * c)[0]
    total = total[(slice(None), *(slice(0, k) for k in kernel))]
    return total.reshape(n, c, *kernel).sum(dim=0).unsqueeze(1).to(grad.dtype)


def _by_slices(
    maps: Tensor,
    kernels: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """A convolution as a sum of ones of an axis less, over the slices of its (thick) kernels.

    `maps` are `(*size, channels)`, `kernels` `(channels, 1, *out)`; `(channels, *kernel)` results.
    """
    conv = CONV[len(kernel) - 1]
    if padding[0]:
        maps = F.pad(maps, [0] * (2 * len(kernel)) + [padding[0]] * 2)
    total, reach = None, dilation[0] * (kernel[0] - 1) + 1
    for number, part in enumerate(kernels.unbind(2)):
        begin = number * stride[0]
        slices = maps[begin : begin + reach : dilation[0]].movedim(-1, 1)
        y = conv(slices, part, None, dilation[1:], padding[1:], stride[1:], len(kernels))
        y = at_least_float32(y)
        total = y if total is None else total + y
    assert total is not None
    return total.movedim(0, 1)


class _Depthwise(torch.autograd.Function):
    """Saves the input and the kernel only."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *geometry: tuple[int, ...],
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry = geometry
        stride, padding, dilation = geometry
        return CONV[x.ndim - 2](x, weight, bias, stride, padding, dilation, x.shape[1])

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        d_x = d_weight = d_bias = None
        if need_x:
            d_x = input_gradient(grad, weight, x.shape[2:], *ctx.geometry)
        if need_weight:
            d_weight = weight_gradient(x, grad, weight.shape[2:], *ctx.geometry)
        if need_bias:
            wide = torch.promote_types(grad.dtype, torch.float32)
            d_bias = grad.sum((0, *range(2, grad.ndim)), dtype=wide).to(grad.dtype)
        return d_x, d_weight, d_bias, None, None, None
