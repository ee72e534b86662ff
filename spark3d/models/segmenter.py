"""Segmentation networks over a backbone: its own decoder where it has one, a U-Net decoder else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from jaxtyping import Float
from monai.networks.blocks.dynunet_block import UnetOutBlock, UnetResBlock
from monai.networks.blocks.unetr_block import UnetrBasicBlock, UnetrUpBlock
from monai.networks.layers.factories import Conv
from monai.networks.nets.flexible_unet import SegmentationHead, UNetDecoder
from torch import Tensor, nn

from spark3d.errors import ConfigError
from spark3d.models.backbones import Backbone
from spark3d.models.geometry import plan_climb

MOST_CHANNELS = {1: 512, 2: 512, 3: 320}
SUPERVISED = 3
"""Coarser resolutions with logits of their own under deep supervision."""
FLEXIBLE_CHANNELS = (256, 128, 64, 32, 16)


class _Complete(Exception):
    """Ends the encoder's forward once the last stage is there."""


class PyramidSegmenter(nn.Module):
    """A U-Net decoder of MONAI's residual blocks over the stages of `backbone`.

    Channels double from `feature_size` at full resolution with every halving of the map, up to 320
    in 3D and 512 in 2D. The skip at full resolution comes from the crop itself, as in UNETR; at
    resolutions between that have no stage the map is only up-sampled.

    In training with `deep_supervision` it returns logits of several resolutions, fine to coarse.

    Attributes:
        encoder: The backbone's network, under its own keys; parameters that its stages do not
            depend on are frozen.
    """

    def __init__(
        self,
        backbone: Backbone,
        out_channels: int,
        feature_size: int = 16,
        deep_supervision: bool = False,
    ) -> None:
        super().__init__()
        ndim = backbone.ndim
        climb = plan_climb(backbone.strides, (1,) * ndim)
        steps = len(climb.factors)
        wide = [min(feature_size << (steps - k), MOST_CHANNELS[ndim]) for k in range(steps + 1)]
        self.encoder = _only_encoder(backbone)
        self.stages = backbone.stages
        self.stage_at = {level: stage for stage, level in enumerate(climb.level)}
        conv = Conv[Conv.CONV, ndim]
        self.laterals = nn.ModuleList(
            conv(channels, wide[level], 1)
            for channels, level in zip(backbone.channels, climb.level, strict=True)
        )
        self.ups = nn.ModuleList()
        self.crop_skip: nn.Module | None = None
        for k, factors in enumerate(climb.factors):
            full = k + 1 == steps and (k + 1) not in self.stage_at
            joined = full or (k + 1) in self.stage_at
            make = UnetrUpBlock if joined else _UpOnly
            norm = ("instance", {"affine": True})
            self.ups.append(
                make(ndim, wide[k], wide[k + 1], 3, factors, norm_name=norm, res_block=True)
            )
            if full:
                self.crop_skip = UnetrBasicBlock(
                    ndim, backbone.in_channels, wide[k + 1], 3, 1, norm_name=norm, res_block=True
                )
        self.head = UnetOutBlock(ndim, wide[-1], out_channels)
        coarse = range(max(1, steps - SUPERVISED), steps) if deep_supervision else ()
        self.side_heads = nn.ModuleDict(
            {str(k): UnetOutBlock(ndim, wide[k], out_channels) for k in coarse}
        )

    def forward(
        self, crops: Float[Tensor, "b c *size"]
    ) -> Float[Tensor, "b k *size"] | tuple[Tensor, ...]:
        """Logits of every class at every voxel."""
        maps = stage_outputs(self.encoder, self.stages, crops)
        skips = [lateral(m) for lateral, m in zip(self.laterals, maps, strict=True)]
        x = skips[self.stage_at[0]]
        sides: list[Tensor] = []
        for k, up in enumerate(self.ups, start=1):
            if k in self.stage_at:
                x = up(x, skips[self.stage_at[k]])
            elif k == len(self.ups) and self.crop_skip is not None:
                x = up(x, self.crop_skip(crops))
            else:
                x = up(x)
            if self.training and str(k) in self.side_heads:
                sides.append(self.side_heads[str(k)](x))
        logits = self.head(x)
        return (logits, *reversed(sides)) if sides else logits


class FlexibleSegmenter(nn.Module):
    """The decoder of MONAI's FlexibleUNet, under its keys, over the stages of a MONAI ResNet.

    Beside the stages it reads the map after the stem, of stride 2, as FlexibleUNet does.

    Attributes:
        encoder: The backbone's network, under its own keys.
    """

    def __init__(self, backbone: Backbone, out_channels: int) -> None:
        super().__init__()
        ndim = backbone.ndim
        self.encoder = _only_encoder(backbone)
        self.stages = ("act", *backbone.stages)
        stem = self.encoder.get_submodule("conv1").out_channels
        assert isinstance(stem, int)
        norm = ("batch", {"eps": 1e-3, "momentum": 0.1})
        self.decoder = UNetDecoder(
            ndim, (backbone.in_channels, stem, *backbone.channels), FLEXIBLE_CHANNELS,
            act=("relu", {"inplace": True}), norm=norm, dropout=0.0, bias=False,
            upsample="nontrainable", pre_conv="default", interp_mode="nearest",
            align_corners=None, is_pad=True,
        )  # fmt: skip
        self.segmentation_head = SegmentationHead(ndim, FLEXIBLE_CHANNELS[-1], out_channels)

    def forward(self, crops: Float[Tensor, "b c *size"]) -> Float[Tensor, "b k *size"]:
        """Logits of every class at every voxel."""
        maps = stage_outputs(self.encoder, self.stages, crops)
        return self.segmentation_head(self.decoder(list(maps), len(maps) - 1))


