"""A2MIM: a dense encoder sees hidden cells filled with the mean, and a token late in the network.

S. Li et al., "Architecture-agnostic masked image modeling: from ViT back to CNN", ICML 2023, arXiv
2205.13943, as in its public code. Nothing is sparse, so every convnet serves, those with layers
that have no masked meaning too.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from spark3d.errors import ConfigError
from spark3d.models.channel_norm import ChannelNorm
from spark3d.models.decoder import voxels_of_sites
from spark3d.models.probe import probe_input
from spark3d.objectives.base import Losses, Objective
from spark3d.objectives.fourier import (
    composite,
    fourier_loss,
    plain_fourier_loss,
    spatial_loss,
)
from spark3d.sparse.encoder import SparseEncoder
from spark3d.sparse.mask import CellMask

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
MODES = ("replace", "residual", "fading")


class MaskToken(nn.Module):
    """A learnt vector that takes the place of hidden sites inside the network.

    Args:
        channels: Of the map.
        ndim: Number of spatial axes.
        mode: "replace" puts the token alone; "residual" adds it to the filled features; "fading"
            adds it to them times a learnt factor per channel that starts at 1e-6.
        detach: No gradient goes through the filled features into what made them.

    Raises:
        ConfigError: Unknown mode, or `detach` where no features are kept.
    """

    def __init__(
        self, channels: int, ndim: int, mode: str = "residual", detach: bool = False
    ) -> None:
        super().__init__()
        if mode not in MODES:
            raise ConfigError(f"token mode {mode!r} is unknown; choose of {', '.join(MODES)}")
        if detach and mode == "replace":
            raise ConfigError("token mode 'replace' keeps no features to detach; leave detach out")
        self.mode, self.detach = mode, detach
        self.token = nn.Parameter(torch.empty(1, channels, *(1,) * ndim))
        nn.init.trunc_normal_(self.token, std=0.02)
        if mode == "fading":
            self.gamma = nn.Parameter(torch.full_like(self.token, 1e-6))

    def forward(
        self, x: Float[Tensor, "b c *size"], visible: Bool[Tensor, "b 1 *size"]
    ) -> Float[Tensor, "b c *size"]:
        token = self.token.to(x.dtype)
        if self.mode == "replace":
            return torch.where(visible, x, token)
        kept = x.detach() if self.detach else x
        kept = kept * self.gamma.to(x.dtype) if self.mode == "fading" else kept
        return torch.where(visible, x, kept + token)


class A2MIM(Objective):
    """Mean fill, dense encoder with a token before its last stage, linear head, two losses.

    Args:
        encoder: Used densely.
        in_channels: Channels of the crops.
        token_at: Dotted name of the sub-module whose input gets the token; by default the last
            stage, or its blocks where it begins with a separate down-sampling (ConvNeXt).
        mode: Of the token, see `MaskToken`.
        detach: Of the token, see `MaskToken`.
        fourier: Weight of the frequency loss (.5 as published for ResNet-50; 0 switches it off).
        fourier_focal: Weigh every frequency by its error; else take the spatial loss's own function
            of the spectral error's modulus (published for ResNet-101).
        focal: Focal L1 on hidden voxels (published for convnets) or plain L1.
        average_spectrum: Average the spectral error over the batch, as officially.
        replacement: What visible voxels hold in the spectrum, see `composite`.
        visible_weight: Share of the prediction that stays at visible voxels in the spectrum.
        fill_from_visible: Fill with the mean of visible voxels, not of the crop.
        head_norm: A channel norm before the head (published for ConvNeXt).
        head_rank: Channels between two linear maps that make up the head, without activation; 0 is
            one map, officially. A stride of 32 has 32768 voxels a site in 3D, which makes the one
            map larger than most encoders.
        add_mean: The head predicts what is to be added to the mean that fills the hidden cells.

    Raises:
        ConfigError: `token_at` or `mode` is unknown, or does not go with `detach`.
    """

    def __init__(
        self,
        encoder: SparseEncoder,
        in_channels: int,
        token_at: str | None = None,
        mode: str = "residual",
        fourier: float = 0.5,
        focal: bool = True,
        average_spectrum: bool = True,
        replacement: str = "mixed",
        visible_weight: float = 1e-3,
        fill_from_visible: bool = False,
        head_norm: bool = False,
        detach: bool = False,
        fourier_focal: bool = True,
        head_rank: int = 0,
        add_mean: bool = False,
    ) -> None:
        super().__init__(encoder)
        ndim, last = encoder.ndim, self.found.channels[-1]
        self.token_at = token_at or _after_downsampling(encoder.network, encoder.stages[-1])
        channels, _ = probe_input(encoder.network, self.token_at, encoder.stages, ndim, in_channels)
        self.in_channels = in_channels
        self.stride = self.found.strides[-1]
        self.token = MaskToken(channels, ndim, mode, detach)
        self.norm = ChannelNorm(last) if head_norm else nn.Identity()
        self.head = linear_head(last, in_channels * prod(self.stride), ndim, head_rank)
        self.fourier, self.focal, self.average_spectrum = fourier, focal, average_spectrum
        self.replacement, self.visible_weight = replacement, visible_weight
        self.fill_from_visible, self.fourier_focal = fill_from_visible, fourier_focal
        self.add_mean = add_mean

    def forward(self, crops: Float[Tensor, "b c *size"], mask: CellMask) -> Losses:
        """Error of hidden voxels, plus the weighted spectral error of the whole crop."""
        hidden = ~mask.at(crops.shape[2:])
        wide = torch.promote_types(crops.dtype, torch.float32)
        predicted, target = self.predict(crops, mask).to(wide), crops.to(wide)
        total = spatial = spatial_loss(predicted, target, hidden, self.focal)
        parts = {"spatial": spatial.detach()}
        if self.fourier > 0:
            whole = composite(predicted, target, hidden, self.visible_weight, self.replacement)
            if self.fourier_focal:
                spectral = fourier_loss(whole, target, self.average_spectrum)
            else:
                spectral = plain_fourier_loss(whole, target, self.focal)
            total = spatial + self.fourier * spectral
            parts["fourier"] = spectral.detach()
        return Losses(total, parts)

    def tokens(self) -> tuple[str, ...]:
        """The token, and its factor where it fades in."""
        return tuple(f"token.{name}" for name, _ in self.token.named_parameters())

    def predict(
        self, crops: Float[Tensor, "b c *size"], mask: CellMask
    ) -> Float[Tensor, "b c *size"]:
        """The whole crop, in its own units, from the filled one.

        Raises:
            ValueError: The cells do not fit the map that gets the token.
        """

        def insert(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return self.token(args[0], mask.at(args[0].shape[2:])), *args[1:]

        module = self.encoder.network.get_submodule(self.token_at)
        handle = module.register_forward_pre_hook(insert)
        try:
            features = self.encoder.dense(mean_fill(crops, mask, self.fill_from_visible))[-1]
        finally:
            handle.remove()
        values = self.head(self.norm(features)).movedim(1, -1)
        voxels = voxels_of_sites(values, self.in_channels, self.stride)
        if not self.add_mean:
            return voxels
        return voxels + fill_values(crops, mask, self.fill_from_visible)

    def reconstruct(
        self, crops: Float[Tensor, "b c *size"], mask: CellMask
    ) -> Float[Tensor, "b c *size"]:
        """Hidden voxels as predicted, visible ones as given."""
        return crops.where(mask.at(crops.shape[2:]), self.predict(crops, mask).to(crops.dtype))


def mean_fill(
    crops: Float[Tensor, "b c *size"], mask: CellMask, visible_only: bool = False
) -> Float[Tensor, "b c *size"]:
    """Hidden voxels become the mean of their crop and channel.

    Args:
        crops: The crops.
        mask: What is hidden.
        visible_only: Take the mean over visible voxels, so that nothing of the hidden ones leaks;
            officially it runs over all.
    """
    return crops.where(mask.at(crops.shape[2:]), fill_values(crops, mask, visible_only))


def fill_values(
    crops: Float[Tensor, "b c *size"], mask: CellMask, visible_only: bool
) -> Float[Tensor, "b c *ones"]:
    """The mean of each crop and channel, over all voxels or the visible ones."""
    axes = tuple(range(2, crops.ndim))
    if not visible_only:
        return crops.mean(axes, keepdim=True)
    visible = mask.at(crops.shape[2:])
    return crops.where(visible, 0).sum(axes, keepdim=True) / visible.sum(axes, keepdim=True)


def linear_head(c_in: int, c_out: int, ndim: int, rank: int = 0) -> nn.Module:
    """A 1x1 convolution, or two of them through `rank` channels; truncated normal of .02."""
    widths = [(c_in, c_out)] if not rank else [(c_in, rank), (rank, c_out)]
    maps = [CONVOLUTIONS[ndim](a, b, 1) for a, b in widths]
    for one in maps:
        nn.init.trunc_normal_(one.weight, std=0.02)
        if one.bias is not None:
            nn.init.zeros_(one.bias)
    return maps[0] if not rank else nn.Sequential(*maps)


def _after_downsampling(network: nn.Module, stage: str) -> str:
    """The stage, or its blocks where a separate module makes the map coarser before them."""
    module = network.get_submodule(stage)
    children = dict(module.named_children())
    return f"{stage}.blocks" if {"downsample", "blocks"} <= children.keys() else stage
