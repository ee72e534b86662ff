"""The losses of A2MIM: focal L1 on hidden voxels, and a focal loss in the frequency domain.

S. Li et al., "Architecture-agnostic masked image modeling: from ViT back to CNN", ICML 2023, arXiv
2205.13943, as in its public code; the frequency weights are those of L. Jiang et al., "Focal
frequency loss for image reconstruction and synthesis", ICCV 2021.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Complex, Float
from torch import Tensor

REPLACEMENTS = ("mixed", "target", "prediction", "mean")


def focal_l1(
    prediction: Float[Tensor, "b c *size"], target: Float[Tensor, "b c *size"]
) -> Float[Tensor, "b c *size"]:
    """Errors d times 2 sigmoid(d / 5) - 1: about d^2 / 10 where small, d where large."""
    return focal((prediction - target).abs())


def focal(distance: Float[Tensor, "b c *size"]) -> Float[Tensor, "b c *size"]:
    """`focal_l1` of a difference that is known already."""
    return distance * (2 * torch.sigmoid(0.2 * distance) - 1)


def spatial_loss(
    prediction: Float[Tensor, "b c *size"],
    target: Float[Tensor, "b c *size"],
    hidden: Bool[Tensor, "b 1 *size"],
    focal: bool = True,
) -> Float[Tensor, ""]:
    """Mean error over the hidden voxels of the batch and the channels."""
    errors = focal_l1(prediction, target) if focal else (prediction - target).abs()
    weight = hidden.to(errors.dtype)
    return (errors * weight).sum() / (weight.sum() + 1e-5) / prediction.shape[1]


def composite(
    prediction: Float[Tensor, "b c *size"],
    target: Float[Tensor, "b c *size"],
    hidden: Bool[Tensor, "b 1 *size"],
    visible_weight: float = 1e-3,
    replacement: str = "mixed",
) -> Float[Tensor, "b c *size"]:
    """The prediction with its visible voxels replaced by something without gradient.

    Args:
        prediction: Of the whole crop.
        target: The crop.
        hidden: True where the encoder saw nothing.
        visible_weight: Share of the prediction, with gradient, that stays at visible voxels.
        replacement: "mixed" is the mean of prediction and target, "mean" that of each channel.

    Raises:
        ValueError: Unknown replacement.
    """
    still = prediction.detach()
    if replacement == "mixed":
        other = 0.5 * still + 0.5 * target
    elif replacement == "target":
        other = target
    elif replacement == "prediction":
        other = still
    elif replacement == "mean":
        axes = tuple(range(2, target.ndim))
        other = target.mean(axes, keepdim=True).expand_as(target)
    else:
        raise ValueError(f"replacement {replacement!r} is unknown; choose of {REPLACEMENTS}")
    own = torch.where(hidden, 1.0, visible_weight).to(prediction.dtype)
    return prediction * own + other * (1 - own)


def fourier_loss(
    prediction: Float[Tensor, "b c *size"],
    target: Float[Tensor, "b c *size"],
    average: bool = True,
    alpha: float = 1.0,
    log: bool = True,
) -> Float[Tensor, ""]:
    """Mean squared modulus of the spectral error, each frequency weighted by how large it is.

    Args:
        prediction: Of the whole crop, see `composite`.
        target: The crop.
        average: Average the complex error over the batch first, as officially (opposite errors of
            two samples cancel); False keeps every sample.
        alpha: Power of the error in the weight.
        log: Weight by log(1 + error^alpha) instead of error^alpha.
    """
    with torch.autocast(target.device.type, enabled=False):
        error = spectral_error(prediction, target)
        error = error.mean(0, keepdim=True) if average else error
        power = error.real.square() + error.imag.square()
        weight = power.detach().sqrt() ** alpha
        weight = torch.log1p(weight) if log else weight
        weight = (weight / weight.max()).nan_to_num(nan=0.0).clamp(0, 1)
        return (weight * power).mean()


def plain_fourier_loss(
    prediction: Float[Tensor, "b c *size"], target: Float[Tensor, "b c *size"], focal_errors: bool
) -> Float[Tensor, ""]:
    """Mean over all frequencies of the spectral error's modulus, or of its focal L1.

    Published for ResNet-101, with focal L1; every sample has its own spectrum.
    """
    with torch.autocast(target.device.type, enabled=False):
        error = spectral_error(prediction, target)
        # where nothing is wrong the modulus has no derivative; a square root of 0 would give NaN
        power = error.real.square() + error.imag.square()
        modulus = power.clamp(min=torch.finfo(power.dtype).tiny).sqrt()
        return (focal(modulus) if focal_errors else modulus).mean()


def spectral_error(
    prediction: Float[Tensor, "b c *size"], target: Float[Tensor, "b c *size"]
) -> Complex[Tensor, "b c *size"]:
    """Difference of the spectra over all spatial axes, of unit norm, in float32 at least."""
    wide = torch.promote_types(target.dtype, torch.float32)
    difference = prediction.to(wide) - target.to(wide)
    return torch.fft.fftn(difference, dim=tuple(range(2, target.ndim)), norm="ortho")
