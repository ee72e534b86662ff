"""Make a network mask-aware in place, and undo it, by changing nothing but the class of its layers.

Parameters, buffers, shared modules, hooks and `state_dict` keys stay as they are: a checkpoint
loads strictly into the dense twin and back.
"""

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint as activation_checkpoint

from spark3d.sparse.composites import BY_NAME
from spark3d.sparse.layers import (
    Masked,
    MaskedAvgPool,
    MaskedBatchNorm,
    MaskedChannelDropout,
    MaskedConv,
    MaskedGlobalMaxPool,
    MaskedGlobalPool,
    MaskedGroupNorm,
    MaskedInstanceNorm,
    MaskedMaxPool,
    Unsupported,
    combine,
)
from spark3d.sparse.slot import LayerSlot, MaskSlot

MASKED: Mapping[type[nn.Module], type[Masked]] = MappingProxyType(
    {
        **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), MaskedConv),
        **dict.fromkeys((nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d), MaskedMaxPool),
        **dict.fromkeys((nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d), MaskedAvgPool),
        **dict.fromkeys(
            (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d), MaskedGlobalPool
        ),
        **dict.fromkeys(
            (nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d), MaskedGlobalMaxPool
        ),
        **dict.fromkeys(
            (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm), MaskedBatchNorm
        ),
        **dict.fromkeys(
            (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d), MaskedInstanceNorm
        ),
        nn.GroupNorm: MaskedGroupNorm,
        **dict.fromkeys((nn.Dropout1d, nn.Dropout2d, nn.Dropout3d), MaskedChannelDropout),
    }
)
"""What makes each torch layer mask-aware; a layer must be of exactly this class."""

LAYER_NORMS = (
    "torch.nn.modules.normalization.LayerNorm",
    "torch.nn.modules.normalization.RMSNorm",
    "timm.layers.norm.LayerNorm",
    "timm.layers.norm.LayerNormFp32",
    "timm.layers.norm.LayerNorm2d",
    "timm.layers.norm.LayerNorm2dFp32",
    "timm.layers.norm.LayerNormExp2d",
)

# fmt: off
TORCH_ACTIVATIONS = (
    "CELU", "ELU", "GELU", "Hardshrink", "Hardsigmoid", "Hardswish", "Hardtanh", "LeakyReLU",
    "LogSigmoid", "Mish", "PReLU", "ReLU", "ReLU6", "RReLU", "SELU", "SiLU", "Sigmoid",
    "Softplus", "Softshrink", "Softsign", "Tanh", "Tanhshrink", "Threshold"
)
# fmt: on

# fmt: off
TIMM_ACTIVATIONS = (
    "Swish", "Mish", "Sigmoid", "Tanh", "HardSwish", "HardSigmoid", "HardMish", "PReLU", "GELU",
    "GELUTanh", "QuickGELU"
)
# fmt: on

POINTWISE: frozenset[str] = frozenset(
    [f"torch.nn.modules.activation.{name}" for name in TORCH_ACTIVATIONS]
    + [f"timm.layers.activations.{name}" for name in TIMM_ACTIVATIONS]
    + [
        "torch.nn.modules.linear.Identity",
        "torch.nn.modules.linear.Linear",
        "torch.nn.modules.dropout.Dropout",
        "torch.nn.modules.dropout.AlphaDropout",
        "timm.layers.linear.Linear",
        "timm.layers.norm.RmsNorm",
        "timm.layers.norm.RmsNorm2d",
        "timm.layers.layer_scale.LayerScale",
        "timm.layers.layer_scale.LayerScale2d",
        "monai.networks.blocks.activation.Swish",
        "monai.networks.blocks.activation.MemoryEfficientSwish",
        "monai.networks.blocks.activation.Mish",
    ]
)
"""Layers that work on each site alone, by qualified name: the dense layer is exact, so it is left
as it is.
"""

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


