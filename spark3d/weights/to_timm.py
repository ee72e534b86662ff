"""Encoder weights as a file that timm's `create_model` loads strictly."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from spark3d.errors import ConfigError
from spark3d.models.segmenter import stage_outputs
from spark3d.models.timm_files import create_from, timm_arguments
from spark3d.weights.convert import KeyReport, rebuilt
from spark3d.weights.equality import agree, features, noise
from spark3d.weights.exchange import load_into, whole_file
from spark3d.weights.passport import Passport


def export_timm(
    state: Mapping[str, Tensor], passport: Passport, target: Path
) -> tuple[dict[str, Any], KeyReport, str]:
    """Write `target` (`.safetensors`) after timm has loaded it and given the same features.

    Args:
        state: Encoder weights under dense keys.
        passport: Of these weights.
        target: The file to write.

    Returns:
        Arguments of `timm.create_model` beside `checkpoint_path`, what became of the keys, and what
        was compared.

    Raises:
        ConfigError: Not a 2D network of timm, or its features differ.
    """
    if not passport.backbone.startswith("timm/") or passport.ndim != 2:
        raise ConfigError(
            f"timm has 2D networks, this encoder is {passport.backbone} in {passport.ndim}D; "
            "encoder.safetensors holds its weights under the library's own keys"
        )
    arguments = timm_arguments(passport.backbone, passport.in_channels, passport.options)
    ours = rebuilt(passport)
    loaded = load_into(ours.network, state, 1.0)
    whole = {k: v.detach().clone().contiguous() for k, v in ours.network.state_dict().items()}
    missing = tuple(key for key in whole if key not in loaded.matched)
    target.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(target) as part:
        file = part.with_name(f"{part.name}.safetensors")  # timm reads formats off the ending
        try:
            save_file(whole, file, metadata={"format": "pt"})
            theirs = create_from(file, arguments).double().eval()
            crops = noise(ours).double()
            with torch.no_grad():
                found = stage_outputs(theirs, ours.stages, crops)
            claim = "timm loads the file strictly and gives the encoder's features"
            equality = agree(claim, ours.stages, features(ours, crops), found, tolerance=0.0)
            file.replace(part)
        finally:
            file.unlink(missing_ok=True)
    return arguments, KeyReport(loaded.matched, (), missing), equality
