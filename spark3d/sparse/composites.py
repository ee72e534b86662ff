"""Mask-aware forms of layers that timm, MONAI and others compose from functional calls.

A walk over leaf layers cannot see a mean or a norm inside a `forward`, so these classes are known
by their qualified name, and their attributes are used as those libraries define them. This keeps
the core free of both libraries.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from spark3d.sparse.layers import (
    Masked,
    MaskedBatchNorm,
    MaskedConvSame,
    MaskedGroupNorm,
)
from spark3d.sparse.slot import Run


class MaskedBatchNormAct(MaskedBatchNorm):
    """BatchNorm with its activation (timm `BatchNormAct2d`)."""

    drop: nn.Module
    act: nn.Module

    def masked(self, run: Run, x: Tensor) -> Tensor:
        return self.act(self.drop(super().masked(run, x)))


class MaskedDropPath(Masked):
    """Stochastic depth drawn per sample, not per packed cell."""

    drop_prob: float
    scale_by_keep: bool

    def masked(self, run: Run, x: Tensor) -> Tensor:
        if not self.training or not self.drop_prob:
            return x
        share = 1 - self.drop_prob
        keep = x.new_empty(run.batch, 1).bernoulli_(share)
        if share > 0 and self.scale_by_keep:
            keep = keep / share
        return x * run.ops.over_sites(keep, x, run.where)


class MaskedGlobalResponseNorm(Masked):
    """Global response normalisation with the norm over one sample's visible sites (timm
    `GlobalResponseNorm`).
    """

    weight: Tensor
    bias: Tensor
    eps: float
    channel_dim: int

    def masked(self, run: Run, x: Tensor) -> Tensor:
        last = self.channel_dim in (-1, x.ndim - 1)
        y = x.movedim(-1, 1) if last else x
        shape = (1, -1, *(1,) * (y.ndim - 2))
        y = global_response_norm(run, y, self.weight.view(shape), self.bias.view(shape), self.eps)
        return y.movedim(1, -1) if last else y


class MaskedMedNeXtBlock(Masked):
    """MONAI's MedNeXt block, whose optional global response norm is written inside its forward."""

    def masked(self, run: Run, x: Tensor) -> Tensor:
        block: Any = self
        y = block.act(block.conv2(block.norm(block.conv1(x))))
        if block.global_resp_norm:
            y = global_response_norm(run, y, block.global_resp_gamma, block.global_resp_beta, 1e-6)
        y = block.conv3(y)
        y = x + y if block.do_res else y
        return y + block.res_conv(x) if getattr(block, "resample_do_res", False) else y


class MaskedSqueezeExcite(Masked):
    """Squeeze-excite over the visible sites of one sample (timm `SEModule` and its kin)."""

    def masked(self, run: Run, x: Tensor) -> Tensor:
        module: Any = self
        pooled = run.ops.sample_mean(x, run.where)
        if module.add_maxpool:
            pooled = 0.5 * pooled + 0.5 * run.ops.sample_max(x, run.where)
        return self.gated(run, x, pooled)

    def gated(self, run: Run, x: Tensor, pooled: Tensor) -> Tensor:
        """`x` times the gate that the module's own small network makes of `pooled` (b, c)."""
        module: Any = self
        with self.mask_slot.slot.use(None):
            y = pooled.view(*pooled.shape, *(1,) * (x.ndim - 2))
            y = module.fc(y) if hasattr(module, "fc") else self.bottleneck(y)
            y = module.gate(y)
        return x * run.ops.over_sites(y.flatten(1), x, run.where)

    def bottleneck(self, y: Tensor) -> Tensor:
        """Reduce and expand again."""
        module: Any = self
        return module.fc2(module.act(module.bn(module.fc1(y))))


class MaskedEfficientNetSqueezeExcite(MaskedSqueezeExcite):
    """The squeeze-excite of timm's EfficientNet blocks."""

    def masked(self, run: Run, x: Tensor) -> Tensor:
        return self.gated(run, x, run.ops.sample_mean(x, run.where))

    def bottleneck(self, y: Tensor) -> Tensor:
        module: Any = self
        return module.conv_expand(module.act1(module.conv_reduce(y)))


def global_response_norm(run: Run, x: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
    """`x + gamma * x * n + beta`, n the norm of each channel over the mean norm (ConvNeXt V2, alg.
    1).
    """
    norm = run.ops.sample_l2(x, run.where)
    scale = norm / (norm.mean(dim=1, keepdim=True) + eps)
    return x + gamma * (x * run.ops.over_sites(scale, x, run.where)) + beta


BY_NAME: Mapping[str, type[Masked]] = MappingProxyType(
    {
        "timm.layers.conv2d_same.Conv2dSame": MaskedConvSame,
        "timm.layers.norm_act.BatchNormAct2d": MaskedBatchNormAct,
        "timm.layers.norm_act.SyncBatchNormAct": MaskedBatchNormAct,
        "timm.layers.norm.GroupNorm": MaskedGroupNorm,
        "timm.layers.norm.GroupNorm1": MaskedGroupNorm,
        "timm.layers.drop.DropPath": MaskedDropPath,
        "timm.layers.grn.GlobalResponseNorm": MaskedGlobalResponseNorm,
        "timm.layers.squeeze_excite.SEModule": MaskedSqueezeExcite,
        "timm.layers.squeeze_excite.EffectiveSEModule": MaskedSqueezeExcite,
        "spark3d.models.volumetric.SqueezeExcite3d": MaskedSqueezeExcite,
        "timm.models._efficientnet_blocks.SqueezeExcite": MaskedEfficientNetSqueezeExcite,
        "monai.networks.layers.drop_path.DropPath": MaskedDropPath,
        "monai.networks.blocks.mednext_block.MedNeXtBlock": MaskedMedNeXtBlock,
        "monai.networks.blocks.mednext_block.MedNeXtDownBlock": MaskedMedNeXtBlock,
        "dynamic_network_architectures.building_blocks.regularization.DropPath": MaskedDropPath,
    }
)
