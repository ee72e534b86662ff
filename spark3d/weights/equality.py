"""Do two networks give the same features? Asked of every conversion before anything is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spark3d.errors import ConfigError
from spark3d.models.backbones import Backbone
from spark3d.models.segmenter import stage_outputs

TOLERANCE = 1e-5
"""Largest difference allowed, in units of a stage's largest feature; computed in float64."""


def features(backbone: Backbone, crops: Tensor) -> tuple[Tensor, ...]:
    """All stages of the dense network in evaluation mode and float64, which it stays in."""
    with torch.no_grad():
        return stage_outputs(backbone.network.double().eval(), backbone.stages, crops.double())


def noise(backbone: Backbone, channels: int | None = None) -> Tensor:
    """A crop of two cells per axis, the same at every call."""
    rng = torch.Generator().manual_seed(0)
    size = (2 * s for s in backbone.stride)
    return torch.randn(1, channels or backbone.in_channels, *size, generator=rng)


def agree(
    claim: str,
    names: Sequence[str],
    wanted: Sequence[Tensor],
    found: Sequence[Tensor],
    tolerance: float = TOLERANCE,
) -> str:
    """Compare stages; the sentence to print where they agree.

    Raises:
        ConfigError: They do not; names the stage and the difference.
    """
    largest = 0.0
    for name, a, b in zip(names, wanted, found, strict=True):
        if a.shape != b.shape:
            raise ConfigError(f"not so: {claim}; {name} is {tuple(a.shape)} and {tuple(b.shape)}")
        difference = float((a - b).abs().max() / a.abs().max().clamp(min=1e-30))
        if not difference <= tolerance:
            raise ConfigError(
                f"not so: {claim}; stage {name} differs by {difference:.1e} of its largest "
                "feature; nothing was written"
            )
        largest = max(largest, difference)
    return f"{claim} (largest difference {largest:.0e} of a stage's largest feature)"


@contextmanager
def replicated_depth(network: nn.Module) -> Iterator[None]:
    """Inside it convolutions continue the first and last slice, where they would see zeros.

    What a volume that is constant along its first axis gives then is what a deep one gives far
    from its ends.
    """
    handles, before = [], []
    for layer in network.modules():
        if isinstance(layer, nn.Conv3d) and isinstance(layer.padding, tuple) and layer.padding[0]:
            before.append((layer, layer.padding))
            handles.append(layer.register_forward_pre_hook(_continue_depth(layer.padding[0])))
            layer.padding = (0, *layer.padding[1:])
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for layer, padding in before:
            layer.padding = padding


def _continue_depth(slices: int) -> Callable[[nn.Module, tuple[Tensor, ...]], Tensor]:
    sides = (0, 0, 0, 0, slices, slices)
    return lambda _layer, args: F.pad(args[0], sides, mode="replicate")
