"""Small networks of every kind that the tests of all objectives share."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from spark3d.models.backbones import Backbone, build_backbone
from spark3d.models.decoder import LightDecoder, OfficialDecoder
from spark3d.models.densify import Densify
from spark3d.objectives.a2mim import A2MIM
from spark3d.objectives.localmim import LocalMIM
from spark3d.objectives.spark import SparK
from spark3d.sparse.encoder import SparseEncoder
from spark3d.sparse.mask import CellMask, random_mask


@dataclass(frozen=True)
class Case:
    """A backbone, and the cells that fit it."""

    name: str
    ndim: int
    cell: tuple[int, ...]
    grid: tuple[int, ...]
    options: dict = field(default_factory=dict)

    def backbone(self, in_channels: int = 1) -> Backbone:
        return build_backbone(self.name, self.ndim, in_channels, **self.options)

    def batch(self, ratio: float = 0.6, channels: int = 1) -> tuple[Tensor, CellMask]:
        """Two crops with structure at several scales, and a mask."""
        rng = torch.Generator().manual_seed(7)
        mask = random_mask(2, self.grid, ratio, self.cell, rng)
        noise = 0.2 * torch.randn(2, channels, *mask.size, generator=rng)
        coarse = torch.randn(2, channels, *self.grid, generator=rng)
        mode = {2: "bilinear", 3: "trilinear"}[self.ndim]
        return noise + torch.nn.functional.interpolate(coarse, mask.size, mode=mode), mask


ANISOTROPIC = {
    "strides": ((1, 1, 1), (1, 2, 2), (2, 2, 2)),
    "kernel_size": ((1, 3, 3), 3, 3),
    "filters": (8, 8, 16),
}
SMALL_RESNET = {"widen_factor": 0.25, "no_max_pool": True, "conv1_t_size": 3}
TINY_CONVNEXT = {"dims": (8, 16, 24, 32), "depths": (1, 1, 2, 1)}
TINY_MEDNEXT = {
    "init_filters": 4,
    "blocks_down": (1, 1, 1, 1),
    "blocks_bottleneck": 1,
    "blocks_up": (1, 1, 1, 1),
}
CASES = {
    "resnet 2d": Case("timm/resnet10t", 2, (32, 32), (3, 3), {"channels": (8, 16, 24, 32)}),
    "resnet 3d": Case("monai/resnet10", 3, (16, 16, 16), (2, 2, 3), SMALL_RESNET),
    "convnext 2d": Case("timm/convnext_atto", 2, (32, 32), (3, 3), TINY_CONVNEXT),
    "mednext 3d": Case("monai/mednext_s", 3, (16, 16, 16), (2, 2, 2), TINY_MEDNEXT),
    "segresnet 3d": Case("monai/segresnet", 3, (8, 8, 8), (3, 3, 2), {"init_filters": 8}),
    "segresnet 2d": Case("monai/segresnet", 2, (16, 8), (3, 4), {"init_filters": 8}),
    "dynunet 3d": Case("monai/dynunet", 3, (2, 4, 4), (3, 3, 3), ANISOTROPIC),
}


def make_spark(
    case: Case,
    backend: str = "packed",
    light: bool = True,
    norm: str = "gn",
    in_channels: int = 1,
    **options: float,
) -> SparK:
    """SparK on a small decoder."""
    backbone = case.backbone(in_channels)
    encoder = SparseEncoder(backbone.network, backbone.stages, case.ndim, backend)
    kind = LightDecoder if light else OfficialDecoder
    decoder = kind(backbone.strides, in_channels, width=32, norm=norm, min_width=8)
    densify = Densify(backbone.channels, decoder.widths, case.ndim, norm, decoder.folds)
    return SparK(encoder, densify, decoder, **options)


def make_localmim(case: Case, backend: str = "packed", **options: object) -> LocalMIM:
    """LocalMIM with narrow tap decoders; voxels where no stage is coarse enough for HOG."""
    backbone = case.backbone()
    encoder = SparseEncoder(backbone.network, backbone.stages, case.ndim, backend)
    coarse = min(backbone.strides[-1]) >= 4
    given = {"target": "hog" if coarse else "voxels", "width": 16, "kernel": 3, **options}
    return LocalMIM(encoder, case.cell, 1, **given)


def make_a2mim(case: Case, backend: str = "packed", **options: object) -> A2MIM:
    """A2MIM on the same network, used densely."""
    backbone = case.backbone()
    encoder = SparseEncoder(backbone.network, backbone.stages, case.ndim, backend)
    return A2MIM(encoder, 1, **options)


OBJECTIVES = {"spark": make_spark, "localmim": make_localmim, "a2mim": make_a2mim}
