"""Densify: fill the hidden sites of every stage with a mask token and project for the decoder.

Order matters: norm first (statistics of visible sites), token second, projection third
(SparK: Tian et al., "Designing BERT for convolutional networks: sparse and hierarchical masked
modeling", ICLR 2023, arXiv 2301.03580, sec. 3.3).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd, prod

import torch
from jaxtyping import Float
from torch import Tensor, nn

from spark3d.errors import ConfigError
from spark3d.models.filled import filled_conv, worthwhile
from spark3d.models.hidden import fill_hidden
from spark3d.sparse import functional
from spark3d.sparse.cells import from_rows, to_rows
from spark3d.sparse.mask import CellMask
from spark3d.sparse.pyramid import Pyramid
from spark3d.sparse.rows import batch_norm

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
BATCH_NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


class FillStage(nn.Module):
    """Norm over visible sites, mask token at the hidden ones, projection: for one stage.

    Args:
        channels: Of the encoder's stage.
        width: Channels that the decoder takes at this stage.
        ndim: Number of spatial axes.
        norm: Batch, channel-layer, group or instance norm (of one sample), or none.
        kernel: Of the projection, 1 or 3; 0 leaves it out (`channels` must equal `width`).
        fold: Factor per axis by which the projection makes the map coarser; with a factor above 1
            its kernel and stride are the fold. On packed cells such a projection runs before they
            are put on the grid, so a fine stage never becomes a full map.
    """

    def __init__(
        self,
        channels: int,
        width: int,
        ndim: int,
        norm: str,
        kernel: int,
        fold: tuple[int, ...],
    ) -> None:
        super().__init__()
        self.norm = _visible_norm(norm, channels, ndim)
        self.token = nn.Parameter(torch.empty(1, channels, *(1,) * ndim))
        nn.init.trunc_normal_(self.token, std=0.02, a=-0.02, b=0.02)
        self.fold = fold
        self.inside = kernel < 3 or prod(fold) > 1  # the projection never looks across cells
        if prod(fold) > 1:
            self.proj = CONVOLUTIONS[ndim](channels, width, fold, stride=fold)
        elif kernel:
            self.proj = CONVOLUTIONS[ndim](channels, width, kernel, padding=kernel // 2)
        else:
            self.proj = nn.Identity()

    def forward(
        self, x: Float[Tensor, "n c *cells"], mask: CellMask, packed: bool
    ) -> Float[Tensor, "b width *grid"]:
        if not packed:
            sites = mask.at(x.shape[2:])
            x = self._normalise_dense(x, mask)
            return self.proj(torch.where(sites, x, self.token.to(x.dtype)))
        x = self._normalise_packed(x, mask)
        if not self.inside and worthwhile(self.proj, x):
            return filled_conv(x, self.token, self.proj.weight, self.proj.bias, mask)
        if not self.inside:
            return self.proj(fill_hidden(x, self.token, mask))
        token = self.token.expand(-1, -1, *self.fold)
        return fill_hidden(self.proj(x), self.proj(token), mask)

    def _normalise_packed(
        self, x: Float[Tensor, "n c *cell"], mask: CellMask
    ) -> Float[Tensor, "n c *cell"]:
        """Normalise the packed cells."""
        if isinstance(self.norm, nn.GroupNorm):
            together = x.unflatten(0, (mask.batch, mask.n_visible)).transpose(1, 2)
            return self.norm(together).transpose(1, 2).flatten(0, 1)
        return from_rows(self._normalise_rows(to_rows(x)), len(x), x.shape[2:])

    def _normalise_dense(
        self, x: Float[Tensor, "b c *grid"], mask: CellMask
    ) -> Float[Tensor, "b c *grid"]:
        """The same on the full map, by the definitions of the masked norms."""
        norm = self.norm
        if isinstance(norm, nn.GroupNorm):
            groups = norm.num_groups
            return functional.group_norm(x, mask, groups, norm.weight, norm.bias, norm.eps)
        return functional.row_norm(x, mask, self._normalise_rows)

    def _normalise_rows(self, rows: Float[Tensor, "n c"]) -> Float[Tensor, "n c"]:
        if isinstance(self.norm, nn.modules.batchnorm._BatchNorm):
            return batch_norm(self.norm, rows)
        return self.norm(rows)


class Densify(nn.Module):
    """Make every stage dense: visible features normalised, hidden sites one learnt token per stage.

    Projections are 1x1 at the deepest stage and 3x3 elsewhere, each with bias; at the deepest
    stage it is left out where the encoder's channels are already those of the decoder.

    Args:
        channels: Of the encoder's stages, fine to coarse.
        widths: Channels that the decoder takes at these stages (`decoder.widths`).
        ndim: Number of spatial axes.
        norm: "bn" (as official for ResNets), "ln" (ConvNeXt), "gn", "in" or "none".
        folds: Factors per stage and axis for decoders that stop before the finest stage
            (`decoder.folds`).

    Raises:
        ConfigError: Unknown norm.
    """

    def __init__(
        self,
        channels: Sequence[int],
        widths: Sequence[int],
        ndim: int,
        norm: str = "bn",
        folds: Sequence[tuple[int, ...]] | None = None,
    ) -> None:
        super().__init__()
        ones = [(1,) * ndim] * len(channels)
        deepest = len(channels) - 1
        self.stages = nn.ModuleList()
        for i, (c, w, fold) in enumerate(zip(channels, widths, folds or ones, strict=True)):
            kernel = 3 if i < deepest else int(c != w)
            self.stages.append(FillStage(c, w, ndim, norm, kernel, tuple(fold)))

    def forward(self, pyramid: Pyramid) -> tuple[Tensor, ...]:
        """Dense maps `(b, widths[i], *grid_i)`, fine to coarse."""
        return tuple(
            stage(features, pyramid.mask, pyramid.packed)
            for stage, features in zip(self.stages, pyramid.maps, strict=True)
        )


def _visible_norm(kind: str, channels: int, ndim: int) -> nn.Module:
    if kind == "bn":
        return BATCH_NORMS[ndim](channels)
    if kind == "ln":
        return nn.LayerNorm(channels, eps=1e-6)
    if kind == "gn":
        return nn.GroupNorm(gcd(8, channels), channels)
    if kind == "in":
        return nn.GroupNorm(channels, channels)
    if kind == "none":
        return nn.Identity()
    raise ConfigError(f"densify norm {kind!r} is unknown; choose bn, ln, gn, in or none")
