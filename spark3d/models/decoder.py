"""Decoders for masked reconstruction: the official one and a light one that stays in cells.

Both climb from the deepest stage with the same block, add (never concatenate) the densified stages
and halve the width with every block (SparK, sec. 3.3 and its public code; see `densify` for the
reference). `forward(maps, mask)` returns the voxels of the hidden cells only.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd, prod

from jaxtyping import Float
from torch import Tensor, nn

from spark3d.errors import ConfigError
from spark3d.models.geometry import Climb, plan_climb
from spark3d.models.hidden import cut_hidden
from spark3d.sparse.mask import CellMask

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
BATCH_NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
INSTANCE_NORMS = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}


class UpBlock(nn.Module):
    """Double the axes whose factor is 2, then two 3x3 convolutions with norms.

    An axis that is not doubled has kernel, stride and padding (1, 1, 0) in the transposed
    convolution, one that is (4, 2, 1).
    """

    def __init__(self, c_in: int, c_out: int, factors: tuple[int, ...], norm: str) -> None:
        super().__init__()
        ndim = len(factors)
        conv = CONVOLUTIONS[ndim]
        self.up = TRANSPOSED[ndim](
            c_in,
            c_in,
            kernel_size=tuple(4 if f == 2 else 1 for f in factors),
            stride=factors,
            padding=tuple(1 if f == 2 else 0 for f in factors),
        )
        self.conv1 = conv(c_in, c_in, 3, padding=1, bias=False)
        self.norm1 = dense_norm(norm, c_in, ndim)
        self.act = nn.ReLU6()
        self.conv2 = conv(c_in, c_out, 3, padding=1, bias=False)
        self.norm2 = dense_norm(norm, c_out, ndim)

    def forward(self, x: Float[Tensor, "b c_in *size"]) -> Float[Tensor, "b c_out *finer"]:
        x = self.act(self.norm1(self.conv1(self.up(x))))
        return self.norm2(self.conv2(x))


class ClimbingDecoder(nn.Module):
    """The climb that both decoders share: blocks from the deepest stage to the stride `stop`.

    Attributes:
        widths: Channels to give it at every stage, fine to coarse (for `Densify`).
        folds: Factors by which stages finer than `stop` must be made coarser (for `Densify`).
        stop: Stride of its last map, one number per axis.
    """

    def __init__(
        self,
        strides: Sequence[tuple[int, ...]],
        stop: tuple[int, ...],
        width: int,
        norm: str,
        min_width: int,
    ) -> None:
        super().__init__()
        climb: Climb = plan_climb(strides, stop)
        levels = climb.widths(width, min_width)
        self.level = climb.level
        self.folds = climb.folds
        self.stop = stop
        self.widths = tuple(levels[k] for k in climb.level)
        self.last_width = levels[-1]
        self.blocks = nn.ModuleList(
            UpBlock(levels[k], levels[k + 1], factors, norm)
            for k, factors in enumerate(climb.factors)
        )

    def climb(self, maps: Sequence[Tensor]) -> Tensor:
        """Merge the densified stages (fine to coarse) into one map at stride `stop`."""
        x: Tensor | None = None
        for k in range(len(self.blocks) + 1):
            for stage in reversed(range(len(maps))):
                if self.level[stage] == k:
                    x = maps[stage] if x is None else x + maps[stage]
            if x is None:
                raise ValueError("the decoder needs at least its deepest stage")
            if k < len(self.blocks):
                x = self.blocks[k](x)
        if x is None:
            raise ValueError("the decoder needs at least its deepest stage")
        return x


class OfficialDecoder(ClimbingDecoder):
    """SparK's own decoder, up to full resolution: cost doubles with every block in 3D.

    Args:
        strides: Of the encoder's stages, fine to coarse, one number per axis.
        out_channels: Channels of the crop.
        width: Channels at the deepest stage, halved by every block (768 officially).
        norm: "bn" (official), "gn" or "in".
        min_width: The halving stops here.
    """

    def __init__(
        self,
        strides: Sequence[tuple[int, ...]],
        out_channels: int,
        width: int = 768,
        norm: str = "bn",
        min_width: int = 8,
    ) -> None:
        ndim = len(strides[0])
        super().__init__(strides, (1,) * ndim, width, norm, min_width)
        self.proj = CONVOLUTIONS[ndim](self.last_width, out_channels, 1)
        initialise(self)

    def full(self, maps: Sequence[Tensor]) -> Tensor:
        """The reconstruction of the whole crop, `(b, c, *size)`, in normalised units."""
        return self.proj(self.climb(maps))

    def forward(self, maps: Sequence[Tensor], mask: CellMask) -> Float[Tensor, "n c *cell"]:
        """The voxels of the hidden cells, cut out of the full reconstruction."""
        return cut_hidden(self.full(maps), mask)


class LightDecoder(ClimbingDecoder):
    """All stages and tokens, but no map finer than `stop`; a linear head gives each cell's voxels.

    A stage finer than `stop` enters folded to it (a strided projection in `Densify`). The head
    works on the sites of hidden cells only, each predicts its `prod(stop)` voxels.

    Args:
        strides: Of the encoder's stages, fine to coarse, one number per axis.
        out_channels: Channels of the crop.
        width: Channels at the deepest stage, halved by every block.
        stop: Stride of the last map, an int or one number per axis. By default 4, or the finest
            stage's stride where that is coarser, or the total stride where that is finer.
        norm: "bn", "gn" or "in".
        min_width: The halving stops here.
    """

    def __init__(
        self,
        strides: Sequence[tuple[int, ...]],
        out_channels: int,
        width: int = 384,
        stop: int | Sequence[int] | None = None,
        norm: str = "bn",
        min_width: int = 32,
    ) -> None:
        ndim = len(strides[0])
        if stop is None:
            stop = [min(max(4, a), z) for a, z in zip(strides[0], strides[-1], strict=True)]
        last = (stop,) * ndim if isinstance(stop, int) else tuple(stop)
        super().__init__(strides, last, width, norm, min_width)
        self.out_channels = out_channels
        self.refine = nn.Sequential(
            CONVOLUTIONS[ndim](self.last_width, self.last_width, 3, padding=1, bias=False),
            dense_norm(norm, self.last_width, ndim),
            nn.ReLU6(),
        )
        self.head = nn.Linear(self.last_width, out_channels * prod(last))
        initialise(self)

    def forward(self, maps: Sequence[Tensor], mask: CellMask) -> Float[Tensor, "n c *cell"]:
        """The voxels of the hidden cells.

        Raises:
            ConfigError: The cells are not whole multiples of `stop`.
        """
        if any(c % s for c, s in zip(mask.cell_size, self.stop, strict=True)):
            raise ConfigError(
                f"cells of {mask.cell_size} voxels are no multiple of the decoder's stride "
                f"{self.stop}; choose stop to divide them"
            )
        sites = cut_hidden(self.refine(self.climb(maps)), mask)
        return voxels_of_sites(self.head(sites.movedim(1, -1)), self.out_channels, self.stop)


def voxels_of_sites(
    values: Float[Tensor, "n *grid values"], channels: int, stride: tuple[int, ...]
) -> Float[Tensor, "n c *cell"]:
    """Lay out the values that every site predicts as the voxels it stands for."""
    n, grid, ndim = len(values), values.shape[1:-1], len(stride)
    apart = values.reshape(n, *grid, channels, *stride)
    pairs = [axis for a in range(ndim) for axis in (1 + a, 2 + ndim + a)]
    size = [g * s for g, s in zip(grid, stride, strict=True)]
    return apart.permute(0, 1 + ndim, *pairs).reshape(n, channels, *size)


def dense_norm(kind: str, channels: int, ndim: int) -> nn.Module:
    """An ordinary norm over all sites; group norm has 8 groups where the channels allow it."""
    if kind == "bn":
        return BATCH_NORMS[ndim](channels)
    if kind == "in":
        return INSTANCE_NORMS[ndim](channels, affine=True)
    if kind == "gn":
        return nn.GroupNorm(gcd(8, channels), channels)
    raise ConfigError(f"decoder norm {kind!r} is unknown; choose bn, gn or in")


def initialise(decoder: nn.Module) -> None:
    """Initialise as official SparK: truncated normal .02; transposed convolutions Kaiming."""
    for module in decoder.modules():
        if isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
        else:
            continue
        if module.bias is not None:
            nn.init.zeros_(module.bias)
