"""Random changes of a crop, drawn from the generator of that sample and from nothing else.

Rotation, zoom and cut are one linear resampling by `torch.nn.functional.grid_sample`, whose grid
image and label share: 8 ms for a crop of 48x64x48 with its label on one thread, where MONAI's
`Affine` takes 13 ms for the image alone and 4 s to import in every worker. Crops are read
`margin` larger than needed, so that turning one brings in real neighbours, not an invented rim.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from spark3d.errors import ConfigError

LEFT_RIGHT_AXIS = 0
"""In RAS+ order the first axis runs from left to right."""


class Augmentation(Protocol):
    """What a loader asks of an augmentation."""

    def read_size(self, crop: Sequence[int]) -> tuple[int, ...]:
        """Voxels per axis to read so that `crop` remains."""
        ...

    def __call__(
        self, crop: Tensor, label: Tensor | None, size: Sequence[int], rng: np.random.Generator
    ) -> tuple[Tensor, Tensor | None]:
        """Turn what was read, `(c, *read)` and `(*read)`, into `(c, *size)` and `(*size)`."""
        ...


@dataclass(frozen=True)
class Affine:
    """A random rotation and zoom about the centre of the crop.

    Attributes:
        probability: Of doing anything.
        degrees: Largest angle, about every axis (3D) or in the plane (2D).
        zoom: Lowest and highest magnification, one draw for all axes.
        stretch: Largest further factor of one axis against another, e.g. 0.1 for 0.9..1.1.
        spacing: Spacing per axis (any unit), so that rotations keep shapes where voxels are not
            cubes; empty means cubes.
        margin: Extra share of the crop to read along every axis.
    """

    probability: float = 0.5
    degrees: float = 15.0
    zoom: tuple[float, float] = (0.85, 1.2)
    stretch: float = 0.0
    spacing: tuple[float, ...] = ()
    margin: float = 0.25

    def __post_init__(self) -> None:
        if not 0 < self.zoom[0] <= self.zoom[1]:
            raise ConfigError(f"augmentation: zoom={self.zoom} must be two rising numbers above 0")
        if not 0 <= self.stretch < 1 or self.margin < 0:
            raise ConfigError(
                f"augmentation: stretch={self.stretch} must lie in [0, 1) and "
                f"margin={self.margin} must not be negative"
            )

    def draw(self, ndim: int, rng: np.random.Generator) -> np.ndarray | None:
        """Draw the matrix from output to input offsets, in voxels, or None for no change.

        The generator moves on equally far whatever comes out.

        Raises:
            ConfigError: `spacing` is not one number per axis.
        """
        if self.spacing and len(self.spacing) != ndim:
            raise ConfigError(f"augmentation: spacing={self.spacing} is not one number per axis")
        happens = rng.random() < self.probability
        angles = np.deg2rad(rng.uniform(-self.degrees, self.degrees, math.comb(ndim, 2)))
        zoom = math.exp(rng.uniform(math.log(self.zoom[0]), math.log(self.zoom[1])))
        zooms = zoom * rng.uniform(1 - self.stretch, 1 + self.stretch, ndim)
        if not happens:
            return None
        spacing = np.asarray(self.spacing or (1.0,) * ndim)
        in_mm = rotation(angles, ndim) @ np.diag(1 / zooms)
        return in_mm * spacing[None, :] / spacing[:, None]


@dataclass(frozen=True)
class Flips:
    """Random mirror images.

    Attributes:
        probability: Per axis; empty means none.
        swap: Labels that change places in a left-right mirror image, e.g. `((2, 3), (12, 13))`
            for kidneys and adrenal glands in BTCV.
    """

    probability: tuple[float, ...] = (0.5, 0.5, 0.5)
    swap: tuple[tuple[int, int], ...] = ()

    def __call__(
        self, crop: Tensor, label: Tensor | None, rng: np.random.Generator
    ) -> tuple[Tensor, Tensor | None]:
        """Flip `(c, *size)` and `(*size)` along the axes drawn."""
        draws = rng.random(len(self.probability))
        axes = [i for i, p in enumerate(self.probability) if draws[i] < p and i < crop.ndim - 1]
        if not axes:
            return crop, label
        crop = crop.flip([axis + 1 for axis in axes])
        if label is None:
            return crop, None
        label = label.flip(axes)
        if LEFT_RIGHT_AXIS in axes and self.swap:
            label = swap_labels(label, self.swap)
        return crop, label


@dataclass(frozen=True)
class Turns:
    """Random quarter turns in the plane of the first two axes, as MONAI's `RandRotate90`.

    Attributes:
        probability: Of a turn, by one, two or three quarters.
    """

    probability: float = 0.0

    def __call__(
        self, crop: Tensor, label: Tensor | None, rng: np.random.Generator
    ) -> tuple[Tensor, Tensor | None]:
        """Turn `(c, *size)` and `(*size)`; nothing is drawn where the probability is 0.

        Raises:
            ConfigError: The crop has sides of two lengths in that plane.
        """
        if not self.probability:
            return crop, label
        happens, quarters = rng.random() < self.probability, int(rng.integers(1, 4))
        if crop.shape[1] != crop.shape[2]:
            raise ConfigError(
                f"augmentation: quarter turns need crops with equal first sides, not "
                f"{tuple(crop.shape[1:])}; set data.augment.rot90=0"
            )
        if not happens:
            return crop, label
        turned = None if label is None else torch.rot90(label, quarters, (0, 1))
        return torch.rot90(crop, quarters, (1, 2)), turned


@dataclass(frozen=True)
class Intensity:
    """Random brightness, contrast and noise, in the network's range.

    Attributes:
        probability: Of each of the three, or one for each: scale, shift, noise.
        scale: Contrast factor within `1 - scale .. 1 + scale`; leaves air at 0.
        shift: Offset within `-shift .. shift`; moves air too.
        noise: Highest standard deviation of Gaussian noise.
    """

    probability: float | tuple[float, float, float] = 0.5
    scale: float = 0.1
    shift: float = 0.0
    noise: float = 0.0

    def __call__(self, crop: Tensor, rng: np.random.Generator) -> Tensor:
        """Return a changed copy, or the crop itself if nothing was drawn."""
        happens = rng.random(3) < np.asarray(self.probability)
        scale, shift, sigma = rng.random(3) * (2, 2, 1) - (1, 1, 0)
        if happens[0] and self.scale:
            crop = crop * (1 + self.scale * float(scale))
        if happens[1] and self.shift:
            crop = crop + self.shift * float(shift)
        if happens[2] and self.noise:
            noise = rng.standard_normal(tuple(crop.shape), dtype=np.float32)
            crop = crop + torch.from_numpy(noise) * (self.noise * float(sigma))
        return crop


@dataclass(frozen=True)
class Augment:
    """For pre-training: mirror images, a zoom (the "RandomResizedCrop" of volumes), contrast."""

    affine: Affine = field(
        default_factory=lambda: Affine(degrees=0.0, zoom=(0.8, 1.25), stretch=0.1, margin=0.25)
    )
    flips: Flips = field(default_factory=Flips)
    intensity: Intensity = field(default_factory=Intensity)
    turns: Turns = field(default_factory=Turns)

    def read_size(self, crop: Sequence[int]) -> tuple[int, ...]:
        """Voxels per axis to read so that `crop` remains."""
        return grown(crop, self.affine.margin if self.affine.probability else 0.0)

    def __call__(
        self, crop: Tensor, label: Tensor | None, size: Sequence[int], rng: np.random.Generator
    ) -> tuple[Tensor, Tensor | None]:
        """Turn what was read, `(c, *read)` and `(*read)`, into `(c, *size)` and `(*size)`."""
        matrix = self.affine.draw(len(size), rng)
        crop, label = resample_crop(crop, label, matrix, size)
        crop, label = self.flips(crop, label, rng)
        crop, label = self.turns(crop, label, rng)
        return self.intensity(crop, rng), label


@dataclass(frozen=True)
class SegmentationAugment(Augment):
    """For fine-tuning: rotation and zoom, left-right mirror images, contrast, offset and noise."""

    affine: Affine = field(default_factory=Affine)
    flips: Flips = field(default_factory=lambda: Flips((0.5, 0.0, 0.0)))
    intensity: Intensity = field(
        default_factory=lambda: Intensity(scale=0.1, shift=0.1, noise=0.05)
    )


def grown(crop: Sequence[int], margin: float) -> tuple[int, ...]:
    """Enlarge a size by at least `margin`, by an even number of voxels."""
    return tuple(c + 2 * math.ceil(c * margin / 2) for c in crop)


def rotation(angles: Sequence[float] | np.ndarray, ndim: int) -> np.ndarray:
    """Multiply one rotation, in radians, for every pair of axes (0, 1), (0, 2), (1, 2) ..."""
    total = np.eye(ndim)
    pairs = [(i, j) for i in range(ndim) for j in range(i + 1, ndim)]
    for angle, (i, j) in zip(angles, pairs, strict=True):
        turn = np.eye(ndim)
        turn[[i, i, j, j], [i, j, i, j]] = (
            math.cos(angle), -math.sin(angle), math.sin(angle), math.cos(angle),
        )  # fmt: skip
        total = total @ turn
    return total


def resample_crop(
    crop: Tensor, label: Tensor | None, matrix: np.ndarray | None, size: Sequence[int]
) -> tuple[Tensor, Tensor | None]:
    """Sample the central `size` voxels through `matrix`: image linearly, label by the nearest.

    Args:
        crop: `(c, *read)`, two or three axes.
        label: `(*read)` integers below 2**24, or None.
        matrix: Output offset from the centre -> input offset, in voxels; None cuts the centre.
        size: Voxels per axis of the result. Outside of `crop` its rim is repeated.
    """
    read = crop.shape[1:]
    if matrix is None:
        cut = tuple(slice((r - s) // 2, (r - s) // 2 + s) for r, s in zip(read, size, strict=True))
        return crop[(slice(None), *cut)], None if label is None else label[cut]
    normal = matrix * np.asarray(size)[None, :] / np.asarray(read)[:, None]
    # grid_sample counts axes from the last
    theta = torch.from_numpy(np.pad(normal[::-1, ::-1].astype(np.float32), ((0, 0), (0, 1))))
    grid = functional.affine_grid(theta[None], [1, 1, *size], align_corners=False)
    out = functional.grid_sample(
        crop[None], grid, mode="bilinear", padding_mode="border", align_corners=False
    )[0]
    if label is None:
        return out, None
    warped = functional.grid_sample(
        label[None, None].float(), grid, mode="nearest", padding_mode="border", align_corners=False
    )[0, 0]
    return out, warped.to(label.dtype)


def swap_labels(label: Tensor, pairs: Sequence[tuple[int, int]]) -> Tensor:
    """Exchange the two labels of every pair."""
    out = label.clone()
    for a, b in pairs:
        out[label == a] = b
        out[label == b] = a
    return out
