"""Options beside encoder weights: what changes the encoder is refused, whatever its shapes."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spark3d.errors import ConfigError
from spark3d.models.backbones import build_backbone
from spark3d.weights.options import merged_options
from spark3d.weights.passport import Passport

SEGRESNET = {"init_filters": 8, "blocks_down": [1, 1, 1], "blocks_up": [1, 1]}
DYNUNET = {"filters": [2, 4, 4], "strides": [1, 2, 2], "kernel_size": [3, 3, 3]}
RESNET = {"channels": [8, 8, 16, 16], "drop_path_rate": 0.05}


def passport(name: str, options: dict[str, Any], ndim: int = 2) -> Passport:
    return Passport(name, ndim, 1, options)


@pytest.mark.parametrize(
    ("name", "known", "given", "said"),
    [
        ("monai/segresnet", SEGRESNET, {"act": "leakyrelu"}, "act=leakyrelu: .* the default act"),
        ("monai/segresnet", SEGRESNET, {"num_groups": 4, "norm": ["GROUP", {"num_groups": 4}]}, ""),
        ("monai/segresnet", SEGRESNET, {"init_filters": 16}, "init_filters=16: .*init_filters=8"),
        ("monai/dynunet", DYNUNET, {"strides": [2, 2, 2]}, r"\[2, 2, 2\]: .* strides=\[1, 2, 2\]"),
        ("timm/resnet10t", RESNET, {"replace_stem_pool": True}, "the default replace_stem_pool"),
        ("monai/resnet10", {"widen_factor": 0.125}, {"conv1_t_stride": 1}, "conv1_t_stride=1"),
        ("monai/resnet10", {"widen_factor": 0.125}, {"no_max_pool": True}, "no_max_pool=True"),
    ],
)
def test_another_encoder_is_refused_by_option(
    name: str, known: dict[str, Any], given: dict[str, Any], said: str
) -> None:
    """Some of these change no shape, so the weights would load in full."""
    with pytest.raises(ConfigError, match=f"{said}.*leave that out") as caught:
        merged_options(passport(name, known), given)
    assert "\n" not in str(caught.value)
    assert all(f"model.options.{key}=" in str(caught.value) for key in given)


@pytest.mark.parametrize(
    ("name", "known", "given"),
    [
        ("monai/segresnet", SEGRESNET, {"dropout_prob": 0.2, "upsample_mode": "deconv"}),
        ("monai/segresnet", SEGRESNET, {"num_groups": 8, "norm": ["GROUP", {"num_groups": 8}]}),
        ("monai/dynunet", DYNUNET, {"deep_supervision": True, "deep_supr_num": 1}),
        ("monai/dynunet", DYNUNET, {"kernel_size": [[3, 3], 3, 3], "res_block": False}),
        ("monai/dynunet", {"filters": [2] * 5}, {"strides": (1, 2, 2, 2, 2)}),
        ("timm/resnet10t", RESNET, {"drop_path_rate": 0.2, "output_stride": 32}),
    ],
)
def test_what_leaves_the_encoder_alone_joins_what_the_passport_says(
    name: str, known: dict[str, Any], given: dict[str, Any]
) -> None:
    """Decoders, rates of dropping, and values that the network has anyway."""
    found = merged_options(passport(name, known), given)
    assert found == {**known, **given}
    build_backbone(name, 2, 1, **found)


@given(st.sets(st.sampled_from(sorted(SEGRESNET))), st.booleans())
def test_the_passports_own_values_may_be_given_again(keys: set[str], as_tuples: bool) -> None:
    again = {key: SEGRESNET[key] for key in keys}
    if as_tuples:
        again = {k: tuple(v) if isinstance(v, list) else v for k, v in again.items()}
    assert merged_options(passport("monai/segresnet", SEGRESNET, 3), again) == SEGRESNET | again
