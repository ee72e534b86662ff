"""A fine-tuned network as a MONAI bundle that needs MONAI alone.

Its configuration holds literal values, class names (`_target_`) and references (`@`), and no `$`
expression: nothing in it is evaluated as Python.
"""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from spark3d import __version__
from spark3d.build import LoadedSegmenter, network_options
from spark3d.errors import ConfigError
from spark3d.models.definitions import literal_definition

README = """\
# {title}

Segments {organs} ({modality_note}). Exported by spark3d {version}.

Run it in this folder, on any number of scans; label maps go to `eval/`, on the grid of each scan:

```
python -m monai.bundle run --config_file configs/inference.json \\
    --dataset_data '[{{"image": "/path/to/scan.nii.gz"}}]'
```

`--device#type cuda` runs it on a GPU. It needs MONAI with `nibabel` and `pytorch-ignite`.
The windows lie on the whole scan, those of `spark3d predict` on the body: label maps of the two can
differ by single voxels at the edges of organs. Scores are those of the run, not of this bundle.
"""


def write_bundle(segmenter: LoadedSegmenter, folder: Path, overlap: float) -> None:
    """Write configuration, weights, metadata and a page for readers into `folder`.

    Raises:
        ConfigError: MONAI alone cannot build the network or its intensities.
    """
    for name in ("configs", "models", "docs"):
        (folder / name).mkdir(parents=True)
    config = inference_config(segmenter, overlap)
    _write_json(folder / "configs" / "inference.json", config)
    _write_json(folder / "configs" / "metadata.json", metadata(segmenter))
    torch.save(segmenter.network.state_dict(), folder / "models" / "model.pt")
    page = README.format(
        title="Segmentation network",
        organs=", ".join(segmenter.labels.values()),
        modality_note=f"{' x '.join(f'{s:g}' for s in segmenter.spacing_mm)} mm",
        version=__version__,
    )
    (folder / "docs" / "README.md").write_text(page, encoding="utf-8")


def inference_config(segmenter: LoadedSegmenter, overlap: float) -> dict[str, Any]:
    """`configs/inference.json`: from files to label maps."""
    card = segmenter.card
    kind = card.backbone
    if (decoder := kind.get("decoder", {}).get("decoder", "auto")) != "auto":
        raise ConfigError(
            f"{kind['name']} with model.decoder={decoder} is no network of MONAI alone, so a "
            "bundle cannot describe it; use --to exported or --to onnx"
        )
    network = literal_definition(
        kind["name"], kind["ndim"], kind["in_channels"], card.out_channels, network_options(kind)
    )
    return {
        "device": {"_target_": "torch.device", "type": "cpu"},
        "network_def": network,
        "network": {"_target_": "torch.nn.Module.to", "self": "@network_def", "device": "@device"},
        "preprocessing": {"_target_": "Compose", "transforms": _before(segmenter)},
        "dataset_data": [],
        "dataset": {
            "_target_": "Dataset", "data": "@dataset_data", "transform": "@preprocessing",
        },
        "dataloader": {
            "_target_": "DataLoader", "dataset": "@dataset", "batch_size": 1, "num_workers": 0,
        },
        "inferer": _inferer(segmenter, overlap),
        "postprocessing": {"_target_": "Compose", "transforms": _after()},
        "handlers": [
            {
                "_target_": "CheckpointLoader", "load_path": "models/model.pt",
                "load_dict": {"model": "@network"}, "map_location": "@device",
            }
        ],
        "evaluator": {
            "_target_": "SupervisedEvaluator", "device": "@device", "val_data_loader":
            "@dataloader", "network": "@network", "inferer": "@inferer",
            "postprocessing": "@postprocessing", "val_handlers": "@handlers",
        },
        "run": [{"_target_": "monai.engines.SupervisedEvaluator.run", "self": "@evaluator"}],
    }  # fmt: skip


def _inferer(segmenter: LoadedSegmenter, overlap: float) -> dict[str, Any]:
    """Sliding windows; those of a network of slices go over each axial one."""
    by_slice = len(segmenter.crop) < len(segmenter.spacing_mm)
    kind = (
        {"_target_": "SliceInferer", "spatial_dim": 2}
        if by_slice
        else {"_target_": "SlidingWindowInferer"}
    )
    low = segmenter.window.low  # without it MONAI pads with 0, not with the minimum of the case
    around = {} if low is None else {"cval": segmenter.window.outside(low)[0]}
    return {
        **kind, "roi_size": list(segmenter.crop), "sw_batch_size": 1, "overlap": overlap,
        "mode": "gaussian", **around,
    }  # fmt: skip


