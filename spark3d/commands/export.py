"""`spark3d export`: a run in another format, checked to compute the same before it is kept."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from spark3d.build import LoadedSegmenter, backbone, load_segmenter
from spark3d.commands.export_bundle import write_bundle
from spark3d.commands.export_graph import run_exported, run_onnx, write_exported, write_onnx
from spark3d.commands.export_nnunet import FILE, reversed_axes, write_nnunet
from spark3d.commands.labelled import encoder_file
from spark3d.errors import ConfigError, EnvironmentProblem
from spark3d.models.definitions import build_literal
from spark3d.weights.exchange import load_encoder, load_into

Target = Literal["bundle", "onnx", "exported", "nnunet"]
TOLERANCE = 1e-4
"""Largest difference of a logit from the network's own, relative to the largest logit."""


def export_command(run: Path, out: Path, to: str, overlap: float = 0.5) -> float:
    """Write a run in another format into the new folder `out`, if it computes the same.

    Args:
        run: folder of a fine-tuning (for "nnunet": of a pre-training), or its weights.
        out: new folder; nothing is left there if the check fails.
        to: "bundle" (MONAI), "onnx", "exported" (`torch.export`) or "nnunet" (a checkpoint for
            nnU-Net's fine-tuning).
        overlap: of windows, in a bundle.

    Returns:
        The largest difference of a logit, relative to the largest; 0 for "nnunet", whose weights
        are compared bit by bit.

    Raises:
        ConfigError: an unknown format, a network it cannot hold, or a result that differs.
        DataError: no finished run.
        EnvironmentProblem: packages not installed, no right to write.
    """
    if to not in get_args(Target):
        raise ConfigError(f"--to {to}: choose from {', '.join(get_args(Target))}")
    if not 0 <= overlap < 1:
        raise ConfigError(f"--overlap {overlap} lies outside [0, 1); 0.5 is usual")
    if out.exists():
        raise ConfigError(f"--out {out} exists; choose a new folder")
    if to == "nnunet":
        return _whole(out, lambda folder: _nnunet(run, folder))
    segmenter = load_segmenter(run)
    return _whole(out, lambda folder: _segmenter(segmenter, folder, to, overlap))


def _whole(out: Path, write: Callable[[Path], float]) -> float:
    """Let `write` fill a folder beside `out`, then move it there; nothing is left if it fails."""
    part = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        part.mkdir(parents=True)
        difference = write(part)
        os.replace(part, out)
    except OSError as error:
        raise EnvironmentProblem(
            f"cannot write --out {out}: {error.strerror}; choose another folder"
        ) from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return difference


def _segmenter(segmenter: LoadedSegmenter, folder: Path, to: str, overlap: float) -> float:
    crops = torch.rand(
        3, segmenter.card.backbone["in_channels"], *segmenter.crop,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    if to == "bundle":
        write_bundle(segmenter, folder, overlap)
        found = run_bundle(folder, crops)
    elif to == "onnx":
        write_onnx(segmenter, folder)
        found = run_onnx(folder, crops)
    else:
        write_exported(segmenter, folder)
        found = run_exported(folder, crops)
    with torch.no_grad():
        expected = segmenter.network(crops)
    return same_logits(found.detach(), expected, to)


def same_logits(found: Tensor, expected: Tensor, to: str) -> float:
    """The largest difference relative to the largest logit.

    Raises:
        ConfigError: it is above `TOLERANCE`, or shapes differ.
    """
    if found.shape != expected.shape:
        raise ConfigError(
            f"the {to} gives logits {tuple(found.shape)}, the network {tuple(expected.shape)}; "
            "nothing was kept"
        )
    difference = float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-12))
    if not difference <= TOLERANCE:
        raise ConfigError(
            f"the {to} differs from the network by {difference:.1e} of the largest logit (at most "
            f"{TOLERANCE:.0e} is allowed); nothing was kept"
        )
    return difference


def run_bundle(folder: Path, crops: Tensor) -> Tensor:
    """Logits of the network as MONAI builds it from the bundle's own files."""
    config = json.loads((folder / "configs" / "inference.json").read_text("utf-8"))
    network = build_literal(config["network_def"])
    state = torch.load(folder / "models" / "model.pt", weights_only=True)
    network.load_state_dict(state)
    with torch.no_grad():
        return network.eval()(crops)


def _nnunet(run: Path, folder: Path) -> float:
    """The encoder's checkpoint, read back into a fresh residual encoder U-Net."""
    state, passport = load_encoder(encoder_file(run))
    write_nnunet(state, passport, folder)
    found = torch.load(folder / FILE, weights_only=True)["network_weights"]
    fresh = backbone(passport.backbone, passport.ndim, passport.in_channels, passport.options)
    load_into(fresh.network, found)
    own = reversed_axes(fresh.network.state_dict())
    if any(not torch.equal(own[key], value) for key, value in state.items()):
        raise ConfigError("the checkpoint differs from the weights; nothing was kept")
    return 0.0
