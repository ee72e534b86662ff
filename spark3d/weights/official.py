"""Names in published checkpoints: official SparK's parts, and ConvNeXt as Meta wrote it.

K. Tian et al., "Designing BERT for convolutional networks: sparse and hierarchical masked
modeling", ICLR 2023, and its public code; Z. Liu et al., "A ConvNet for the 2020s", CVPR 2022.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

ENCODER = "sparse_encoder.sp_cnn."
UNUSED = re.compile(r"imn_m|imn_s|norm_black|sparse_encoder\.sp_cnn\.(norm|fc|head)\..*")
"""Buffers that the official code calls deprecated, and a classifier that it never trains."""
DECODER = (
    (re.compile(r"^dense_decoder\.dec\.(\d+)\.up_sample\."), r"decoder.blocks.\1.up."),
    (re.compile(r"^dense_decoder\.dec\.(\d+)\.conv\.0\."), r"decoder.blocks.\1.conv1."),
    (re.compile(r"^dense_decoder\.dec\.(\d+)\.conv\.1\."), r"decoder.blocks.\1.norm1."),
    (re.compile(r"^dense_decoder\.dec\.(\d+)\.conv\.3\."), r"decoder.blocks.\1.conv2."),
    (re.compile(r"^dense_decoder\.dec\.(\d+)\.conv\.4\."), r"decoder.blocks.\1.norm2."),
    (re.compile(r"^dense_decoder\.proj\."), "decoder.proj."),
)
DENSIFY = re.compile(r"^(densify_norms|densify_projs|mask_tokens)\.(\d+)(?:\.(.+))?$")
PART = {"densify_norms": "norm", "densify_projs": "proj", "mask_tokens": "token"}
META_CONVNEXT = (
    (re.compile(r"^downsample_layers\.0\."), "stem."),
    (re.compile(r"^downsample_layers\.(\d+)\."), r"stages.\1.downsample."),
    (re.compile(r"^stages\.(\d+)\.(\d+)\."), r"stages.\1.blocks.\2."),
    (re.compile(r"\.dwconv\."), ".conv_dw."),
    (re.compile(r"\.pwconv(\d)\."), r".mlp.fc\1."),
    (re.compile(r"\.grn\.gamma$"), ".mlp.grn.weight"),
    (re.compile(r"\.grn\.beta$"), ".mlp.grn.bias"),
    (re.compile(r"^norm\."), "head.norm."),
    (re.compile(r"^head\.(weight|bias)$"), r"head.fc.\1"),
)


@dataclass(frozen=True)
class Sorted:
    """A checkpoint by what its tensors are for.

    Attributes:
        encoder: Under the library's names.
        objective: Decoder, densify and tokens under the names of `SparK` here; empty for anything
            but a SparK pre-training.
        unused: Keys that nothing needs.
        official: The checkpoint is one of official SparK's pre-training.
    """

    encoder: dict[str, Tensor]
    objective: dict[str, Tensor]
    unused: tuple[str, ...]
    official: bool


def sort_keys(state: Mapping[str, Tensor]) -> Sorted:
    """Tell the encoder of a checkpoint from the rest and give both the names used here."""
    official = any(key.startswith(ENCODER) for key in state)
    if not official:
        return Sorted(_library_names(state), {}, (), False)
    unused = tuple(key for key in state if UNUSED.fullmatch(key))
    used = {key: value for key, value in state.items() if key not in unused}
    encoder = {k.removeprefix(ENCODER): v for k, v in used.items() if k.startswith(ENCODER)}
    stages = 1 + max((int(m[2]) for key in used if (m := DENSIFY.match(key))), default=-1)
    rest = {_our_name(k, stages): v for k, v in used.items() if not k.startswith(ENCODER)}
    return Sorted(_library_names(encoder), rest, unused, True)


def _our_name(key: str, stages: int) -> str:
    """The name of a tensor of official SparK's densify or decoder; others keep theirs.

    There the stages are counted from the deepest, here from the finest.
    """
    if match := DENSIFY.match(key):
        part, order, last = match.groups()
        name = f"densify.stages.{stages - 1 - int(order)}.{PART[part]}"
        return f"{name}.{last}" if last else name
    for pattern, name in DECODER:
        if pattern.match(key):
            return pattern.sub(name, key)
    return key


def _library_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Meta's names of a ConvNeXt become timm's; everything else stays."""
    if not any(key.startswith("downsample_layers.") for key in state):
        return dict(state)
    named = {}
    for key, value in state.items():
        for pattern, name in META_CONVNEXT:
            key = pattern.sub(name, key)
        named[key] = value.flatten() if ".grn." in key else value
    return named
