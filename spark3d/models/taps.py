"""A small decoder for one stage, as LocalMIM puts on each of several stages.

H. Wang, Y. Tang, Y. Wang, J. Guo, Z. Deng, K. Han, "Masked image modeling with local multi-scale
reconstruction", CVPR 2023, arXiv 2303.05251; here with a convolutional body for convnets.
"""

from __future__ import annotations

from math import ceil

import torch
from jaxtyping import Float
from torch import Tensor, nn

from spark3d.models.channel_norm import ChannelNorm
from spark3d.models.hidden import fill_hidden
from spark3d.sparse.mask import CellMask

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


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
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        ndim: int,
        width: int = 256,
        blocks: int = 1,
        kernel: int = 7,
    ) -> None:
        super().__init__()
        conv = CONVOLUTIONS[ndim]
        self.enter = nn.Sequential(ChannelNorm(channels), conv(channels, width, 1))
        self.token = nn.Parameter(torch.zeros(1, width, *(1,) * ndim))
        self.body = nn.Sequential(*(DenseBlock(width, ndim, kernel) for _ in range(blocks)))
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
