"""LocalMIM: each of several stages predicts, on its own, a target of its own scale.

H. Wang, Y. Tang, Y. Wang, J. Guo, Z. Deng, K. Han, "Masked image modeling with local multi-scale
reconstruction", CVPR 2023, arXiv 2303.05251. The encoder is masked as SparK's, the analogue of
dropping tokens; a stage of stride s predicts the histograms of gradients (or voxels) of cells of s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from jaxtyping import Float
from torch import Tensor, nn

from spark3d.errors import ConfigError
from spark3d.models.hidden import join_cells, split_cells
from spark3d.models.taps import TapDecoder, blocks_to_reach
from spark3d.objectives.base import Losses, Objective
from spark3d.objectives.hog import glyphs, hog, orientation_axes
from spark3d.objectives.targets import normalise_cells
from spark3d.sparse.encoder import SparseEncoder
from spark3d.sparse.mask import CellMask

FINEST_HOG = 4  # voxels: smaller cells have no statistics
TARGETS = ("hog", "voxels")


@dataclass(frozen=True)
class HogSettings:
    """Arguments of `hog`: sectors in 2D, votes, mm per voxel, noise floor."""

    bins: int = 9
    soft: bool | None = None
    spacing: tuple[float, ...] | None = None
    floor: float = 0.0


class LocalMIM(Objective):
    """A masked encoder and a small decoder per tapped stage; the losses are summed.

    Args:
        encoder: The masked encoder.
        cell_size: Voxels per axis of the cells that masks will have.
        in_channels: Channels of the crops.
        taps: Stages to tap (names of the encoder's), the deepest among them; by default, at most
            four of those with a stride of 4 or more along every axis, or the last four for voxels.
        target: "hog" or "voxels" (normalised within each cell of the tap's stride).
        width: Channels of the decoders; half of it at the finest of several taps.
        kernel: Of their depthwise convolutions, odd and 3 or more.
        hog_settings: How histograms are made.
        body: Of the decoders, see `TapDecoder`.

    Raises:
        ConfigError: No such stage or target; a HOG tap finer than 4 voxels; the deepest stage, and
            so what leads to it, has no tap.
    """

    def __init__(
        self,
        encoder: SparseEncoder,
        cell_size: Sequence[int],
        in_channels: int,
        taps: Sequence[str] | None = None,
        target: str = "hog",
        width: int = 256,
        kernel: int = 7,
        hog_settings: HogSettings | None = None,
        body: str = "conv",
    ) -> None:
        super().__init__(encoder)
        if target not in TARGETS:
            raise ConfigError(f"target {target!r} is unknown; choose of {', '.join(TARGETS)}")
        self.target = target
        self.hog_settings = hog_settings or HogSettings()
        found = self.found
        self.taps = _choose(encoder.stages, found.strides, taps, target)
        self.strides = tuple(found.strides[i] for i in self.taps)
        self.in_channels = in_channels
        self.decoders = nn.ModuleList()
        for order, i in enumerate(self.taps):
            sites = max(c // s for c, s in zip(cell_size, found.strides[i], strict=True))
            self.decoders.append(
                TapDecoder(
                    found.channels[i],
                    self._numbers(found.strides[i]),
                    encoder.ndim,
                    width if order or len(self.taps) == 1 else max(1, width // 2),
                    blocks_to_reach(sites, kernel),
                    kernel,
                    body,
                )
            )

    def forward(self, crops: Float[Tensor, "b c *size"], mask: CellMask) -> Losses:
        """Sum over taps of the mean squared error at hidden sites, each with its own mean."""
        parts: dict[str, Tensor] = {}
        for stride, predicted in zip(self.strides, self.predict(crops, mask), strict=True):
            name = "stride_" + "x".join(str(s) for s in stride)
            parts[name] = tap_loss(predicted, self._target(crops, stride), mask)
        total = torch.stack(list(parts.values())).sum()
        return Losses(total, {name: part.detach() for name, part in parts.items()})

    def predict(
        self, crops: Float[Tensor, "b c *size"], mask: CellMask
    ) -> tuple[Float[Tensor, "b out *grid"], ...]:
        """Predictions of every tap, on its own grid, finest first."""
        pyramid = self.encoder(crops, mask)
        return tuple(
            decoder(pyramid.maps[i], mask, pyramid.packed)
            for decoder, i in zip(self.decoders, self.taps, strict=True)
        )

    def reconstruct(
        self, crops: Float[Tensor, "b c *size"], mask: CellMask
    ) -> Float[Tensor, "b c *size"]:
        """Hidden cells as the finest tap predicts them: voxels, or a drawing of the histograms.

        The drawing shows the edges that each histogram stands for, in the crop's own mean and
        spread. Visible cells are copied.
        """
        predicted, stride = self.predict(crops, mask)[0], self.strides[0]
        if self.target == "voxels":
            voxels = predicted.movedim(1, -1).reshape(-1, self.in_channels, *stride)
            own = normalise_cells(split_cells(crops, stride))
            picture = join_cells(own.undo(voxels), predicted.shape[2:])
        else:
            picture = self._draw(predicted, crops, stride)
        return crops.where(mask.at(crops.shape[2:]), picture.to(crops.dtype))

    def _numbers(self, stride: tuple[int, ...]) -> int:
        """How many numbers a site of this stride predicts."""
        if self.target == "voxels":
            return self.in_channels * prod(stride)
        return self.in_channels * len(orientation_axes(len(stride), self.hog_settings.bins))

    def _target(self, crops: Tensor, stride: tuple[int, ...]) -> Tensor:
        if self.target == "hog":
            s = self.hog_settings
            return hog(crops, stride, s.bins, s.soft, s.spacing, s.floor)
        cells = normalise_cells(split_cells(crops, stride))
        grid = [n // s for n, s in zip(crops.shape[2:], stride, strict=True)]
        return cells.voxels.reshape(len(crops), *grid, -1).movedim(-1, 1)

    def _draw(self, predicted: Tensor, crops: Tensor, stride: tuple[int, ...]) -> Tensor:
        edges = glyphs(stride, self.hog_settings.bins).to(predicted)
        bins = predicted.unflatten(1, (self.in_channels, -1)).movedim((1, 2), (-2, -1))
        ink = torch.einsum("...k,kv->...v", bins.clamp(min=0), edges.flatten(1))
        picture = join_cells(ink.reshape(-1, self.in_channels, *stride), predicted.shape[2:])
        axes = tuple(range(2, crops.ndim))
        unit = (picture - picture.mean(axes, True)) / picture.std(axes, keepdim=True).clamp(1e-6)
        return unit * crops.std(axes, keepdim=True) + crops.mean(axes, keepdim=True)


def tap_loss(
    predicted: Float[Tensor, "b out *grid"], target: Float[Tensor, "b out *grid"], mask: CellMask
) -> Float[Tensor, ""]:
    """Mean over hidden sites of each site's mean squared error, zero where nothing is hidden."""
    weight = hidden_share(mask, predicted.shape[2:]).to(target.dtype)
    errors = (predicted.to(target.dtype) - target).square().mean(1, keepdim=True)
    return (errors * weight).sum() / weight.sum().clamp(min=torch.finfo(weight.dtype).tiny)


def hidden_share(mask: CellMask, grid: Sequence[int]) -> Float[Tensor, "b 1 *grid"]:
    """Share of each site that is hidden: 0 or 1, or between them on grids coarser than the cells.

    Raises:
        ValueError: The sites of an axis neither divide the cells nor are a multiple of them.
    """
    out = (~mask.visible).float().unsqueeze(1)
    for axis, (sites, cells) in enumerate(zip(grid, mask.grid, strict=True), start=2):
        if sites % cells == 0:
            out = out.repeat_interleave(sites // cells, dim=axis)
        elif cells % sites == 0:
            out = out.unflatten(axis, (sites, cells // sites)).mean(axis + 1)
        else:
            raise ValueError(f"a map of {tuple(grid)} sites does not fit {mask.grid} cells")
    return out


def _choose(
    names: Sequence[str],
    strides: Sequence[tuple[int, ...]],
    taps: Sequence[str] | None,
    target: str,
) -> tuple[int, ...]:
    """Indices of the stages to tap."""
    coarse = [i for i, s in enumerate(strides) if min(s) >= FINEST_HOG or target == "voxels"]
    if taps is None:
        if not coarse:
            raise ConfigError(
                f"no stage has a stride of {FINEST_HOG} or more along every axis, which HOG needs "
                f"(strides {list(strides)}); use target=voxels"
            )
        return tuple(coarse[-4:])
    unknown = [tap for tap in taps if tap not in names]
    if unknown or not taps:
        raise ConfigError(f"taps {unknown or list(taps)} are not stages; they are {list(names)}")
    chosen = sorted(names.index(tap) for tap in taps)
    fine = [names[i] for i in chosen if i not in coarse]
    if fine:
        raise ConfigError(
            f"taps {fine} are finer than {FINEST_HOG} voxels, where histograms mean nothing; tap "
            f"{[names[i] for i in coarse]} or use target=voxels"
        )
    if names[chosen[-1]] != names[-1]:
        raise ConfigError(
            f"taps {[names[i] for i in chosen]} leave out the deepest stage {names[-1]}, so that "
            f"what is after {names[chosen[-1]]} would not be trained: add {names[-1]}"
        )
    return tuple(chosen)
