"""Classifiers: timm's own networks with their heads, and how deep each parameter lies."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from spark3d.errors import ConfigError
from spark3d.models.backbones import Backbone, build_backbone

COLOURS = 3


def build_classifier(
    name: str, classes: int, options: Mapping[str, Any], drop_path: float | None = None
) -> Backbone:
    """A timm network for colour images: `(b, 3, rows, columns)` to logits `(b, classes)`.

    The network keeps timm's keys, head included, so `timm.create_model(NAME, num_classes=classes)`
    loads its state dict strictly.

    Args:
        name: `timm/NAME`.
        classes: Outputs of the head.
        options: Further arguments of `timm.create_model`, such as those of a passport.
        drop_path: Largest drop path rate; None leaves that of `options`.

    Raises:
        ConfigError: Not of timm, or options that the network does not take.
    """
    if not name.startswith("timm/"):
        raise ConfigError(
            f"classification needs a network of timm, which brings its head; {name} is none: "
            "pre-train with model.backbone=timm/NAME"
        )
    given = {**options, "num_classes": classes}
    if drop_path is not None:
        given["drop_path_rate"] = drop_path
    return build_backbone(name, 2, COLOURS, **given)


def layer_numbers(backbone: Backbone, blocks: Sequence[int] | int = 1) -> dict[str, int]:
    """The layer of every parameter, for learning rates that fall with depth.

    Layer 0 is what comes before the first stage; every stage is cut into layers of `blocks`
    consecutive blocks; what lies between two stages goes with the first layer of the second; the
    last layer is what comes after the last stage, such as the head.
    ConvNeXt-S with 3 has the twelve inner layers of its authors, ResNet-50 with (3, 2, 3, 3) the
    six of official SparK.

    Args:
        backbone: With stages that are sequences of numbered blocks.
        blocks: Blocks a layer, one number or one for each stage.

    Raises:
        ConfigError: Another number of stages.
    """
    stages = backbone.stages
    per_stage = (blocks,) * len(stages) if isinstance(blocks, int) else tuple(blocks)
    if len(per_stage) != len(stages) or min(per_stage) < 1:
        raise ConfigError(
            f"optim.layer_blocks={list(per_stage)}: give one positive number, or one for each of "
            f"the {len(stages)} stages of {backbone.name}"
        )
    ahead = dict(zip(backbone.encoder_keys, backbone.depths, strict=True))
    names = [name for name, _ in backbone.network.named_parameters()]
    places = {name: _place(name, stages) for name in names}
    first, following = [], 1
    for stage, size in enumerate(per_stage):
        numbers = (place[1] for place in places.values() if place and place[0] == stage)
        deepest = max(numbers, default=0)
        first.append(following)
        following += deepest // size + 1
    between = {name: first[stage] if stage else 0 for name, stage in ahead.items()}
    return {
        name: first[place[0]] + place[1] // per_stage[place[0]]
        if (place := places[name])
        else between.get(name, following)
        for name in names
    }


def _place(name: str, stages: Sequence[str]) -> tuple[int, int] | None:
    """Stage and block of a parameter; down-sampling before the first block belongs to it.

    Blocks count from 0, but those of RegNets, `b1` and so on, from 1.
    """
    for stage, prefix in enumerate(stages):
        if name.startswith(f"{prefix}."):
            inside = name[len(prefix) + 1 :]
            if block := re.match(r"b(\d+)\.", inside):
                return stage, int(block.group(1)) - 1
            block = re.match(r"(?:blocks\.)?(\d+)\.", inside)
            return stage, int(block.group(1)) if block else 0
    return None
