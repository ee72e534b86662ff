"""Histograms of oriented gradients over cells, in 2D as LocalMIM's, in 3D after Klaeser et al.

2D: H. Wang et al., "Masked image modeling with local multi-scale reconstruction", CVPR 2023, public
code. 3D: A. Klaeser, M. Marszalek, C. Schmid, "A spatio-temporal descriptor based on 3D-gradients",
BMVC 2008: ten axes through opposite faces of an icosahedron, each voxel's gradient votes for those
it is close to. Orientations are unsigned, votes weigh as much as the gradient, every cell's
histogram has unit length in each channel.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from math import cos, pi, prod, sin, sqrt

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

CONVOLVE = {2: F.conv2d, 3: F.conv3d}
AVERAGE = {2: F.avg_pool2d, 3: F.avg_pool3d}
NEIGHBOURS_3D = sqrt(5) / 3  # cosine of the angle between neighbouring axes of the ten


def orientation_axes(ndim: int, bins: int = 9) -> Float[Tensor, "k axes"]:
    """Unit vectors of the bins: `bins` equal sectors in 2D, always ten axes in 3D."""
    if ndim == 2:
        angles = [(k + 0.5) * pi / bins for k in range(bins)]
        return torch.tensor([(cos(a), sin(a)) for a in angles], dtype=torch.float64)
    phi = (1 + sqrt(5)) / 2
    corners = {tuple(float(s) for s in signs) for signs in product((-1, 1), repeat=3)}
    for a, b in product((-1 / phi, 1 / phi), (-phi, phi)):
        corners |= {(0.0, a, b), (a, b, 0.0), (b, 0.0, a)}
    upper = [c for c in corners if next(x for x in c if x) > 0]
    return torch.tensor(sorted(upper), dtype=torch.float64) / sqrt(3)


def gradients(
    x: Float[Tensor, "n 1 *size"], spacing: Sequence[float] | None = None
) -> Float[Tensor, "n axes *size"]:
    """Differences along each axis, smoothed with (1, 2, 1) along the others, borders reflected.

    Divided by `spacing` (mm per voxel) where given, so that they are those of the body.
    """
    ndim = x.ndim - 2
    difference, smooth = x.new_tensor([1.0, 0.0, -1.0]), x.new_tensor([1.0, 2.0, 1.0])
    kernels = []
    for axis in range(ndim):
        kernel = x.new_ones((1,) * ndim)
        for other in range(ndim):
            shape = [3 if a == other else 1 for a in range(ndim)]
            kernel = kernel * (difference if other == axis else smooth).view(shape)
        kernels.append(kernel / (spacing[axis] if spacing else 1))
    padded = F.pad(x, (1, 1) * ndim, mode="reflect")
    return CONVOLVE[ndim](padded, torch.stack(kernels).unsqueeze(1))


def votes(g: Float[Tensor, "n axes *size"], bins: int, soft: bool) -> Float[Tensor, "n k *size"]:
    """How each voxel's gradient spreads its length over the bins.

    Hard: all of it to the nearest axis. Soft: to the axes nearer than neighbours are to each other,
    in proportion to how much nearer, with unit length; exactly one bin along an axis.
    """
    ndim = g.shape[1]
    length = g.square().sum(1, keepdim=True).sqrt()
    if ndim == 2 and not soft:  # by angle, as official: ties of exact axes fall as they do there
        angle = torch.atan2(g[:, 1], g[:, 0])
        nearest = torch.floor(angle / pi * bins).long() % bins
        return torch.zeros_like(length).repeat(1, bins, 1, 1).scatter(1, nearest[:, None], length)
    axes = orientation_axes(ndim, bins).to(g)
    projected = torch.einsum("ka,na...->nk...", axes, g).abs()
    if not soft:
        one = torch.zeros_like(projected)
        return one.scatter(1, projected.argmax(1, keepdim=True), length)
    least = cos(pi / bins) if ndim == 2 else NEIGHBOURS_3D
    closeness = (projected - least * length).clamp(min=0)
    return length * F.normalize(closeness, dim=1, eps=torch.finfo(g.dtype).tiny)


def hog(
    crops: Float[Tensor, "b c *size"],
    cell: Sequence[int],
    bins: int = 9,
    soft: bool | None = None,
    spacing: Sequence[float] | None = None,
    floor: float = 0.0,
) -> Float[Tensor, "b ck *grid"]:
    """Histograms of every cell, channel by channel: `(b, c * k, *grid)`, in float32 at least.

    Args:
        crops: The unmasked crops, 2D or 3D.
        cell: Voxels per axis of a cell.
        bins: Sectors in 2D; ten axes in 3D whatever it says.
        soft: Whether voxels vote for several bins; by default in 3D only, where the axes of the
            volume lie midway between bins and hard votes would flip with noise.
        spacing: mm per voxel along each axis, for anisotropic volumes.
        floor: Length of a cell's mean histogram that counts as noise: divides by
            sqrt(length^2 + floor^2), in units of the crop per voxel. 0, officially, blows up noise.

    Raises:
        ValueError: The size is not a multiple of the cell.
    """
    size, ndim = tuple(crops.shape[2:]), crops.ndim - 2
    if any(s % c for s, c in zip(size, cell, strict=True)):
        raise ValueError(f"a crop of {size} voxels is not a multiple of HOG cells of {tuple(cell)}")
    soft = ndim == 3 if soft is None else soft
    with torch.no_grad(), torch.autocast(crops.device.type, enabled=False):
        wide = crops.to(torch.promote_types(crops.dtype, torch.float32))
        flat = wide.reshape(prod(crops.shape[:2]), 1, *size)
        voted = votes(gradients(flat, spacing), bins, soft)
        mean = AVERAGE[ndim](voted, tuple(cell), tuple(cell))
        if floor > 0:
            unit = mean / (mean.square().sum(1, keepdim=True) + floor**2).sqrt()
        else:
            unit = F.normalize(mean, dim=1, eps=1e-12)
        return unit.reshape(len(crops), -1, *unit.shape[2:])


def glyphs(cell: Sequence[int], bins: int = 9) -> Float[Tensor, "k *cell"]:
    """A picture of each bin: the edge (line or plane) that its gradients stand across."""
    axes = orientation_axes(len(cell), bins)
    steps = [
        torch.linspace(-1, 1, n, dtype=torch.float64) if n > 1 else torch.zeros(1) for n in cell
    ]
    places = torch.stack(torch.meshgrid(*[s.double() for s in steps], indexing="ij"))
    distance = torch.einsum("ka,a...->k...", axes, places)
    return torch.exp(-distance.square() / (2 * 0.25**2)).float()
