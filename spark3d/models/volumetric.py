"""The 3D twin of a 2D timm network: every layer gets a depth axis in front, keys stay the same.

Weights are inflated along depth (Carreira and Zisserman, "Quo vadis, action recognition?", CVPR
2017, sec. 2): a volume that is constant along depth gives the features of its 2D slice, exactly
with `depth="centre"` or `"flat"`, and away from the first and last slices with `"mean"`.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from timm.layers.grn import GlobalResponseNorm
from timm.layers.norm import LayerNorm2d
from timm.layers.squeeze_excite import SEModule
from timm.models.convnext import ConvNeXt, ConvNeXtBlock
from timm.models.resnet import ResNet
from torch import Tensor, nn

from spark3d.errors import ConfigError
from spark3d.models.channel_norm import ChannelNorm

DEPTHS = ("mean", "centre", "flat")
ATTENTION = frozenset(
    {
        "bottleneck_attn", "cbam", "coord_attn", "eca", "gather_excite", "global_context",
        "halo_attn", "lambda_layer", "non_local_attn", "selective_kernel", "split_attn",
        "squeeze_excite",
    }
)  # fmt: skip
"""Modules of `timm.layers` whose layers take the last two axes for all there are."""


class ConvNeXtBlock3d(ConvNeXtBlock):
    """timm's ConvNeXt block over any number of axes."""

    def forward(self, x: Float[Tensor, "b c *size"]) -> Float[Tensor, "b d *size"]:
        y = self.conv_dw(x)
        if self.use_conv_mlp:
            y = self.mlp(self.norm(y))
        else:
            y = self.mlp(self.norm(y.movedim(1, -1))).movedim(-1, 1)
        if self.gamma is not None:
            y = y * self.gamma.view(1, -1, *(1,) * (y.ndim - 2))
        return self.drop_path(y) + self.shortcut(x)


class SqueezeExcite3d(SEModule):
    """timm's squeeze-excite over any number of axes."""

    def forward(self, x: Float[Tensor, "b c *size"]) -> Float[Tensor, "b c *size"]:
        module: Any = self
        axes = tuple(range(2, x.ndim))
        pooled = x.mean(axes, keepdim=True)
        if self.add_maxpool:
            pooled = 0.5 * pooled + 0.5 * x.amax(axes, keepdim=True)
        return x * module.gate(module.fc2(module.act(module.bn(module.fc1(pooled)))))


def to_volumetric(network: nn.Module, depth: str = "mean") -> nn.Module:
    """Turn a timm ResNet or ConvNeXt into its 3D twin, in place, with inflated weights.

    Args:
        network: A 2D network of timm.
        depth: How a k x k kernel grows. "mean": k x k x k, every slice 1/k of the weights;
            "centre": k x k x k with the weights in the middle slice and zeros elsewhere;
            "flat": 1 x k x k and stride 1, so that no two slices ever meet.

    Raises:
        ConfigError: Another kind of network, a layer without a 3D counterpart, unknown `depth`.
    """
    if not isinstance(network, ResNet | ConvNeXt):
        raise ConfigError(
            f"{type(network).__name__} has no 3D twin; timm ResNets and ConvNeXts have, and MONAI "
            "brings 3D networks of its own"
        )
    if depth not in DEPTHS:
        raise ConfigError(f"depth={depth!r} is unknown; choose one of {', '.join(DEPTHS)}")
    for name, layer in list(network.named_modules()):
        twin = _twin(name, layer, depth)
        if twin is not layer:
            parent, _, child = name.rpartition(".")
            setattr(network.get_submodule(parent), child, twin.train(layer.training))
    return network


def inflate(weight: Float[Tensor, "o i h w"], depth: str, slices: int) -> Tensor:
    """Weights of a 3D kernel of `slices` slices from those of a 2D one."""
    if depth == "mean":
        return weight.unsqueeze(2).expand(-1, -1, slices, -1, -1) / slices
    out = weight.new_zeros(*weight.shape[:2], slices, *weight.shape[2:])
    out[:, :, (slices - 1) // 2] = weight
    return out


def _twin(name: str, layer: nn.Module, depth: str) -> nn.Module:
    """The 3D layer for `layer`, or `layer` itself where it serves any number of axes."""
    if type(layer) is nn.Conv2d:
        return _convolution(layer, depth)
    if type(layer) is nn.BatchNorm2d:
        twin = nn.BatchNorm3d(layer.num_features, layer.eps, layer.momentum, layer.affine)
        twin.load_state_dict(layer.state_dict())
        return twin
    if isinstance(layer, nn.MaxPool2d | nn.AvgPool2d):
        return _pool(layer, depth)
    if type(layer) is LayerNorm2d:
        channels_last = ChannelNorm(layer.normalized_shape[0], layer.eps)
        channels_last.load_state_dict(layer.state_dict())
        return channels_last
    if type(layer) is ConvNeXtBlock:
        layer.__class__ = ConvNeXtBlock3d
    elif type(layer) is SEModule:
        layer.__class__ = SqueezeExcite3d
    elif type(layer) is GlobalResponseNorm:
        first = 1 if layer.channel_dim == -1 else 2
        layer.spatial_dim = tuple(range(first, first + 3))  # pyright: ignore
        layer.wb_shape = (1, 1, 1, 1, -1) if first == 1 else (1, -1, 1, 1, 1)  # pyright: ignore
    elif _needs_two_axes(layer) and not name.startswith(("head", "global_pool")):
        raise ConfigError(
            f"layer {name} is a {type(layer).__name__}, which has no 3D counterpart; choose a "
            "ResNet or ConvNeXt without it"
        )
    return layer


def _needs_two_axes(layer: nn.Module) -> bool:
    kind = type(layer)
    package, _, module = kind.__module__.rpartition(".")
    return kind.__name__.endswith("2d") or (package == "timm.layers" and module in ATTENTION)


def _convolution(layer: nn.Conv2d, depth: str) -> nn.Conv3d:
    flat = depth == "flat"
    padding = layer.padding if isinstance(layer.padding, str) else _longer(layer.padding, flat, 0)
    twin = nn.Conv3d(
        layer.in_channels,
        layer.out_channels,
        _longer(layer.kernel_size, flat, 1),
        _longer(layer.stride, flat, 1),
        padding,
        _longer(layer.dilation, flat, 1),
        layer.groups,
        layer.bias is not None,
        layer.padding_mode,
    )
    with torch.no_grad():
        twin.weight.copy_(inflate(layer.weight, depth, twin.kernel_size[0]))
        if twin.bias is not None and layer.bias is not None:
            twin.bias.copy_(layer.bias)
    return twin


def _pool(layer: nn.MaxPool2d | nn.AvgPool2d, depth: str) -> nn.Module:
    flat = depth == "flat"
    options: dict[str, Any] = {
        "kernel_size": _longer(layer.kernel_size, flat, 1),
        "stride": _longer(layer.stride, flat, 1),
        "padding": _longer(layer.padding, flat, 0),
        "ceil_mode": layer.ceil_mode,
    }
    if isinstance(layer, nn.MaxPool2d):
        return nn.MaxPool3d(**options)
    return nn.AvgPool3d(**options, count_include_pad=layer.count_include_pad)


def _longer(value: int | tuple[int, ...], flat: bool, alone: int) -> tuple[int, int, int]:
    """A pair of numbers with one for depth in front: `alone` if flat, else that of the first."""
    pair = (value, value) if isinstance(value, int) else value
    return (alone if flat else pair[0], pair[0], pair[1])