def metadata(segmenter: LoadedSegmenter) -> dict[str, Any]:
    """`configs/metadata.json` by MONAI's schema."""
    card = segmenter.card
    names = {"0": "background", **{str(k): name for k, name in segmenter.labels.items()}}
    size = list(segmenter.crop)
    window = segmenter.window
    span = [0.0, window.scale] if window.mode == "unit" else []
    image = {
        "type": "image", "format": "hounsfield" if window.low is not None else "magnitude",
        "num_channels": card.backbone["in_channels"], "spatial_shape": size, "dtype": "float32",
        "value_range": span, "is_patch_data": True, "channel_def": {"0": "image"},
    }  # fmt: skip
    pred = {
        "type": "image", "format": "segmentation", "num_channels": card.out_channels,
        "spatial_shape": size, "dtype": "float32", "value_range": [], "is_patch_data": True,
        "channel_def": names,
    }  # fmt: skip
    return {
        "version": "0.1.0",
        "changelog": {"0.1.0": f"exported by spark3d {__version__}"},
        "monai_version": version("monai"),
        "pytorch_version": torch.__version__.split("+")[0],
        "numpy_version": version("numpy"),
        "required_packages_version": {"nibabel": version("nibabel"), "pytorch-ignite": "0.5"},
        "task": f"Segmentation of {', '.join(segmenter.labels.values())}",
        "description": f"{card.backbone['name']}, fine-tuned with spark3d",
        "authors": "spark3d",
        "copyright": "of whoever trained the network",
        "network_data_format": {"inputs": {"image": image}, "outputs": {"pred": pred}},
        "spacing_mm": list(segmenter.spacing_mm),
        "model_sha256": card.sha256,
    }


def _before(segmenter: LoadedSegmenter) -> list[dict[str, Any]]:
    key = {"keys": "image"}
    return [
        {"_target_": "LoadImaged", **key},
        {"_target_": "EnsureChannelFirstd", **key},
        {"_target_": "Orientationd", **key, "axcodes": "RAS"},
        {"_target_": "Spacingd", **key, "pixdim": list(segmenter.spacing_mm), "mode": "bilinear"},
        *_intensities(segmenter),
    ]


def _intensities(segmenter: LoadedSegmenter) -> list[dict[str, Any]]:
    window, key = segmenter.window, {"keys": "image"}
    if window.needs_statistics:
        raise ConfigError(
            "the model scales every case by the mean and deviation of its body, which MONAI's "
            "transforms cannot say in literal values; use --to exported or --to onnx"
        )
    if window.mode == "unit":
        return [
            {
                "_target_": "ScaleIntensityRanged", **key, "a_min": window.low,
                "a_max": window.high, "b_min": 0.0, "b_max": window.scale, "clip": True,
            }
        ]  # fmt: skip
    steps: list[dict[str, Any]] = []
    for bound, above in ((window.low, True), (window.high, False)):
        if bound is not None:
            clip = {"threshold": bound, "above": above, "cval": bound}
            steps.append({"_target_": "ThresholdIntensityd", **key, **clip})
    scale = {"subtrahend": window.mean, "divisor": window.std}
    return [*steps, {"_target_": "NormalizeIntensityd", **key, **scale}]


def _after() -> list[dict[str, Any]]:
    key = {"keys": "pred"}
    return [
        {"_target_": "Activationsd", **key, "softmax": True},
        {
            "_target_": "Invertd", **key, "transform": "@preprocessing", "orig_keys": "image",
            "nearest_interp": False, "to_tensor": True,
        },
        {"_target_": "AsDiscreted", **key, "argmax": True},
        {
            "_target_": "SaveImaged", **key, "output_dir": "eval", "output_dtype": "uint8",
            "resample": False,
        },
    ]  # fmt: skip


def _write_json(path: Path, tree: dict[str, Any]) -> None:
    path.write_text(json.dumps(tree, indent=2, allow_nan=False) + "\n", encoding="utf-8")
