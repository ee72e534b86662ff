"""Segmentation networks over a backbone: its own decoder where it has one, a U-Net decoder else."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from monai.networks.blocks.dynunet_block import UnetOutBlock, UnetResBlock
from monai.networks.blocks.unetr_block import UnetrBasicBlock, UnetrUpBlock
from monai.networks.layers.factories import Conv
from torch import Tensor, nn

from spark3d.errors import ConfigError
from spark3d.models.backbones import Backbone
from spark3d.models.geometry import plan_climb

MOST_CHANNELS = {1: 512, 2: 512, 3: 320}


class _Complete(Exception):
    """Ends the encoder's forward once the last stage is there."""


class PyramidSegmenter(nn.Module):
    """A U-Net decoder of MONAI's residual blocks over the stages of `backbone`.

    Channels double from `feature_size` at full resolution with every halving of the map, up to 320
    in 3D and 512 in 2D. The skip at full resolution comes from the crop itself, as in UNETR; at
    resolutions between that have no stage the map is only up-sampled.

    Attributes:
        encoder: The backbone's network, under its own keys; parameters that its stages do not
            depend on are frozen.
    """

    def __init__(self, backbone: Backbone, out_channels: int, feature_size: int = 16) -> None:
        super().__init__()
        ndim = backbone.ndim
        climb = plan_climb(backbone.strides, (1,) * ndim)
        steps = len(climb.factors)
        wide = [min(feature_size << (steps - k), MOST_CHANNELS[ndim]) for k in range(steps + 1)]
        self.encoder = backbone.network
        for name, parameter in self.encoder.named_parameters():
            parameter.requires_grad_(name in backbone.encoder_keys)
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

    def forward(self, crops: Float[Tensor, "b c *size"]) -> Float[Tensor, "b k *size"]:
        """Logits of every class at every voxel."""
        maps = stage_outputs(self.encoder, self.stages, crops)
        skips = [lateral(m) for lateral, m in zip(self.laterals, maps, strict=True)]
        x = skips[self.stage_at[0]]
        for k, up in enumerate(self.ups, start=1):
            if k in self.stage_at:
                x = up(x, skips[self.stage_at[k]])
            elif k == len(self.ups) and self.crop_skip is not None:
                x = up(x, self.crop_skip(crops))
            else:
                x = up(x)
        return self.head(x)


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


def build_segmenter(backbone: Backbone, out_channels: int, feature_size: int = 16) -> nn.Module:
    """The segmentation network of `backbone`: `(b, c, *size)` to logits `(b, out_channels, *size)`.

    SegResNet, DynUNet, MedNeXt and the residual encoder U-Net are returned themselves. The others
    get a U-Net decoder, `PyramidSegmenter`, of which `feature_size` is the width.

    Raises:
        ConfigError: The network was built for another number of classes.
    """
    if not backbone.segments:
        return PyramidSegmenter(backbone, out_channels, feature_size)
    built = backbone.options.get("out_channels", 2)
    if built != out_channels:
        raise ConfigError(
            f"{backbone.name} was built with out_channels={built}, but {out_channels} are needed; "
            f"pass out_channels={out_channels} to build_backbone"
        )
    return backbone.network


def encoder_of(segmenter: nn.Module) -> nn.Module:
    """The part of a segmentation network that bears the backbone's own keys."""
    return segmenter.encoder if isinstance(segmenter, PyramidSegmenter) else segmenter


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
