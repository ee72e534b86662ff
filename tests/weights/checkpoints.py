"""Checkpoints as other programs write them, of small networks with random statistics."""

import sys
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "golden"))  # the rule of the golden values

RESNET = ("resnet10t", {"channels": [8, 16, 24, 32]})
CONVNEXT = ("convnext_atto", {"dims": [8, 16, 24, 32], "depths": [1, 1, 2, 1]})


def make(network: tuple[str, dict], in_chans: int = 3, **more: object) -> nn.Module:
    """A network of timm in which every tensor differs from its start value."""
    torch.manual_seed(0)
    model = timm.create_model(network[0], in_chans=in_chans, **network[1], **more)
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            spread = torch.rand_like(value) if name.endswith("running_var") else value.abs() * 0
            value.add_(0.1 * torch.randn_like(value) * ("var" not in name) + spread)
    return model.eval()


def to_meta_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's names of a ConvNeXt as Meta wrote them first."""
    named = {}
    for key, value in state.items():
        if key.startswith("stem."):
            key = key.replace("stem.", "downsample_layers.0.")
        elif ".downsample." in key:
            _, stage, _, rest = key.split(".", 3)
            key = f"downsample_layers.{stage}.{rest}"
        for theirs, metas in (("conv_dw", "dwconv"), ("mlp.fc", "pwconv"), (".blocks.", ".")):
            key = key.replace(theirs, metas)
        key = key.replace("head.norm.", "norm.").replace("head.fc.", "head.")
        named[key] = value
    return named
