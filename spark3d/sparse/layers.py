"""Mask-aware layers: a mixin for each kind of layer, over both backends.

A mixin is put in front of the dense class by `convert.sparsify`. Outside a masked forward the layer
is the dense layer, unchanged. Inside one, `masked` says what it does, in terms of the operations
that each backend offers.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

from torch import Tensor, nn

from spark3d.sparse import rows
from spark3d.sparse.geometry import GeometryError, Padding
from spark3d.sparse.slot import LayerSlot, Run


class Masked(nn.Module):
    """Base of every mask-aware layer: dense unless the encoder's slot holds a masked forward.

    To teach the core a layer of your own, derive from this class, write `masked`, and call
    `convert.register_masked(YourLayer, YourMaskedLayer)` once; a layer that works on each site
    alone is registered with `Pointwise`.
    """

    dense_class: type[nn.Module]
    mask_slot: LayerSlot

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        slot = self.mask_slot.slot
        run = slot.run
        if run is None:
            if not slot.told:
                _refuse_recomputation(self.mask_slot.name)
            return self.dense_forward(*args, **kwargs)
        try:
            return self.masked(run, *args, **kwargs)
        except GeometryError as error:
            raise ValueError(f"layer {self.mask_slot.name!r}: {error}") from error

    def masked(self, run: Run, x: Tensor) -> Tensor:
        """The layer during a masked forward; `x` is `(n, c, *sites)`, with n what the backend
        stacks there.
        """
        raise NotImplementedError

    def dense_forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the layer does where nothing is hidden: its own forward from before conversion."""
        return super().forward(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]

    @classmethod
    def check(cls, layer: nn.Module) -> str:
        """Why this `layer` has no masked meaning because of an option it was built with; empty if
        it has one.
        """
        del layer
        return ""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        mixin = type(self).__mro__[1]
        return _blank, (mixin, self.dense_class), self.__getstate__()


@cache
def combine(mixin: type[Masked], dense: type[nn.Module]) -> type[Masked]:
    """The class of a `dense` layer made mask-aware by `mixin`."""
    bases = (mixin,) if issubclass(mixin, dense) else (mixin, dense)
    return type(f"{mixin.__name__}_{dense.__name__}", bases, {"dense_class": dense})


def _blank(mixin: type[Masked], dense: type[nn.Module]) -> Masked:
    """An empty layer of the combined class, for copying and pickling."""
    kind = combine(mixin, dense)
    return kind.__new__(kind)


def _refuse_recomputation(name: str) -> None:
    """A recomputation inside backward has lost the mask of its forward: never run it densely."""
    if rows.recomputing():
        raise RuntimeError(
            f"layer {name!r} is recomputed during backward, outside the forward that set its mask: "
            "switch off the network's own activation checkpointing and name the modules in "
            "SparseEncoder(checkpoint=...), or call restore_dense first to train densely"
        )


class Pointwise(Masked):
    """A layer that works on each site alone, so that the dense layer is exact (an activation)."""

    def masked(self, run: Run, *args: Any, **kwargs: Any) -> Any:
        del run
        return self.dense_forward(*args, **kwargs)


class Unsupported(Masked):
    """A layer without a masked meaning: usable densely, refused by name in a masked forward."""

    def masked(self, run: Run, *args: Any, **kwargs: Any) -> Tensor:
        _, name, reason = self.mask_slot
        kinds = type(self).__mro__
        dense = kinds[kinds.index(Masked) + 1]
        raise TypeError(
            f"layer {name!r} ({dense.__module__}.{dense.__qualname__}) cannot be masked: {reason}"
        )