class _UpOnly(nn.Module):
    """Up-sample without a skip: transposed convolution and one residual block."""

    def __init__(
        self,
        ndim: int,
        c_in: int,
        c_out: int,
        kernel_size: int,
        factors: tuple[int, ...],
        norm_name: tuple[str, dict[str, bool]],
        res_block: bool,
    ) -> None:
        super().__init__()
        self.up = Conv[Conv.CONVTRANS, ndim](c_in, c_out, factors, stride=factors)
        self.block = UnetResBlock(ndim, c_out, c_out, kernel_size, 1, norm_name=norm_name)

    def forward(self, x: Float[Tensor, "b c_in *size"]) -> Float[Tensor, "b c_out *finer"]:
        return self.block(self.up(x))


def build_segmenter(
    backbone: Backbone,
    out_channels: int,
    feature_size: int = 16,
    decoder: Literal["auto", "unet", "flexible"] = "auto",
    deep_supervision: bool = False,
) -> nn.Module:
    """The segmentation network of `backbone`: `(b, c, *size)` to logits `(b, out_channels, *size)`.

    SegResNet, DynUNet, MedNeXt and the residual encoder U-Net are returned themselves. The others
    get a U-Net decoder, `PyramidSegmenter`, of which `feature_size` is the width; so do all with
    the decoder "unet". "flexible" is that of MONAI's FlexibleUNet, for MONAI's ResNets.

    Args:
        backbone: Encoder, or whole network.
        out_channels: Classes, background included.
        feature_size: See above.
        decoder: See above.
        deep_supervision: In training, logits of coarser resolutions come along; networks with a
            decoder of their own must have been built with their option for it.

    Raises:
        ConfigError: The network was built for another number of classes, or lacks what is asked.
    """
    if decoder == "flexible":
        if not backbone.name.startswith("monai/resnet") or deep_supervision:
            wrong = "deep supervision" if deep_supervision else backbone.name
            raise ConfigError(
                f"model.decoder=flexible is for monai/resnet10 to 101 and has no deep supervision; "
                f"it does not go with {wrong}: choose model.decoder=unet"
            )
        return FlexibleSegmenter(backbone, out_channels)
    if decoder == "unet" or not backbone.segments:
        return PyramidSegmenter(backbone, out_channels, feature_size, deep_supervision)
    built = backbone.options.get("out_channels", 2)
    if built != out_channels:
        raise ConfigError(
            f"{backbone.name} was built with out_channels={built}, but {out_channels} are needed; "
            f"pass out_channels={out_channels} to build_backbone"
        )
    if deep_supervision != bool(backbone.options.get("deep_supervision", False)):
        raise ConfigError(
            f"{backbone.name} was built with deep_supervision={not deep_supervision}; set "
            "model.deep_supervision where the network has it (DynUNet, MedNeXt, nnunet/resenc), or "
            "choose model.decoder=unet"
        )
    if deep_supervision:
        backbone.network.register_forward_hook(_finest_in_evaluation)
    return backbone.network


def _only_encoder(backbone: Backbone) -> nn.Module:
    """The backbone's network; parameters that its stages do not depend on are frozen."""
    for name, parameter in backbone.network.named_parameters():
        parameter.requires_grad_(name in backbone.encoder_keys)
    return backbone.network


def _finest_in_evaluation(network: nn.Module, _inputs: object, output: object) -> object:
    """A residual encoder U-Net with deep supervision returns all of its maps in evaluation too."""
    return output if network.training or isinstance(output, Tensor) else output[0]  # type: ignore


def encoder_of(segmenter: nn.Module) -> nn.Module:
    """The part of a segmentation network that bears the backbone's own keys."""
    around = isinstance(segmenter, PyramidSegmenter | FlexibleSegmenter)
    return segmenter.encoder if around else segmenter


def stage_outputs(network: nn.Module, stages: Sequence[str], crops: Tensor) -> tuple[Tensor, ...]:
    """Run a dense `network` until its last stage is there and return all `stages`."""
    found: dict[str, Tensor] = {}

    def keep(name: str, output: Tensor) -> None:
        found[name] = output
        if len(found) == len(stages):
            raise _Complete

    handles = [
        network.get_submodule(name).register_forward_hook(
            lambda _module, _args, output, name=name: keep(name, output)  # pyright: ignore
        )
        for name in stages
    ]
    try:
        network(crops)
    except _Complete:
        return tuple(found[name] for name in stages)
    finally:
        for handle in handles:
            handle.remove()
    raise ValueError(f"stages {[s for s in stages if s not in found]} were not reached")
