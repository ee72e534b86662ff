"""Small networks whose every stage a test can afford in float64."""

from collections.abc import Callable
from dataclasses import dataclass

import timm
import torch
from monai.networks import nets
from torch import Tensor, nn

from spark3d.models.backbones import build_backbone


@dataclass(frozen=True)
class Small:
    """How to build a network, its stages, and crops and cells that fit."""

    build: Callable[[], nn.Module]
    stages: tuple[str, ...]
    size: tuple[int, ...]
    cell: tuple[int, ...]
    in_channels: int = 1


def plain_cnn(ndim: int, channels_mult: int = 1) -> nn.Module:
    """A user's own network: convolutions, batch norm, a pool, a residual branch."""
    conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[ndim]
    norm = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[ndim]
    pool = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}[ndim]
    c = 4 * channels_mult

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = conv(c, c, 3, padding=1), norm(c)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(x + self.norm(self.conv(x)))

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(conv(1, c, 3, padding=1), norm(c), nn.ReLU(inplace=True))
            self.layer1 = nn.Sequential(Residual(), pool(2))
            self.layer2 = nn.Sequential(conv(c, 2 * c, 3, 2, 1), norm(2 * c), nn.LeakyReLU())
            self.head = nn.Linear(2 * c, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.layer2(self.layer1(self.stem(x)))
            return self.head(x.flatten(2).mean(2))

    return Plain()


def timm_network(name: str, **options: object) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, num_classes=2, **options)


RESNET, CONVNEXT = tuple(f"layer{i}" for i in range(1, 5)), tuple(f"stages.{i}" for i in range(4))
WIDE, CELL = (96, 64), (32, 32)


def _blocks(*numbers: int) -> tuple[str, ...]:
    return tuple(f"blocks.{n}" for n in numbers)


TIMM = {
    "timm/test_resnet": Small(
        timm_network("test_resnet", drop_path_rate=0.3), RESNET, WIDE, CELL, 3
    ),
    "timm/test_convnext": Small(
        timm_network("test_convnext", drop_path_rate=0.3), CONVNEXT, WIDE, CELL, 3
    ),
    "timm/convnextv2_atto": Small(
        timm_network("convnextv2_atto", depths=(1, 1, 1, 1), dims=(8, 16, 24, 32)),
        CONVNEXT, WIDE, CELL, 3,
    ),
    "timm/test_efficientnet": Small(
        timm_network("test_efficientnet"), _blocks(1, 2, 3, 4), WIDE, CELL, 3
    ),
    "timm/tf_mobilenetv3_small_075": Small(
        timm_network("tf_mobilenetv3_small_075"), _blocks(0, 1, 3, 5), WIDE, CELL, 3
    ),
    "timm/test_resnet 3d": Small(
        lambda: build_backbone("timm/test_resnet", 3, 1).network,
        RESNET[:3], (16, 32, 16), (16,) * 3,
    ),
    "timm/test_convnext 3d": Small(
        lambda: build_backbone("timm/test_convnext", 3, 1).network,
        CONVNEXT[:3], (16, 16, 32), (16,) * 3,
    ),
}  # fmt: skip


def _bottleneck(ndim: int) -> nn.Module:
    return nets.ResNet(
        "bottleneck", [1, 1, 1, 1], [2, 4, 4, 4], spatial_dims=ndim, n_input_channels=1,
        conv1_t_stride=2, feed_forward=False,
    )  # fmt: skip


def _mednext(ndim: int, **options: object) -> nn.Module:
    ones = (1, 1, 1, 1)
    return nets.MedNeXt(
        spatial_dims=ndim, init_filters=4, encoder_expansion_ratio=2, decoder_expansion_ratio=2,
        bottleneck_expansion_ratio=2, blocks_down=ones, blocks_bottleneck=1, blocks_up=ones,
        kernel_size=3, **options,
    )  # fmt: skip


MEDNEXT = (*(f"enc_stages.{i}" for i in range(4)), "bottleneck")
SEGRESNET = tuple(f"down_layers.{i}" for i in range(3))
MONAI = {
    "monai/resnet 3d": Small(
        lambda: nets.ResNet(
            "basic", [1, 1, 1, 1], [4, 8, 8, 8], spatial_dims=3, n_input_channels=1,
            feed_forward=False,
        ),
        RESNET, (64, 32, 32), (32, 16, 32),
    ),
    "monai/segresnet 3d": Small(
        lambda: nets.SegResNet(3, init_filters=8, blocks_down=(1, 2, 1), blocks_up=(1, 1)),
        SEGRESNET, (8, 12, 8), (4, 4, 4),
    ),
    "monai/segresnet 2d, large cells": Small(
        lambda: nets.SegResNet(2, init_filters=8, blocks_down=(1, 2, 1), blocks_up=(1, 1)),
        SEGRESNET, (48, 32), (16, 8),
    ),
    "monai/dynunet 3d, anisotropic": Small(
        lambda: nets.DynUNet(
            3, 1, 2, [[1, 3, 3], 3, 3], [1, [1, 2, 2], 2], [[1, 2, 2], 2],
            filters=[4, 8, 8], res_block=True,
        ),
        ("input_block", "downsamples.0", "bottleneck"), (6, 12, 8), (2, 4, 4),
    ),
    "monai/mednext 3d": Small(lambda: _mednext(3), MEDNEXT, (32, 32, 16), (16, 16, 16)),
    "monai/mednext 3d, grn": Small(
        lambda: _mednext(3, global_resp_norm=True, use_residual_connection=True),
        MEDNEXT, (32, 16, 32), (16, 16, 16),
    ),
    "monai/resnet 1d, bottleneck": Small(
        lambda: _bottleneck(1), RESNET, (96,), (32,)
    ),
    "monai/resnet 2d, bottleneck": Small(
        lambda: _bottleneck(2), RESNET, (64, 96), (32, 32)
    ),
    "monai/dynunet 2d, anisotropic": Small(
        lambda: nets.DynUNet(
            2, 1, 2, [[1, 3], 3, 5], [1, [1, 2], 2], [[1, 2], 2], filters=[4, 8, 8]
        ),
        ("input_block", "downsamples.0", "bottleneck"), (12, 16), (4, 4),
    ),
    "monai/mednext 2d": Small(lambda: _mednext(2), MEDNEXT, (48, 32), (16, 16)),
}  # fmt: skip
RESENC = {
    f"nnunet/resenc {n}d": Small(
        lambda n=n: build_backbone(
            "nnunet/resenc", n, 1, features=(4, 8, 8), blocks=(1, 2, 1),
            strides=(1, [2] * n, [1] * (n - 1) + [2]),
            kernel_size=(3, [3] * n, [1] * (n - 1) + [3]),
        ).network,
        tuple(f"encoder.stages.{i}" for i in range(3)), (8, 12, 8)[:n], (2, 2, 4)[-n:],
    )
    for n in (1, 2, 3)
}  # fmt: skip
OWN = {
    f"own {n}d": Small(lambda n=n: plain_cnn(n), ("stem", "layer1", "layer2"), (12,) * n, (4,) * n)
    for n in (1, 2, 3)
}
ALL = {**OWN, **TIMM, **MONAI}
