"""An encoder as a checkpoint that nnU-Net's fine-tuning reads: weights and adaptation plan.

The format is that of nnssl (Wald et al., 2024): `network_weights` under the keys of the residual
encoder U-Net, and `nnssl_adaptation_plan`, which says where encoder and stem are among them. It is
plain data, read with `weights_only=True`.

nnU-Net's arrays run in the order (z, y, x) of a file, ours from right, anterior and superior, so
kernels, spacing and crop are written with their axes reversed. On files in RAS+ order the encoder
then sees what it saw in pre-training; nnU-Net does not turn files of other orders.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spark3d.errors import ConfigError
from spark3d.weights.passport import Passport

FILE = "checkpoint_final.pth"
RESENC_L: Mapping[str, Any] = {
    "features": [32, 64, 128, 256, 320, 320],
    "strides": [1, 2, 2, 2, 2, 2],
    "blocks": [1, 3, 4, 6, 6, 6],
    "kernel_size": 3,
}
CONFIGURATION = "spark3d"


def write_nnunet(state: Mapping[str, Tensor], passport: Passport, folder: Path) -> None:
    """Write `checkpoint_final.pth`.

    Raises:
        ConfigError: another network than the residual encoder, or one that is not ResEnc-L.
    """
    plan = adaptation_plan(passport)
    weights = {key: value.detach().cpu() for key, value in reversed_axes(state).items()}
    torch.save({"network_weights": weights, "nnssl_adaptation_plan": plan}, folder / FILE)


def reversed_axes(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of weights for maps whose axes run in the opposite order; its own inverse.

    A convolution's weights are `(c_out, c_in, *kernel)`; nothing else of the encoder has axes.
    """
    return {
        key: value.permute(0, 1, *range(value.ndim - 1, 1, -1)).contiguous().clone()
        if value.ndim > 2
        else value.clone()
        for key, value in state.items()
    }


def adaptation_plan(passport: Passport) -> dict[str, Any]:
    """Where the encoder is among the weights, and how it was pre-trained."""
    if passport.backbone != "nnunet/resenc" or passport.ndim != 3:
        raise ConfigError(
            f"nnU-Net's fine-tuning reads the residual encoder in 3D; these weights are "
            f"{passport.backbone} in {passport.ndim}D: pre-train with model.backbone=nnunet/resenc"
        )
    options = dict(passport.options)
    different = [k for k, v in RESENC_L.items() if _plain(options.get(k, v)) != v]
    if different:
        raise ConfigError(
            f"nnU-Net knows the residual encoder as ResEnc-L, these weights differ in "
            f"{', '.join(different)}; pre-train without model.options"
        )
    crop = list(_crop(passport))[::-1]
    spacing = list(passport.spacing_mm or ())[::-1]
    zscore = passport.intensity.get("mode") == "zscore"
    configuration = {
        "data_identifier": CONFIGURATION,
        "preprocessor_name": "spark3d",
        "spacing": spacing,
        "spacing_style": CONFIGURATION,
        "normalization_schemes": ["ZScoreNormalization" if zscore else "CTNormalization"]
        * passport.in_channels,
        "use_mask_for_norm": [False] * passport.in_channels,
        "patch_size": crop,
        "batch_size": int(passport.recipe["optim"]["batch"]),
    }
    return {
        "architecture_plans": {
            "arch_class_name": "ResEncL",
            "arch_kwargs": None,
            "arch_kwargs_requiring_import": None,
        },
        "pretrain_plan": {
            "dataset_name": "spark3d",
            "plans_name": CONFIGURATION,
            "original_median_spacing_after_transp": spacing,
            "configurations": {CONFIGURATION: configuration},
        },
        "pretrain_num_input_channels": passport.in_channels,
        "recommended_downstream_patchsize": crop,
        "key_to_encoder": "encoder.stages",
        "key_to_stem": "encoder.stem",
        "keys_to_in_proj": ["encoder.stem.convs.0.conv", "encoder.stem.convs.0.all_modules.0"],
        "key_to_lpe": None,
    }


def _crop(passport: Passport) -> tuple[int, ...]:
    crop = passport.recipe["data"]["crop"]
    return (crop,) * passport.ndim if isinstance(crop, int) else tuple(crop)


def _plain(value: Any) -> Any:
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value
