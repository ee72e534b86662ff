"""MONAI's own networks as a class and literal arguments, for configurations that others read."""

from collections.abc import Mapping
from typing import Any

from monai.bundle.config_parser import ConfigParser
from torch import nn

from spark3d.errors import ConfigError
from spark3d.models.backbones import MEDNEXT_EXPANSION, mednext_arguments


def literal_definition(
    name: str, ndim: int, in_channels: int, out_channels: int, options: Mapping[str, Any]
) -> dict[str, Any]:
    """`{"_target_": class, argument: value}` that builds the same network with MONAI alone.

    The arguments are those of `spark3d.models.backbones`, tuples as lists.

    Raises:
        ConfigError: MONAI has no such segmentation network.
    """
    common = {"spatial_dims": ndim, "in_channels": in_channels, "out_channels": out_channels}
    given = {k: v for k, v in options.items() if k not in ("out_channels", "stages")}
    if name == "monai/segresnet":
        down = given.get("blocks_down", [1, 2, 2, 4])
        usual: dict[str, Any] = {"blocks_up": [1] * (len(down) - 1)}
        target = "SegResNet"
    elif name == "monai/dynunet":
        strides = given.get("strides", [1, 2, 2, 2, 2])
        usual = {
            "strides": strides,
            "kernel_size": [3] * len(strides),
            "upsample_kernel_size": strides[1:],
        }
        target = "DynUNet"
    elif name in MEDNEXT_EXPANSION:
        usual = mednext_arguments(name)
        target = "MedNeXt"
    else:
        raise ConfigError(
            f"{name} with its decoder is no network of MONAI alone, so a bundle cannot describe "
            "it; use --to exported or --to onnx"
        )
    arguments = {**common, **usual, **given}
    return {"_target_": f"monai.networks.nets.{target}", **_lists(arguments)}


def build_literal(definition: Mapping[str, Any]) -> nn.Module:
    """The network of a definition, built by MONAI's own reader of configurations."""
    return ConfigParser({"network_def": dict(definition)}).get_parsed_content("network_def")


def _lists(value: Any) -> Any:
    """The value with lists in place of tuples, as JSON has it."""
    if isinstance(value, Mapping):
        return {key: _lists(inner) for key, inner in value.items()}
    return [_lists(inner) for inner in value] if isinstance(value, list | tuple) else value