def sparsify(network: nn.Module, slot: MaskSlot, checkpoint: Iterable[str] = ()) -> None:
    """Make every layer of `network` mask-aware, in place.

    Layers without a masked meaning stay usable densely and refuse by name once a masked forward
    reaches them, so a decoder or a head that never runs on hidden cells may hold any layer.

    Args:
        network: any network of torch, timm or MONAI layers, or of registered ones.
        slot: where the layers will look for the mask.
        checkpoint: names of submodules whose activations are recomputed in backward.

    Raises:
        ValueError: `network` is mask-aware already, or `checkpoint` names no submodule.
    """
    modules = dict(network.named_modules())
    for name, layer in modules.items():
        if isinstance(layer, Masked):
            raise ValueError(
                f"layer {name!r} is mask-aware already; call restore_dense(network) first"
            )
    unknown = [name for name in checkpoint if name not in modules]
    if unknown:
        raise ValueError(f"checkpoint names {unknown}, but the network has no such submodules")
    reasons: dict[str, str] = {}
    for name, layer in modules.items():
        mixin, reasons[name] = _meaning(layer)
        if mixin is not None:
            _become(layer, mixin, LayerSlot(slot, name, reasons[name]))
    for name in dict.fromkeys(checkpoint):
        _become(modules[name], Checkpointed, LayerSlot(slot, name, reasons[name]))


def restore_dense(network: nn.Module) -> None:
    """Undo `sparsify`: every layer has its own class again and nothing else is left behind."""
    for layer in network.modules():
        while isinstance(layer, Masked):
            layer.__class__ = layer.dense_class  # pyright: ignore[reportAttributeAccessIssue]
            layer.__dict__.pop("mask_slot", None)


def register_masked(dense_class: type[nn.Module], masked_class: type[Masked]) -> None:
    """Teach the core a layer: `masked_class` says what `dense_class` does in a masked forward.

    The knowledge is kept on `dense_class` itself, and holds for exactly that class, not for classes
    derived from it.

    Args:
        dense_class: the layer as networks use it.
        masked_class: derived from `layers.Masked`, with `masked(self, run, x)` written in terms of
            `run.ops`; it is put in front of `dense_class`, so `self` has the attributes of the
            dense layer.

    Raises:
        TypeError: `masked_class` does not derive from `Masked`, or does not say what it does.
    """
    if not issubclass(masked_class, Masked) or masked_class.masked is Masked.masked:
        raise TypeError(
            f"{masked_class.__name__} must derive from spark3d.sparse.layers.Masked and say what "
            "it does in `masked`"
        )
    dense_class.__masked_class__ = masked_class  # pyright: ignore[reportAttributeAccessIssue]


class Checkpointed(Masked):
    """A submodule whose activations are recomputed in backward, under its forward's mask.

    Its `dense_class` is the class it had before, which may itself be mask-aware.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        slot, run = self.mask_slot.slot, self.mask_slot.slot.run
        inner: Any = self.dense_class.forward

        def compute(*inputs: Any, **options: Any) -> Any:
            with slot.use(run):
                return inner(self, *inputs, **options)

        return activation_checkpoint(compute, *args, use_reentrant=False, **kwargs)


def _become(layer: nn.Module, mixin: type[Masked], slot: LayerSlot) -> None:
    layer.__class__ = combine(mixin, type(layer))
    layer.mask_slot = slot  # pyright: ignore[reportArgumentType]


def _meaning(layer: nn.Module) -> tuple[type[Masked] | None, str]:
    """What makes `layer` mask-aware (None: nothing is needed), and why it must be refused, if it
    must.
    """
    kind = type(layer)
    name = f"{kind.__module__}.{kind.__qualname__}"
    mixin = kind.__dict__.get("__masked_class__") or MASKED.get(kind) or BY_NAME.get(name)
    if mixin is not None:
        reason = mixin.check(layer)
        remedy = (
            f"build it without, or register a class derived from {kind.__name__} (docs/core.md)"
        )
        return (Unsupported, f"{reason}; {remedy}") if reason else (mixin, "")
    if name in POINTWISE or kind in CONTAINERS:
        return None, ""
    if name in LAYER_NORMS:
        shape = tuple(layer.normalized_shape)  # pyright: ignore[reportArgumentType]
        if len(shape) == 1:
            return None, ""
        return (
            Unsupported,
            f"{kind.__name__} over normalized_shape={shape} mixes sites; normalise over channels",
        )
    composed = next(layer.children(), None) is not None and not kind.__module__.startswith(
        "torch.nn."
    )
    if composed and not isinstance(layer, (*MASKED, nn.LayerNorm)):
        return None, ""
    return Unsupported, (
        "its meaning on hidden cells is not defined; call spark3d.sparse.register_masked("
        f"{kind.__name__}, Pointwise) if it works on each site alone, else register a class "
        "derived from Masked that says what it does (docs/core.md)"
    )
