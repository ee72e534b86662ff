"""Which options a network may have that takes encoder weights: the encoder must stay what it was.

Strides, activations or groups change what an encoder computes without changing a shape, so weights
load into such a network in full and mean something else there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from spark3d.errors import ConfigError
from spark3d.models.backbones import build_backbone
from spark3d.weights.passport import Passport

DECODER = frozenset({
    "out_channels", "blocks_up", "upsample_mode", "use_conv_final", "upsample_kernel_size",
    "trans_bias", "decoder_expansion_ratio", "n_conv_per_stage_decoder", "deep_supervision",
    "deep_supr_num", "num_classes", "feed_forward", "global_pool",
})  # fmt: skip
"""Options of what stands behind the encoder."""
TRAINING = frozenset({
    "dropout", "dropout_prob", "dropout_op", "dropout_op_kwargs", "drop_rate", "drop_path_rate",
    "drop_block_rate",
})  # fmt: skip
"""Options that do nothing at inference."""


def merged_options(passport: Passport, given: Mapping[str, Any]) -> dict[str, Any]:
    """Options of the passport's network, with those given for the one that takes the weights.

    Networks are built only if a given value differs and concerns the encoder; where the values mean
    the same, such as the network's own default, both networks are alike.

    Raises:
        ConfigError: They make another encoder of it; names the options and both values.
    """
    known = passport.options
    other = {
        key: value
        for key, value in given.items()
        if key not in DECODER | TRAINING
        and not (key in known and _plain(value) == _plain(known[key]))
    }
    if other and _layers(passport, {**known, **other}) != _layers(passport, known):
        asked = ", ".join(f"model.options.{key}={value}" for key, value in other.items())
        before = ", ".join(
            f"{key}={known[key]}" if key in known else f"the default {key}" for key in other
        )
        raise ConfigError(
            f"{asked}: the encoder was pre-trained with {before}; leave that out of model.options, "
            "or give weights of such a network"
        )
    return {**known, **given}


def _plain(value: Any) -> str:
    """The value as JSON, where lists and tuples are one."""
    return json.dumps(value, sort_keys=True, default=str)


def _layers(passport: Passport, options: Mapping[str, Any]) -> tuple[object, ...]:
    """Every layer of the passport's network with its settings, as torch prints them.

    Strides and channels of the stages come along: a network may leave out a layer that it has.
    """
    net = build_backbone(passport.backbone, passport.ndim, passport.in_channels, **options)
    return str(net.network), net.strides, net.channels
