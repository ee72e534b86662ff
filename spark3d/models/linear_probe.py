"""Is the encoder learning? A linear head on its frozen stages, and figures that tell a collapse."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from monai.networks.layers.factories import Conv, Norm
from torch import Tensor, nn
from torch.nn import functional

UPSAMPLE = {1: "linear", 2: "bilinear", 3: "trilinear"}
MOST_SITES = 2048


class LinearProbe(nn.Module):
    """A linear classifier of every voxel on the stages' features, normalised and up-sampled.

    As up-sampling and a 1x1 convolution commute, each stage is classified at its own resolution
    and the logits are up-sampled and added. All weights begin at 0, so nothing is drawn.

    Args:
        channels: Of the stages.
        classes: Background included.
        ndim: Number of spatial axes.
    """

    def __init__(self, channels: Sequence[int], classes: int, ndim: int) -> None:
        super().__init__()
        conv, norm = Conv[Conv.CONV, ndim], Norm[Norm.BATCH, ndim]
        self.mode = UPSAMPLE[ndim]
        self.norms = nn.ModuleList(norm(c, affine=False) for c in channels)
        with torch.random.fork_rng(devices=[]):
            self.heads = nn.ModuleList(conv(c, classes, 1) for c in channels)
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, maps: Sequence[Tensor], size: Sequence[int]) -> Float[Tensor, "b k *size"]:
        """Logits at `size` from the stages, fine to coarse."""
        logits = [
            functional.interpolate(head(norm(x.float())), size=tuple(size), mode=self.mode)
            for x, norm, head in zip(maps, self.norms, self.heads, strict=True)
        ]
        return torch.stack(logits).sum(0)


def effective_rank(features: Float[Tensor, "n c"]) -> float:
    """The number of directions that features fill, from 1 (collapsed) to c.

    The exponential of the entropy of the normalised singular values, after centring (O. Roy,
    M. Vetterli, "The effective rank", EUSIPCO 2007); 0 for constant features.
    """
    values = torch.linalg.svdvals((features - features.mean(0)).double())
    if float(values.sum()) == 0:
        return 0.0
    share = values / values.sum()
    return float(torch.exp(-torch.special.xlogy(share, share).sum()))


def stage_figures(maps: Sequence[Tensor]) -> dict[str, float]:
    """Effective rank, and mean deviation of a channel, of every stage `(b, c, *size)`.

    At most 2048 sites are looked at, evenly spaced.
    """
    figures: dict[str, float] = {}
    for number, stage in enumerate(maps):
        sites = stage.detach().float().transpose(0, 1).flatten(1).T
        sites = sites[:: -(-len(sites) // MOST_SITES)].cpu()
        figures[f"rank {number}"] = round(effective_rank(sites), 4)
        figures[f"std {number}"] = float(sites.std(0).mean()) if len(sites) > 1 else 0.0
    return figures
