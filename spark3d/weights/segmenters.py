"""A fine-tuned network on disk: `model.safetensors` and the card by which to rebuild it."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from spark3d.errors import ConfigError, DataError
from spark3d.weights.exchange import file_sha256, passport_path, save_tensors, whole_file
from spark3d.weights.passport import package_versions


@dataclass(frozen=True)
class ModelCard:
    """What stands beside `model.safetensors`, as JSON.

    Attributes:
        backbone: `{"name", "ndim", "in_channels", "options"}` for `build_backbone`.
        out_channels: Classes, background included.
        labels: Name of every foreground class by its number (as text, for JSON).
        spacing_mm: Voxel size the network reads, in RAS+ axis order.
        window: Arguments of `spark3d.data.intensity.Window`.
        crop: Voxels per axis of a training crop, the window of prediction.
        swap: Label pairs that change places in a left-right mirror image.
        encoder: SHA-256 of the encoder weights it started from; empty for a start from scratch.
        pretrained_on: Content hashes of the volumes that encoder has seen.
        trained_on: Content hashes of the training volumes.
        recipe: The resolved recipe.
        versions: Of Python and the packages.
        sha256: Of the weights' file; filled in on saving.
    """

    backbone: Mapping[str, Any]
    out_channels: int
    labels: Mapping[str, str]
    spacing_mm: tuple[float, ...]
    window: Mapping[str, Any]
    crop: tuple[int, ...]
    swap: tuple[tuple[int, int], ...] = ()
    encoder: str = ""
    pretrained_on: tuple[str, ...] = ()
    trained_on: tuple[str, ...] = ()
    recipe: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=package_versions)
    sha256: str = ""


def save_model(path: Path, state: Mapping[str, Tensor], card: ModelCard) -> None:
    """Write the weights, then their card; each whole or not at all."""
    written = replace(card, sha256=save_tensors(path, state))
    with whole_file(passport_path(path)) as part:
        part.write_text(json.dumps(asdict(written), indent=1) + "\n", encoding="utf-8")


def load_model(path: Path) -> tuple[dict[str, Tensor], ModelCard]:
    """Read what `save_model` wrote; `path` may be the run folder.

    Raises:
        DataError: Files missing, damaged, or not belonging together.
        ConfigError: The card is of another version.
    """
    path = path / "model.safetensors" if path.is_dir() else path
    note = passport_path(path)
    for needed in (path, note):
        if not needed.is_file():
            raise DataError(f"no {needed.name} in {path.parent}; is the fine-tuning finished?")
    try:
        tree = json.loads(note.read_text(encoding="utf-8"))
    except ValueError:
        raise DataError(f"{note} is damaged; copy it again from the run that wrote it") from None
    if not isinstance(tree, dict) or set(tree) != {f.name for f in fields(ModelCard)}:
        raise ConfigError(f"{note} is no card of this version of spark3d")
    tree["spacing_mm"], tree["crop"] = tuple(tree["spacing_mm"]), tuple(tree["crop"])
    tree["swap"] = tuple(tuple(pair) for pair in tree["swap"])
    card = ModelCard(**tree)
    if file_sha256(path) != card.sha256:
        raise DataError(f"{path} is damaged: its SHA-256 differs from the one in {note.name}")
    try:
        return load_file(path), card
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path} cannot be read ({error})") from None