class MaskedConv(Masked):
    """Convolution of any kernel, stride, dilation and groups, with zero padding."""

    weight: Tensor
    bias: Tensor | None
    stride: tuple[int, ...]
    padding: str | tuple[int, ...]
    dilation: tuple[int, ...]
    kernel_size: tuple[int, ...]
    groups: int

    @classmethod
    def check(cls, layer: Any) -> str:
        if layer.padding_mode == "zeros":
            return ""
        return f"padding_mode={layer.padding_mode!r} has no masked meaning; use 'zeros'"

    def masked(self, run: Run, x: Tensor) -> Tensor:
        padding = self.padding_of(run.ops.dense_size(x, run.where))
        return run.ops.conv(
            x, run.where, self.weight, self.bias, self.stride, padding, self.dilation, self.groups
        )

    def padding_of(self, size: Sequence[int]) -> Padding:
        """Zeros before and after each axis of a map of `size` sites."""
        del size
        if isinstance(self.padding, str):
            if self.padding == "valid":
                return ((0, 0),) * len(self.kernel_size)
            total = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
            return tuple((n // 2, n - n // 2) for n in total)
        return tuple((n, n) for n in self.padding)


class MaskedConvSame(MaskedConv):
    """TensorFlow's SAME padding, which depends on the size of the map (timm `Conv2dSame`)."""

    def padding_of(self, size: Sequence[int]) -> Padding:
        out = []
        for n, k, s, d in zip(size, self.kernel_size, self.stride, self.dilation, strict=True):
            total = max((-(-n // s) - 1) * s + (k - 1) * d + 1 - n, 0)
            out.append((total // 2, total - total // 2))
        return tuple(out)


class MaskedMaxPool(Masked):
    """Max pooling in which hidden sites are absent."""

    kernel_size: int | tuple[int, ...]
    stride: int | tuple[int, ...]
    padding: int | tuple[int, ...]
    dilation: int | tuple[int, ...]
    ceil_mode: bool

    @classmethod
    def check(cls, layer: Any) -> str:
        return (
            "return_indices=True means other sites on a packed map" if layer.return_indices else ""
        )

    def masked(self, run: Run, x: Tensor) -> Tensor:
        ndim = x.ndim - 2
        stride = per_axis(self.stride, ndim)
        extra = [s - 1 if self.ceil_mode else 0 for s in stride]
        padding = tuple(
            (p, p + e) for p, e in zip(per_axis(self.padding, ndim), extra, strict=True)
        )
        return run.ops.max_pool(
            x,
            run.where,
            per_axis(self.kernel_size, ndim),
            stride,
            padding,
            per_axis(self.dilation, ndim),
        )


class MaskedAvgPool(Masked):
    """Average pooling in which hidden sites count as zeros."""

    kernel_size: int | tuple[int, ...]
    stride: int | tuple[int, ...]
    padding: int | tuple[int, ...]
    ceil_mode: bool
    count_include_pad: bool

    @classmethod
    def check(cls, layer: Any) -> str:
        given = getattr(layer, "divisor_override", None) is not None
        return "divisor_override has no meaning where sites are hidden" if given else ""

    def masked(self, run: Run, x: Tensor) -> Tensor:
        ndim = x.ndim - 2
        return run.ops.avg_pool(
            x,
            run.where,
            per_axis(self.kernel_size, ndim),
            per_axis(self.stride, ndim),
            per_axis(self.padding, ndim),
            self.ceil_mode,
            self.count_include_pad,
        )


class MaskedGlobalPool(Masked):
    """Adaptive pooling to one site: the mean or maximum over the visible sites of one sample."""

    @classmethod
    def check(cls, layer: Any) -> str:
        size = layer.output_size
        if set(size if isinstance(size, tuple | list) else (size,)) == {1}:
            return ""
        return f"adaptive pooling to {size} sites has no meaning where sites are hidden, only to 1"

    def masked(self, run: Run, x: Tensor) -> Tensor:
        return run.ops.over_sites(run.ops.sample_mean(x, run.where), x, run.where)


class MaskedGlobalMaxPool(MaskedGlobalPool):
    """Adaptive max pooling to one site."""

    @classmethod
    def check(cls, layer: Any) -> str:
        return super().check(layer) or ("return_indices=True" if layer.return_indices else "")

    def masked(self, run: Run, x: Tensor) -> Tensor:
        return run.ops.over_sites(run.ops.sample_max(x, run.where), x, run.where)


class MaskedBatchNorm(Masked):
    """BatchNorm and SyncBatchNorm with statistics over the visible sites of the batch (of all
    processes).
    """

    def masked(self, run: Run, x: Tensor) -> Tensor:
        return run.ops.row_norm(x, run.where, lambda table: rows.batch_norm(self, table))  # pyright: ignore[reportArgumentType]


class MaskedGroupNorm(Masked):
    """GroupNorm with statistics over the visible sites of one sample."""

    num_groups: int
    weight: Tensor | None
    bias: Tensor | None
    eps: float

    def masked(self, run: Run, x: Tensor) -> Tensor:
        return run.ops.group_norm(x, run.where, self.num_groups, self.weight, self.bias, self.eps)


class MaskedInstanceNorm(Masked):
    """InstanceNorm with statistics over the visible sites of one sample."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float

    @classmethod
    def check(cls, layer: Any) -> str:
        return "track_running_stats=True is not defined for it" if layer.track_running_stats else ""

    def masked(self, run: Run, x: Tensor) -> Tensor:
        return run.ops.group_norm(x, run.where, x.shape[1], self.weight, self.bias, self.eps)


class MaskedChannelDropout(Masked):
    """Dropout1d/2d/3d: whole channels of a sample, not of a packed cell."""

    p: float

    def masked(self, run: Run, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        keep = x.new_empty(run.batch, x.shape[1]).bernoulli_(1 - self.p)
        return x * run.ops.over_sites(keep / max(1 - self.p, 1e-12), x, run.where)


def per_axis(value: int | Sequence[int], ndim: int) -> tuple[int, ...]:
    """One number for every axis."""
    return (value,) * ndim if isinstance(value, int) else tuple(value)
