"""The residual encoder U-Net of nnU-Net (optional extra `nnunet`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from spark3d.errors import EnvironmentProblem

try:
    from dynamic_network_architectures.architectures.unet import (  # pyright: ignore[reportMissingImports]
        ResidualEncoderUNet,
    )
except ImportError:
    ResidualEncoderUNet = None

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
INSTANCE_NORMS = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}


def residual_encoder_unet(
    ndim: int,
    in_channels: int,
    out_channels: int = 2,
    features: Sequence[int] = (32, 64, 128, 256, 320, 320),
    strides: Sequence[int | Sequence[int]] = (1, 2, 2, 2, 2, 2),
    blocks: Sequence[int] = (1, 3, 4, 6, 6, 6),
    kernel_size: int | Sequence[int | Sequence[int]] = 3,
    **options: Any,
) -> tuple[nn.Module, tuple[str, ...]]:
    """Build the U-Net (defaults: ResEnc-L without its plan) and name its encoder's stages.

    Args:
        ndim: Number of spatial axes.
        in_channels: Channels of the input.
        out_channels: Number of classes.
        features: Channels of every stage.
        strides: Stride of every stage, an int or one number per axis.
        blocks: Residual blocks of every stage.
        kernel_size: One for all stages, or one per stage.
        **options: Further arguments of `ResidualEncoderUNet`.

    Raises:
        EnvironmentProblem: dynamic-network-architectures is not installed.
    """
    if ResidualEncoderUNet is None:
        raise EnvironmentProblem(
            "nnunet/resenc needs dynamic-network-architectures: pip install 'spark3d[nnunet]'"
        )
    given = {
        "n_conv_per_stage_decoder": (1,) * (len(features) - 1),
        "conv_bias": True,
        "norm_op": INSTANCE_NORMS[ndim],
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "nonlin": nn.LeakyReLU,
        "nonlin_kwargs": {"inplace": True},
        **options,
    }
    network = ResidualEncoderUNet(
        input_channels=in_channels,
        n_stages=len(features),
        features_per_stage=tuple(features),
        conv_op=CONVOLUTIONS[ndim],
        kernel_sizes=kernel_size,  # type: ignore[arg-type]
        strides=tuple(strides),  # type: ignore[arg-type]
        n_blocks_per_stage=tuple(blocks),
        num_classes=out_channels,
        **given,
    )
    if not given.get("deep_supervision", False):
        for idle in network.decoder.seg_layers[:-1]:  # heads that only deep supervision uses
            idle.requires_grad_(False)
    return network, tuple(f"encoder.stages.{i}" for i in range(len(features)))
