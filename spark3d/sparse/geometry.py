"""How many sites a window operation makes of a map; what cells do not fit is refused."""

from collections.abc import Sequence

from torch import Tensor

Padding = tuple[tuple[int, int], ...]
"""Sites added before and after each axis."""


class GeometryError(ValueError):
    """A map does not fit the mask; the layer that meets it adds its name."""


def output_size(
    size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Padding,
    dilation: Sequence[int],
) -> tuple[int, ...]:
    """Sites per axis after a convolution or pool; always `size / stride`, or the cells move.

    Raises:
        GeometryError: the output is not exactly `stride` times smaller than the input.
    """
    out = []
    for axis, (n, k, s, (lo, hi), d) in enumerate(
        zip(size, kernel, stride, padding, dilation, strict=True)
    ):
        sites = (n + lo + hi - d * (k - 1) - 1) // s + 1
        if n % s or sites != n // s:
            raise GeometryError(
                f"kernel {k}, stride {s}, padding {(lo, hi)} and dilation {d} turn {n} sites into "
                f"{sites} along axis {axis}, but cells stay in place only if they become "
                f"{n}/{s}; choose padding and crop size accordingly"
            )
        out.append(sites)
    return tuple(out)


def whole_cells(cell: Sequence[int], stride: Sequence[int]) -> tuple[int, ...]:
    """Sites of a packed cell after a stride.

    Raises:
        GeometryError: the cell would not stay whole.
    """
    if any(p % s for p, s in zip(cell, stride, strict=True)):
        raise GeometryError(
            f"cells of {tuple(cell)} sites are no multiple of the stride {tuple(stride)}; enlarge "
            'the cells to the total stride of the network or use backend="reference" '
            "(model.backend=reference in a recipe)"
        )
    return tuple(p // s for p, s in zip(cell, stride, strict=True))


def nearest_sizes(size: Sequence[int], cell_size: Sequence[int]) -> str:
    """Which sizes would fit, axis by axis, for a message; empty if all fit."""
    parts = []
    for axis, (voxels, side) in enumerate(zip(size, cell_size, strict=True)):
        if voxels % side:
            below = voxels // side * side
            around = f"{below} and {below + side}" if below else f"{side}"
            parts.append(
                f"{voxels} voxels are not a multiple of {side} along axis {axis}, the nearest "
                f"that fit are {around}"
            )
    return "; ".join(parts)


def padded_size(size: Sequence[int], unit: Sequence[int]) -> tuple[int, ...]:
    """The smallest multiples of `unit` that hold `size`."""
    return tuple(-(-n // side) * side for n, side in zip(size, unit, strict=True))


def pad_crops(crops: Tensor, unit: Sequence[int]) -> Tensor:
    """`(b, c, *size)` made longer at the end of each axis, up to whole multiples of `unit`.

    The new voxels are as dark as the darkest of their crop and channel. To the encoder and the
    objective they are voxels like others.
    """
    size = tuple(crops.shape[2:])
    full = padded_size(size, unit)
    if full == size:
        return crops
    dark = crops.flatten(2).amin(2).view(*crops.shape[:2], *(1,) * len(size))
    out = dark.repeat(1, 1, *full)
    out[(..., *(slice(n) for n in size))] = crops
    return out
