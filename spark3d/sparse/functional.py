"""The definitions: what every operation means on a map whose hidden cells are empty, on the full
grid.

Slow and obvious; `packed.py` does the same work on visible cells only, and the tests hold the two
equal. Every operation first empties the hidden sites of its input, so it does not matter what
pointwise layers left there (a bias, a layer norm), and empties those of its output, so that the
mask never erodes (SparK, fig. 3). Maps are `(b, c, *size)`.

K. Tian et al., "Designing BERT for convolutional networks: sparse and hierarchical masked
modeling", ICLR 2023. S. Woo et al., "ConvNeXt V2: co-designing and scaling ConvNets with masked
autoencoders", CVPR 2023.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from spark3d.sparse.geometry import GeometryError, Padding, output_size
from spark3d.sparse.mask import CellMask
from spark3d.sparse.rows import RowNorm, at_least_float32

CONV: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
MAX_POOL: dict[int, Callable[..., Any]] = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
AVG_POOL: dict[int, Callable[..., Tensor]] = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


def hide(
    x: Float[Tensor, "b c *size"], mask: CellMask, fill: float = 0.0
) -> Float[Tensor, "b c *size"]:
    """Empty the hidden sites, whatever they held."""
    return x.masked_fill(~mask.at(x.shape[2:]), fill)


def dense_size(x: Tensor, mask: CellMask) -> tuple[int, ...]:
    """Sites per axis of the full map that `x` is, or is packed from."""
    del mask
    return tuple(x.shape[2:])


def conv(
    x: Float[Tensor, "b c_in *in_size"],
    mask: CellMask,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Padding,
    dilation: Sequence[int],
    groups: int,
) -> Float[Tensor, "b c_out *out_size"]:
    """Convolution of the emptied map; `padding` holds zeros before and after each axis."""
    output_size(x.shape[2:], weight.shape[2:], stride, padding, dilation)
    x = F.pad(hide(x, mask), [n for pair in reversed(padding) for n in pair])
    y = CONV[x.ndim - 2](x, weight, bias, stride=stride, dilation=dilation, groups=groups)
    return hide(y, mask)


def max_pool(
    x: Float[Tensor, "b c *in_size"],
    mask: CellMask,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Padding,
    dilation: Sequence[int],
) -> Float[Tensor, "b c *out_size"]:
    """Maximum over the visible sites of each window; a window without any gives zero."""
    output_size(x.shape[2:], kernel, stride, padding, dilation)
    x = F.pad(
        hide(x, mask, -torch.inf), [n for pair in reversed(padding) for n in pair], value=-torch.inf
    )
    y = MAX_POOL[x.ndim - 2](x, kernel, stride, dilation=dilation)
    return hide(y.masked_fill(y == -torch.inf, 0), mask)


def avg_pool(
    x: Float[Tensor, "b c *in_size"],
    mask: CellMask,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
) -> Float[Tensor, "b c *out_size"]:
    """Average pooling of the emptied map: hidden sites count as zeros, as official SparK does."""
    pool = AVG_POOL[x.ndim - 2]
    y = pool(hide(x, mask), kernel, stride, padding, ceil_mode, count_include_pad)
    check_pooled(x.shape[2:], y.shape[2:], stride)
    return hide(y, mask)


def check_pooled(size: Sequence[int], pooled: Sequence[int], stride: Sequence[int]) -> None:
    """Refuse a pooling that moves the cells.

    Raises:
        GeometryError: `pooled` is not `size / stride`.
    """
    if any(n != out * s for n, out, s in zip(size, pooled, stride, strict=True)):
        raise GeometryError(
            f"pooling turns {tuple(size)} sites into {tuple(pooled)} at stride {tuple(stride)}, "
            "which moves the cells; choose padding and crop size accordingly"
        )


def row_norm(
    x: Float[Tensor, "b c *size"], mask: CellMask, norm: RowNorm
) -> Float[Tensor, "b c *size"]:
    """BatchNorm: `norm` takes the visible sites of the whole batch as rows `(n, c)`."""
    visible = mask.at(x.shape[2:])[:, 0]
    rows = norm(x.movedim(1, -1)[visible])
    y = rows.new_zeros(x.movedim(1, -1).shape)
    y[visible] = rows
    return y.movedim(-1, 1)


def group_norm(
    x: Float[Tensor, "b c *size"],
    mask: CellMask,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Float[Tensor, "b c *size"]:
    """GroupNorm over the visible sites of one sample; `groups = c` is InstanceNorm."""
    wide = at_least_float32(x)
    flat = wide.reshape(x.shape[0], groups, x.shape[1] // groups, -1)
    keep = mask.at(x.shape[2:]).flatten(1)[:, None, None].to(flat.dtype)
    flat = flat.masked_fill(keep == 0, 0)
    count = keep.sum(dim=(2, 3), keepdim=True) * flat.shape[2]
    mean = (flat * keep).sum(dim=(2, 3), keepdim=True) / count
    var = ((flat - mean).square() * keep).sum(dim=(2, 3), keepdim=True) / count
    y = ((flat - mean) * (var + eps).rsqrt()).reshape(x.shape)
    shape = (1, -1, *(1,) * (x.ndim - 2))
    y = y if weight is None else y * weight.view(shape)
    y = y if bias is None else y + bias.view(shape)
    return hide(y.to(x.dtype), mask)


def sample_mean(x: Float[Tensor, "b c *size"], mask: CellMask) -> Float[Tensor, "b c"]:
    """Mean over the visible sites of each sample (global average pooling, squeeze-excite)."""
    keep = mask.at(x.shape[2:])
    total = at_least_float32(hide(x, mask)).flatten(2).sum(dim=2)
    return (total / keep.flatten(1).sum(dim=1, keepdim=True)).to(x.dtype)


def sample_max(x: Float[Tensor, "b c *size"], mask: CellMask) -> Float[Tensor, "b c"]:
    """Maximum over the visible sites of each sample."""
    return hide(x, mask, -torch.inf).flatten(2).amax(dim=2)


def sample_l2(x: Float[Tensor, "b c *size"], mask: CellMask) -> Float[Tensor, "b c"]:
    """L2 norm over the visible sites of each sample (global response normalisation, ConvNeXt V2,
    sec. 3.3).
    """
    return at_least_float32(hide(x, mask)).flatten(2).norm(dim=2).to(x.dtype)


def over_sites(
    values: Float[Tensor, "b k"], x: Float[Tensor, "b c *size"], mask: CellMask
) -> Float[Tensor, "b k *ones"]:
    """Values of each sample, shaped to broadcast over the sites of `x`."""
    del mask
    return values.view(*values.shape, *(1,) * (x.ndim - 2))
