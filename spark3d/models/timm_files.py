"""Encoders for timm: by which arguments its own `create_model` builds and loads them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from torch import nn

from spark3d.errors import ConfigError


def timm_arguments(
    name: str, ndim: int, in_channels: int, options: Mapping[str, Any]
) -> dict[str, Any]:
    """Arguments by which `timm.create_model` builds the network of an encoder, without classifier.

    Raises:
        ConfigError: It is not one of timm's, or 3D.
    """
    if not name.startswith("timm/") or ndim != 2:
        raise ConfigError(
            f"timm has 2D networks, this encoder is {name} in {ndim}D; encoder.safetensors holds "
            "its weights under the library's own keys"
        )
    given = {key: value for key, value in options.items() if key != "stages"}
    model = name.removeprefix("timm/")
    return {"model_name": model, "num_classes": 0, "in_chans": in_channels, **given}


def create_from(file: Path, arguments: Mapping[str, Any]) -> nn.Module:
    """The network that timm builds and loads, strictly, from `file`."""
    return timm.create_model(**arguments, checkpoint_path=str(file))
