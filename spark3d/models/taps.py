"""A small decoder for one stage, as LocalMIM puts on each of several stages.

H. Wang, Y. Tang, Y. Wang, J. Guo, Z. Deng, K. Han, "Masked image modeling with local multi-scale
reconstruction", CVPR 2023, arXiv 2303.05251; here with a convolutional body for convnets.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, prod

import torch
from jaxtyping import Float
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from spark3d.errors import ConfigError
from spark3d.models.channel_norm import ChannelNorm
from spark3d.models.hidden import fill_hidden
from spark3d.sparse.mask import CellMask

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
BODIES = ("conv", "attention")
HEADS = 8
MOST_SITES = 4096


class DenseBlock(nn.Module):
    """Depthwise convolution, channel norm, four-fold expansion, GELU, residual (ConvNeXt)."""

    def __init__(self, channels: int, ndim: int, kernel: int) -> None:
        super().__init__()
        conv = CONVOLUTIONS[ndim]
        self.body = nn.Sequential(
            conv(channels, channels, kernel, padding=kernel // 2, groups=channels),
            ChannelNorm(channels),
            conv(channels, 4 * channels, 1),
            nn.GELU(),
            conv(4 * channels, channels, 1),
        )

    def forward(self, x: Float[Tensor, "b c *size"]) -> Float[Tensor, "b c *size"]:
        return x + self.body(x)


class GlobalBlock(nn.Module):
    """Fixed positions and one pre-norm transformer block over all sites, as officially (ViT).

    Args:
        channels: A multiple of the heads.
        ndim: Number of spatial axes.

    Raises:
        ConfigError: The channels are no multiple of the heads.
    """

    def __init__(self, channels: int, ndim: int) -> None:
        super().__init__()
        if channels % HEADS:
            raise ConfigError(f"decoders of width {channels} need a multiple of {HEADS} channels")
        self.ndim = ndim
        self.block = Block(channels, HEADS, mlp_ratio=4.0, qkv_bias=True)

    def forward(self, x: Float[Tensor, "b c *size"]) -> Float[Tensor, "b c *size"]:
        """Every site sees all others.

        Raises:
            ConfigError: More sites than attention is sensible for.
        """
        size = x.shape[2:]
        if prod(size) > MOST_SITES:
            raise ConfigError(
                f"attention over a map of {tuple(size)} sites: at most {MOST_SITES} are allowed; "
                "tap coarser stages, take smaller crops, or objective.body=conv"
            )
        rows = (x + positions(size, x.shape[1]).to(x)).flatten(2).mT
        return self.block(rows).mT.unflatten(2, size)


def positions(size: Sequence[int], channels: int) -> Float[Tensor, "1 c *size"]:
    """Sines and cosines of every site's place: an equal share of the channels for each axis."""
    half = channels // (2 * len(size))
    rates = 10000.0 ** -(torch.arange(half, dtype=torch.float64) / max(1, half))
    out = torch.zeros(channels, *size, dtype=torch.float64)
    for axis, sites in enumerate(size):
        shape = [sites if a == axis else 1 for a in range(len(size))]
        angle = rates.view(-1, *(1,) * len(size)) * torch.arange(sites).double().view(shape)
        first = 2 * half * axis
        out[first : first + half] = angle.sin()
        out[first + half : first + 2 * half] = angle.cos()
    return out.unsqueeze(0)


class TapDecoder(nn.Module):
    """From one masked stage to predictions at each of its sites.

    Channel norm, projection to `width`, mask token at the hidden sites (after the projection, the
    opposite of SparK), dense blocks, channel norm, 1x1 convolution.

    Args:
        channels: Of the stage.
        out_channels: Numbers to predict at each site.
        ndim: Number of spatial axes.
        width: Channels inside.
        blocks: Dense blocks; `blocks_to_reach` gives the usual number.
        kernel: Of their depthwise convolution, odd.
        body: "conv", those blocks, or "attention", one transformer block instead.

    Raises:
        ConfigError: Unknown body, or a width that does not suit it.
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        ndim: int,
        width: int = 256,
        blocks: int = 1,
        kernel: int = 7,
        body: str = "conv",
    ) -> None:
        super().__init__()
        if body not in BODIES:
            raise ConfigError(f"body {body!r} is unknown; choose of {', '.join(BODIES)}")
        conv = CONVOLUTIONS[ndim]
        self.enter = nn.Sequential(ChannelNorm(channels), conv(channels, width, 1))
        self.token = nn.Parameter(torch.zeros(1, width, *(1,) * ndim))
        steps = [DenseBlock(width, ndim, kernel) for _ in range(blocks)]
        self.body = nn.Sequential(*([GlobalBlock(width, ndim)] if body == "attention" else steps))
        self.head = nn.Sequential(ChannelNorm(width), conv(width, out_channels, 1))
        nn.init.normal_(self.token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and module.bias is not None:
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(
        self, x: Float[Tensor, "n c *cells"], mask: CellMask, packed: bool
    ) -> Float[Tensor, "b out *grid"]:
        """Predictions at all sites, from a packed or dense stage."""
        x = self.enter(x)
        if packed:
            x = fill_hidden(x, self.token, mask)
        else:
            x = torch.where(mask.at(x.shape[2:]), x, self.token.to(x.dtype))
        return self.head(self.body(x))


def blocks_to_reach(sites: int, kernel: int = 7) -> int:
    """Blocks until the middle of a hidden cell of `sites` sites per axis sees visible ones."""
    return max(1, ceil((sites / 2 + 1) / (kernel // 2)))
