"""MONAI's own sliding windows on a plan of ours: what tests and benchmarks compare with."""

from collections.abc import Mapping
from typing import Any

import torch
from monai.inferers.utils import sliding_window_inference
from torch import Tensor, nn

from spark3d.errors import ConfigError
from spark3d.evaluation.windows import WindowPlan, largest


def monai_logits(
    network: nn.Module, volume: Tensor, plan: WindowPlan, options: Mapping[str, Any] | None = None
) -> Tensor:
    """Blended logits `(k, *size)` of one volume `(c, *size)`.

    Args:
        network: in evaluation mode, on the device of the volume.
        options: further arguments of `sliding_window_inference`, such as `buffer_steps`.

    Raises:
        ConfigError: the plan has flips or skips windows, which MONAI's windows do not.
    """
    if plan.flips or plan.empty_below is not None:
        raise ConfigError("MONAI's sliding windows know no flips and skip no window")
    (pad_value,) = plan.pad_value  # nor a value for each channel
    with torch.no_grad():
        logits = sliding_window_inference(
            volume[None], plan.window, plan.batch, network, plan.overlap, mode="gaussian",
            cval=pad_value, **(options or {}),
        )  # fmt: skip
    assert isinstance(logits, Tensor)  # as the network returns one
    return logits[0]


def monai_labels(
    network: nn.Module, volume: Tensor, plan: WindowPlan, options: Mapping[str, Any] | None = None
) -> Tensor:
    """Label map `(*size)`, uint8: the class with the largest blended logit.

    Taken row by row, as all rows at once would add a map of int64 to the peak.
    """
    logits = monai_logits(network, volume, plan, options)
    labels = torch.empty(logits.shape[1:], dtype=torch.uint8)
    for row in range(len(labels)):
        labels[row] = largest(logits[:, row])
    return labels
