"""Masked encoding the way public SparK ports do it: the whole grid, times the mask.

Every convolution and pool is the dense one, multiplied by the mask; every norm collects the visible
sites by boolean indexing, normalises them as a list and puts them into a map of zeros; tensors are
channels-first (the official code of SparK, written here for any number of axes). It is what packed
cells are measured against, so it computes the same numbers: the tests hold it equal to the
reference backend. With `tuned=True` it is as fast as dense computing gets on a CPU: channels-last,
depthwise gradients as forward convolutions, and masks and indices looked up once per size.

K. Tian et al., "Designing BERT for convolutional networks: sparse and hierarchical masked
modeling", ICLR 2023, and its public code.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spark3d.models.channel_norm import ChannelNorm
from spark3d.models.decoder import LightDecoder, OfficialDecoder
from spark3d.models.densify import Densify
from spark3d.models.hidden import split_cells
from spark3d.models.volumetric import ConvNeXtBlock3d
from spark3d.objectives.base import Losses
from spark3d.sparse.convert import POINTWISE
from spark3d.sparse.depthwise import depthwise_conv
from spark3d.sparse.encoder import stage_outputs
from spark3d.sparse.mask import CellMask
from spark3d.sparse.pyramid import Pyramid


class Active:
    """The mask of the forward that runs, shared by the layers of one emulated network."""

    def __init__(self, tuned: bool) -> None:
        self.tuned = tuned
        self._mask: CellMask | None = None
        self._kept: dict[Any, Any] = {}

    def begin(self, mask: CellMask) -> None:
        """Use `mask` from now on."""
        self._mask = mask
        self._kept = {}

    def at(self, size: Sequence[int]) -> Tensor:
        """The mask on a map of `size` sites, `(b, 1, *size)`."""
        return self._look_up(("mask", tuple(size)), lambda mask: mask.at(size))

    def sites(self, size: Sequence[int]) -> tuple[Tensor, ...]:
        """Where it is visible: indices into `(b, *size)`, one tensor per axis."""
        return self._look_up(
            ("sites", tuple(size)), lambda mask: mask.at(size)[:, 0].nonzero(as_tuple=True)
        )

    def _look_up(self, key: Any, build: Callable[[CellMask], Any]) -> Any:
        """Ports build it anew in every layer; the tuned emulation once per size."""
        if self._mask is None:
            raise RuntimeError("an emulated layer runs outside of GridEncoder.forward")
        if not self.tuned:
            return build(self._mask)
        if key not in self._kept:
            self._kept[key] = build(self._mask)
        return self._kept[key]


class OnGrid(nn.Module):
    """What the emulated layers have in common."""

    active: Active

    def rows(self, x: Tensor, norm: Callable[[Tensor], Tensor]) -> Tensor:
        """`norm` of the visible sites of a map `(b, *size, c)`, zeros elsewhere."""
        sites = self.active.sites(x.shape[1:-1])
        values = norm(x[sites])
        out = torch.zeros_like(x)
        out[sites] = values.to(out.dtype)  # CUDA's autocast normalises in float32
        return out


class GridConv(OnGrid, nn.Conv3d):
    """The dense convolution, times the mask."""

    def forward(self, input: Tensor) -> Tensor:
        if self.active.tuned and 1 < self.groups == self.in_channels == self.out_channels:
            padding: Any = self.padding
            y = depthwise_conv(input, self.weight, self.bias, self.stride, padding, self.dilation)
        else:
            y = super().forward(input)
        y *= self.active.at(y.shape[2:])
        return y


class GridMaxPool(OnGrid, nn.MaxPool3d):
    """The dense pooling, times the mask: right where inputs are not negative."""

    def forward(self, input: Tensor) -> Tensor:
        y = F.max_pool3d(input, self.kernel_size, self.stride, self.padding)
        y *= self.active.at(y.shape[2:])
        return y


class GridBatchNorm(OnGrid, nn.BatchNorm1d):
    """Batch norm of the visible sites."""

    def forward(self, input: Tensor) -> Tensor:
        return self.rows(input.movedim(1, -1), super().forward).movedim(-1, 1)


class GridLayerNorm(OnGrid, nn.LayerNorm):
    """Layer norm of the visible sites of a map `(b, *size, c)`."""

    def forward(self, input: Tensor) -> Tensor:
        return self.rows(input, super().forward)


class GridChannelNorm(GridLayerNorm):
    """Layer norm of the visible sites of a map `(b, c, *size)`."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.movedim(1, -1)).movedim(-1, 1)


