"""Encoders by name: networks of timm (2D) and MONAI (2D, 3D), residual encoder of nnU-Net.

A backbone is the library's own network under its own state-dict keys, with the names of the
sub-modules whose outputs are the stages. Segmentation networks (SegResNet, DynUNet, MedNeXt,
residual encoder U-Net) bring their own decoder along, unused while the encoder is pre-trained.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import timm
from monai.networks.nets import resnet
from monai.networks.nets.dynunet import DynUNet
from monai.networks.nets.mednext import MedNeXt
from monai.networks.nets.segresnet import SegResNet
from timm.layers.norm_act import convert_sync_batchnorm
from torch import nn

from spark3d.errors import ConfigError
from spark3d.models.probe import probe
from spark3d.models.resenc import residual_encoder_unet
from spark3d.models.volumetric import to_volumetric

RESNETS = {
    "monai/resnet10": resnet.resnet10,
    "monai/resnet18": resnet.resnet18,
    "monai/resnet34": resnet.resnet34,
    "monai/resnet50": resnet.resnet50,
    "monai/resnet101": resnet.resnet101,
}
MEDNEXT_EXPANSION = {  # encoder, bottleneck, decoder; blocks of every stage (MedNeXt, table 1)
    "monai/mednext_s": ((2, 2, 2, 2), 2, (2, 2, 2, 2), (2, 2, 2, 2), 2),
    "monai/mednext_b": ((2, 3, 4, 4), 4, (4, 4, 3, 2), (2, 2, 2, 2), 2),
    "monai/mednext_m": ((2, 3, 4, 4), 4, (4, 4, 3, 2), (3, 4, 4, 4), 4),
    "monai/mednext_l": ((3, 4, 8, 8), 8, (8, 8, 4, 3), (3, 4, 8, 8), 8),
}
NAMES = (*RESNETS, "monai/segresnet", "monai/dynunet", *MEDNEXT_EXPANSION, "nnunet/resenc")


@dataclass(frozen=True)
class Backbone:
    """A network and where its stages are.

    Attributes:
        name: As given to `build_backbone`.
        network: The library's module, keys unchanged.
        stages: Dotted names of the sub-modules that give the stages, fine to coarse.
        channels: Channels of every stage.
        strides: Total down-sampling of every stage, one number per axis.
        ndim: Number of spatial axes.
        in_channels: Channels of the input.
        encoder_keys: State-dict keys that are used to compute the stages.
        depths: Of every key, how many stages are there before it is used.
        options: What the network was built with, for the passport.
        segments: The network is a segmentation network with its own decoder.
    """

    name: str
    network: nn.Module
    stages: tuple[str, ...]
    channels: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]
    ndim: int
    in_channels: int
    encoder_keys: tuple[str, ...]
    depths: tuple[int, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    segments: bool = False

    @property
    def stride(self) -> tuple[int, ...]:
        """Total stride per axis: the smallest cell that every stage resolves."""
        return self.strides[-1]


def build_backbone(
    name: str,
    ndim: int,
    in_channels: int,
    stages: Sequence[str] | None = None,
    **options: Any,
) -> Backbone:
    """Build the network called `name` and measure its stages by a forward pass on shapes.

    Args:
        name: `timm/NAME` (any convnet with feature info in 2D; ResNets and ConvNeXts in 3D
            too), `monai/resnet10|18|34|50|101`, `monai/segresnet`, `monai/dynunet`,
            `monai/mednext_s|b|m|l` or `nnunet/resenc`.
        ndim: Number of spatial axes.
        in_channels: Channels of the input.
        stages: Names of sub-modules to use instead of the usual ones, fine to coarse.
        **options: Arguments of the library's constructor; segmentation networks take
            `out_channels`.

    Raises:
        ConfigError: Unknown name, option or stage; a network whose strides do not grow.
    """
    try:
        network, usual = _network(name, ndim, in_channels, options)
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name} does not take these options in {ndim}D: {error}") from error
    except (AssertionError, LookupError) as error:
        raise ConfigError(
            f"{name} does not take these options in {ndim}D ({type(error).__name__}: {error}); "
            "check their values and the lengths of lists"
        ) from error
    chosen = tuple(stages) if stages is not None else usual
    found = probe(network, chosen, ndim, in_channels)
    _check_strides(name, chosen, found.strides)
    return Backbone(
        name=name,
        network=network,
        stages=chosen,
        channels=found.channels,
        strides=found.strides,
        ndim=ndim,
        in_channels=in_channels,
        encoder_keys=found.encoder_keys,
        depths=found.depths,
        options=dict(options) if stages is None else {**options, "stages": list(chosen)},
        segments=isinstance(network, SegResNet | DynUNet | MedNeXt) or name == "nnunet/resenc",
    )


def synchronise_norms(network: nn.Module) -> nn.Module:
    """The network with batch statistics over all processes; timm's fused norms included."""
    return convert_sync_batchnorm(network)


