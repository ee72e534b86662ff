"""Encoders for timm: by which arguments its own `create_model` builds and loads them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from torch import nn


def timm_arguments(name: str, in_channels: int, options: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by which `timm.create_model` builds the network of `name`, without classifier."""
    given = {key: value for key, value in options.items() if key != "stages"}
    model = name.removeprefix("timm/")
    return {"model_name": model, "num_classes": 0, "in_chans": in_channels, **given}


def create_from(file: Path, arguments: Mapping[str, Any]) -> nn.Module:
    """The network that timm builds and loads, strictly, from `file`."""
    return timm.create_model(**arguments, checkpoint_path=str(file))