class GridConvNeXtBlock(OnGrid, ConvNeXtBlock3d):
    """The block, with its branch times the mask."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv_dw(x).movedim(1, -1)
        y = self.mlp(self.norm(y))
        if self.gamma is not None:
            y = self.gamma * y
        y = y.movedim(-1, 1)
        y *= self.active.at(y.shape[2:])
        return self.shortcut(x) + self.drop_path(y)


GRID: Mapping[str, type[OnGrid]] = MappingProxyType(
    {
        "torch.nn.modules.conv.Conv3d": GridConv,
        "torch.nn.modules.pooling.MaxPool3d": GridMaxPool,
        "torch.nn.modules.batchnorm.BatchNorm3d": GridBatchNorm,
        "timm.layers.norm.LayerNorm": GridLayerNorm,
        f"{ChannelNorm.__module__}.ChannelNorm": GridChannelNorm,
        f"{ConvNeXtBlock3d.__module__}.ConvNeXtBlock3d": GridConvNeXtBlock,
    }
)
"""The emulated layer of each dense one: all that MONAI's ResNet and timm's ConvNeXt are made of."""

HEADS = ("avgpool", "fc", "head")
"""Sub-modules behind the last stage, which never run."""


class GridEncoder(nn.Module):
    """A 3D network that computes the full grid and empties hidden cells layer by layer.

    Args:
        network: MONAI ResNet or the 3D twin of a timm ConvNeXt; changed in place.
        stages: Names of the sub-modules whose outputs are wanted, fine to coarse.
        tuned: Channels-last and fast depthwise gradients.

    Raises:
        TypeError: A layer that has no emulation.
    """

    def __init__(self, network: nn.Module, stages: Sequence[str], tuned: bool = False) -> None:
        super().__init__()
        self.active = Active(tuned)
        for name, layer in network.named_modules():
            kind = f"{type(layer).__module__}.{type(layer).__qualname__}"
            if kind in GRID:
                layer.__class__ = GRID[kind]
                layer.active = self.active  # pyright: ignore[reportArgumentType]
            elif not (kind in POINTWISE or any(layer.children()) or name.split(".")[0] in HEADS):
                raise TypeError(f"layer {name!r} ({kind}) has no emulation; add one to GRID")
        self.network = network
        self.stages = tuple(stages)
        if tuned:
            network.to(memory_format=torch.channels_last_3d)  # pyright: ignore[reportCallIssue]

    def forward(self, crops: Tensor, mask: CellMask) -> Pyramid:
        """Stages as dense maps, zero where hidden."""
        self.active.begin(mask)
        x = crops * mask.at(crops.shape[2:])
        if self.active.tuned:
            x = x.contiguous(memory_format=torch.channels_last_3d)
        return Pyramid(stage_outputs(self.network, self.stages, x), mask, packed=False)


class GridSparK(nn.Module):
    """SparK on an emulated encoder: the whole crop predicted, the loss weighted by the mask."""

    def __init__(
        self, encoder: GridEncoder, densify: Densify, decoder: OfficialDecoder | LightDecoder
    ) -> None:
        super().__init__()
        self.encoder, self.densify, self.decoder = encoder, densify, decoder
        if encoder.active.tuned:
            self.to(memory_format=torch.channels_last_3d)  # pyright: ignore[reportCallIssue]

    def forward(self, crops: Tensor, mask: CellMask) -> Losses:
        """Mean over hidden cells of the squared error of normalised voxels."""
        maps = self.densify(self.encoder(crops, mask))
        if isinstance(self.decoder, LightDecoder):
            hidden = ~mask.visible.flatten()
            target = normalised(split_cells(crops, mask.cell_size).flatten(1)[hidden])
            error = (self.decoder(maps, mask).flatten(1) - target).square().mean(1)
            return Losses(error.mean())
        predicted = split_cells(self.decoder.full(maps), mask.cell_size).flatten(1)
        target = normalised(split_cells(crops, mask.cell_size).flatten(1))
        error = (predicted - target).square().mean(1)
        hidden = (~mask.visible).flatten().to(error.dtype)
        return Losses((error * hidden).sum() / (hidden.sum() + 1e-8))


def normalised(cells: Tensor) -> Tensor:
    """Each row minus its mean, over the root of its unbiased variance plus 1e-6."""
    mean, var = cells.mean(1, keepdim=True), cells.var(1, keepdim=True)
    return (cells - mean) / (var + 1e-6).sqrt()