def _network(
    name: str, ndim: int, in_channels: int, options: dict[str, Any]
) -> tuple[nn.Module, tuple[str, ...]]:
    """The network and the names of its usual stages."""
    if name.startswith("timm/"):
        return _timm(name, ndim, in_channels, options)
    if name in RESNETS:
        given = {"conv1_t_stride": 2, "feed_forward": False, **options}
        network = RESNETS[name](spatial_dims=ndim, n_input_channels=in_channels, **given)
        return network, ("layer1", "layer2", "layer3", "layer4")
    if name == "monai/segresnet":
        return _segresnet(ndim, in_channels, options)
    if name == "monai/dynunet":
        return _dynunet(ndim, in_channels, options)
    if name in MEDNEXT_EXPANSION:
        return _mednext(name, ndim, in_channels, options)
    if name == "nnunet/resenc":
        return residual_encoder_unet(ndim, in_channels, **options)
    close = difflib.get_close_matches(name, NAMES, n=3, cutoff=0.4) or NAMES
    raise ConfigError(f"no backbone named {name!r}; try {', '.join(close)} or timm/NAME")


def _timm(
    name: str, ndim: int, in_channels: int, options: dict[str, Any]
) -> tuple[nn.Module, tuple[str, ...]]:
    """A timm network without classifier; its stages are those of stride 4 and more.

    ResNets and ConvNeXts also come in 3D, with the option `depth` of `to_volumetric`.
    """
    model = name.removeprefix("timm/")
    if ndim not in (2, 3):
        raise ConfigError(f"{name} is a network for 2 or 3 axes, not {ndim}")
    if not timm.is_model(model):
        close = difflib.get_close_matches(model, timm.list_models(), n=3)
        raise ConfigError(f"timm has no model named {model!r}; close names: {', '.join(close)}")
    options = dict(options)
    depth = options.pop("depth", "mean") if ndim == 3 else None
    given = {"num_classes": 0, **options}
    network = timm.create_model(model, in_chans=in_channels, **given)
    info: Any = network.feature_info
    entries = info if isinstance(info, list) else info.info
    stages = tuple(e["module"] for e in entries if e["reduction"] >= 4)
    return (to_volumetric(network, depth) if depth else network), stages


def _segresnet(
    ndim: int, in_channels: int, options: dict[str, Any]
) -> tuple[nn.Module, tuple[str, ...]]:
    given = dict(options)
    for key in ("blocks_down", "blocks_up"):
        if key in given:
            given[key] = tuple(given[key])
    down = given.get("blocks_down", (1, 2, 2, 4))
    given.setdefault("blocks_up", (1,) * (len(down) - 1))
    network = SegResNet(spatial_dims=ndim, in_channels=in_channels, **given)
    return network, tuple(f"down_layers.{i}" for i in range(len(down)))


def _dynunet(
    ndim: int, in_channels: int, options: dict[str, Any]
) -> tuple[nn.Module, tuple[str, ...]]:
    """DynUNet with kernels and strides per stage, each an int or one number per axis."""
    given = {"out_channels": 2, "strides": (1, 2, 2, 2, 2), **options}
    strides = given["strides"]
    given.setdefault("kernel_size", (3,) * len(strides))
    given.setdefault("upsample_kernel_size", tuple(strides[1:]))
    network = DynUNet(spatial_dims=ndim, in_channels=in_channels, **given)
    middle = tuple(f"downsamples.{i}" for i in range(len(strides) - 2))
    return network, ("input_block", *middle, "bottleneck")


def _mednext(
    name: str, ndim: int, in_channels: int, options: dict[str, Any]
) -> tuple[nn.Module, tuple[str, ...]]:
    """MedNeXt of the size in `name`; the stem's `init_filters` and the kernel can be changed."""
    given = {**mednext_arguments(name), **options}
    network = MedNeXt(spatial_dims=ndim, in_channels=in_channels, **given)
    down = tuple(f"enc_stages.{i}" for i in range(len(given["blocks_down"])))
    return network, (*down, "bottleneck")


def mednext_arguments(name: str) -> dict[str, Any]:
    """MONAI's arguments for the MedNeXt of this size."""
    encoder, bottleneck, decoder, blocks, deep = MEDNEXT_EXPANSION[name]
    return {
        "encoder_expansion_ratio": encoder,
        "bottleneck_expansion_ratio": bottleneck,
        "decoder_expansion_ratio": decoder,
        "blocks_down": blocks,
        "blocks_bottleneck": deep,
        "blocks_up": blocks[::-1],
        "kernel_size": 3,
        "use_residual_connection": True,
    }


def _check_strides(name: str, stages: Sequence[str], strides: tuple[tuple[int, ...], ...]) -> None:
    for finer, coarser in itertools.pairwise(strides):
        if finer == coarser or any(c % f for f, c in zip(finer, coarser, strict=True)):
            raise ConfigError(
                f"{name}: the strides of stages {list(stages)} are {list(strides)}; every stage "
                "must be a whole multiple of the one before it, and coarser"
            )
