"""What a network's stages give, measured by one forward pass on shapes alone (no arithmetic)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spark3d.errors import ConfigError

Shape = tuple[int, ...]


class _Complete(Exception):
    """Ends the probe once the last stage is there."""


PROBE_SIZE = 128  # voxels per axis: a multiple of every usual total stride; costs nothing on "meta"


@dataclass(frozen=True)
class Probe:
    """Channels and strides of every stage, and the state-dict keys that they depend on.

    `depths` says of every key how many stages were there when it was first used: 0 for those of the
    stem and the finest stage.
    """

    channels: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]
    encoder_keys: tuple[str, ...]
    depths: tuple[int, ...]


def probe(
    network: nn.Module, stages: Sequence[str], ndim: int, in_channels: int | None = None
) -> Probe:
    """Run `network` once on shapes only and read its `stages`, fine to coarse.

    The pass happens on torch's "meta" device, in eval mode: parameters and buffers of the network
    are neither copied nor changed. The encoder is everything that runs until the last stage is
    there; of modules registered under several names the first name counts.

    Args:
        network: A dense or sparsified convnet that takes `(b, in_channels, *size)`.
        stages: Dotted names of sub-modules.
        ndim: Number of spatial axes.
        in_channels: Channels of the input; the first convolution's by default.

    Raises:
        ConfigError: A stage does not exist or does not run, its size does not divide the crop, or
            the network takes inputs of one size only.
    """
    maps, inputs, reached = _trace(network, stages, ndim, in_channels)
    lost = [name for name in stages if name not in maps]
    if lost:
        raise ConfigError(f"stages {lost} are never run by {type(network).__name__}")
    depths = {
        f"{prefix}.{name}" if prefix else name: reached[id(module)]
        for prefix, module in network.named_modules()
        if id(module) in inputs
        for name in _own_keys(module)
    }
    strides = tuple(_strides(name, maps[name], ndim) for name in stages)
    return Probe(
        tuple(maps[name][1] for name in stages), strides, tuple(depths), tuple(depths.values())
    )


def probe_input(
    network: nn.Module, name: str, stages: Sequence[str], ndim: int, in_channels: int | None = None
) -> tuple[int, tuple[int, ...]]:
    """Channels and stride of what the sub-module `name` takes, on the way to the last stage.

    Raises:
        ConfigError: It does not exist, does not run before the last stage, or takes no map.
    """
    _check_names(dict(network.named_modules()), [name])
    _, inputs, _ = _trace(network, stages, ndim, in_channels)
    shape = inputs.get(id(network.get_submodule(name)))
    if shape is None:
        raise ConfigError(f"{name} is not run before the stage {stages[-1]}, or takes no map")
    return shape[1], _strides(f"input of {name}", shape, ndim)


def _trace(
    network: nn.Module, stages: Sequence[str], ndim: int, in_channels: int | None
) -> tuple[dict[str, Shape], dict[int, Shape | None], dict[int, int]]:
    """Shapes of the stages; input's shape, and stages there before, of all that ran, by `id`."""
    modules = dict(network.named_modules())
    _check_names(modules, stages)
    channels = in_channels or _first_convolution(network).in_channels
    shape = (1, channels, *(PROBE_SIZE,) * ndim)
    maps: dict[str, Shape] = {}
    inputs: dict[int, Shape | None] = {}
    reached: dict[int, int] = {}

    def enter(module: nn.Module, args: tuple[object, ...]) -> None:
        first = args[0] if args else None
        inputs.setdefault(id(module), tuple(first.shape) if isinstance(first, Tensor) else None)
        reached.setdefault(id(module), len(maps))

    def leave(name: str, output: object) -> None:
        if not isinstance(output, Tensor):
            raise ConfigError(f"stage {name} returns {type(output).__name__}, not one map")
        maps[name] = tuple(output.shape)
        if len(maps) == len(stages):
            raise _Complete

    handles = [module.register_forward_pre_hook(enter) for module in set(modules.values())]
    for name in stages:
        hook = modules[name].register_forward_hook(lambda _m, _i, out, name=name: leave(name, out))
        handles.append(hook)
    blank = _blank(network)
    modes = {module: module.training for module in network.modules()}
    try:
        network.eval()
        dtype = next(network.parameters()).dtype
        with torch.no_grad():
            image = torch.empty(shape, device="meta", dtype=dtype)
            torch.func.functional_call(network, blank, (image,), tie_weights=False)
    except _Complete:
        return maps, inputs, reached
    except ConfigError:
        raise
    except (AssertionError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"{type(network).__name__} cannot take an input of shape {shape}: {error}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes.items():
            module.training = training
    return maps, inputs, reached


def _blank(network: nn.Module) -> dict[str, Tensor]:
    """An empty tensor for each of the network's; modules under several names come once."""
    out: dict[str, Tensor] = {}
    for prefix, module in network.named_modules():
        for name, value in [*module._parameters.items(), *module._buffers.items()]:
            if value is not None:
                key = f"{prefix}.{name}" if prefix else name
                out[key] = torch.empty_like(value, device="meta")
    return out


def _own_keys(module: nn.Module) -> list[str]:
    """Names of the parameters and persistent buffers that belong to `module` itself."""
    local = [name for name, value in module._parameters.items() if value is not None]
    transient = module._non_persistent_buffers_set
    kept = [n for n, b in module._buffers.items() if b is not None and n not in transient]
    return local + kept


def _check_names(modules: dict[str, nn.Module], stages: Sequence[str]) -> None:
    unknown = [name for name in stages if name not in modules]
    if not stages or unknown:
        shallow = [name for name in modules if name and name.count(".") <= 1]
        raise ConfigError(
            f"no stages named {unknown or list(stages)}; sub-modules are {', '.join(shallow)}"
        )


def _strides(name: str, shape: tuple[int, ...], ndim: int) -> tuple[int, ...]:
    size = shape[2:]
    if len(size) != ndim or any(s == 0 or PROBE_SIZE % s for s in size):
        raise ConfigError(
            f"stage {name} gives a map of shape {shape} from {PROBE_SIZE} voxels per axis; "
            f"it must be (batch, channels, {ndim} axes) with sizes that divide {PROBE_SIZE}"
        )
    return tuple(PROBE_SIZE // s for s in size)


def _first_convolution(network: nn.Module) -> nn.Conv1d | nn.Conv2d | nn.Conv3d:
    for module in network.modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            return module
    raise ConfigError(f"{type(network).__name__} has no convolution")
