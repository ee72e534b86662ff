"""A fine-tuned network as a graph: `torch.export` or ONNX, with a card that says how to feed it.

The graph takes any number of crops of one fixed size, `(b, c, *crop)`, in the network's range of
intensities; orientation, spacing and window stand in the card.
"""

import json
import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from spark3d.build import LoadedSegmenter
from spark3d.errors import ConfigError, EnvironmentProblem

try:
    import onnxruntime  # pyright: ignore[reportMissingImports]
    import onnxscript  # noqa: F401  # pyright: ignore[reportMissingImports]
except ImportError:
    onnxruntime = None

log = logging.getLogger(__name__)

EXAMPLE = 2
"""Crops in the example that is traced; 0 and 1 would be taken for constants."""


def write_exported(segmenter: LoadedSegmenter, folder: Path) -> None:
    """`model.pt2`: read it with `torch.export.load(path).module()`.

    Raises:
        ConfigError: torch cannot trace the network.
    """
    program = _traced(segmenter)
    torch.export.save(program, folder / "model.pt2")
    _write_card(segmenter, folder, "model.pt2")


def run_exported(folder: Path, crops: Tensor) -> Tensor:
    """Logits of the graph that was written."""
    return torch.export.load(folder / "model.pt2").module()(crops)


def write_onnx(segmenter: LoadedSegmenter, folder: Path) -> None:
    """`model.onnx`, with the input `image` and the output `logits`.

    Raises:
        EnvironmentProblem: the packages for it are not installed.
        ConfigError: the network cannot be written so.
    """
    if onnxruntime is None:
        raise EnvironmentProblem(
            "ONNX needs onnx, onnxscript and onnxruntime: pip install 'spark3d[onnx]'"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch about itself
            program = torch.onnx.export(
                _traced(segmenter), input_names=["image"], output_names=["logits"], dynamo=True,
                verbose=False,
            )  # fmt: skip
    except torch.onnx.errors.OnnxExporterError as error:
        raise ConfigError(
            f"{_name(segmenter)} cannot be written as ONNX: {_first_line(error)}"
        ) from None
    assert program is not None  # dynamo=True returns one
    program.save(folder / "model.onnx", external_data=False)
    _write_card(segmenter, folder, "model.onnx")


def run_onnx(folder: Path, crops: Tensor) -> Tensor:
    """Logits of the graph that was written, on the CPU by onnxruntime."""
    assert onnxruntime is not None
    session = onnxruntime.InferenceSession(
        str(folder / "model.onnx"), providers=["CPUExecutionProvider"]
    )
    (logits,) = session.run(None, {"image": crops.numpy()})
    return torch.from_numpy(np.asarray(logits))


def _traced(segmenter: LoadedSegmenter) -> torch.export.ExportedProgram:
    network: nn.Module = segmenter.network
    crops = torch.zeros(EXAMPLE, segmenter.card.backbone["in_channels"], *segmenter.crop)
    shapes: Any = ({0: torch.export.Dim.DYNAMIC},)
    try:
        with torch.no_grad():
            return torch.export.export(network, (crops,), dynamic_shapes=shapes)
    except Exception as error:  # of many kinds, from the tracer and from the network
        log.debug("tracing failed", exc_info=True)
        raise ConfigError(
            f"torch cannot trace {_name(segmenter)} ({type(error).__name__}: "
            f"{_first_line(error)}); --to bundle works for MONAI's own networks"
        ) from None


def _write_card(segmenter: LoadedSegmenter, folder: Path, file: str) -> None:
    card = segmenter.card
    document = {
        "file": file,
        "input": ["batch", card.backbone["in_channels"], *segmenter.crop],
        "output": ["batch", card.out_channels, *segmenter.crop],
        "axes": "RAS",
        "spacing_mm": list(segmenter.spacing_mm),
        "window": dict(card.window),
        "labels": {str(k): name for k, name in segmenter.labels.items()},
        "model_sha256": card.sha256,
    }
    text = json.dumps(document, indent=1) + "\n"
    (folder / "card.json").write_text(text, encoding="utf-8")


def _name(segmenter: LoadedSegmenter) -> str:
    return str(segmenter.card.backbone["name"])


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
