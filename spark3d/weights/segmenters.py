"""A fine-tuned network on disk: `model.safetensors` and the card by which to rebuild it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from spark3d.weights.cards import load_with_card, save_with_card
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
        modality: "CT" or "MR" where all training volumes are of one kind, else "auto".
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
    modality: Literal["auto", "CT", "MR"] = "auto"
    versions: Mapping[str, str] = field(default_factory=package_versions)
    sha256: str = ""


def save_model(path: Path, state: Mapping[str, Tensor], card: ModelCard) -> None:
    """Write the weights, then their card; each whole or not at all."""
    save_with_card(path, state, asdict(card))


def load_model(path: Path) -> tuple[dict[str, Tensor], ModelCard]:
    """Read what `save_model` wrote; `path` may be the run folder.

    Raises:
        DataError: Files missing, damaged, or not belonging together.
        ConfigError: The card is of another version.
    """
    keys = {f.name for f in fields(ModelCard)}
    state, tree = load_with_card(path, keys, newer=frozenset({"modality"}))
    tree["spacing_mm"], tree["crop"] = tuple(tree["spacing_mm"]), tuple(tree["crop"])
    tree["swap"] = tuple(tuple(pair) for pair in tree["swap"])
    return state, ModelCard(**tree)
