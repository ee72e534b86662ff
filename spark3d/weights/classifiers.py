"""A fine-tuned classifier on disk: `model.safetensors` under timm's keys, and its card."""

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
class ClassifierCard:
    """What stands beside `model.safetensors`, as JSON.

    Attributes:
        backbone: `timm/NAME`.
        options: Further arguments of `timm.create_model`.
        classes: Their names, in the order of the outputs.
        crop: Rows and columns of the network's input.
        evaluation_share: Of the resized image's side that the crop keeps.
        intensity: How pixels became network input.
        average: Decay of the weights' running average that was saved; 0: the last weights.
        encoder: SHA-256 of the encoder weights it started from; empty for a start from scratch.
        recipe: The resolved recipe.
        task: Tells this card from that of a segmentation network.
        versions: Of Python and the packages.
        sha256: Of the weights' file; filled in on saving.
    """

    backbone: str
    options: Mapping[str, Any]
    classes: tuple[str, ...]
    crop: tuple[int, int]
    evaluation_share: float
    intensity: Mapping[str, Any]
    average: float = 0.0
    encoder: str = ""
    recipe: Mapping[str, Any] = field(default_factory=dict)
    task: str = "classify"
    versions: Mapping[str, str] = field(default_factory=package_versions)
    sha256: str = ""


def save_classifier(path: Path, state: Mapping[str, Tensor], card: ClassifierCard) -> None:
    """Write the weights, then their card; each whole or not at all."""
    written = replace(card, sha256=save_tensors(path, state))
    with whole_file(passport_path(path)) as part:
        part.write_text(json.dumps(asdict(written), indent=1) + "\n", encoding="utf-8")


def load_classifier_weights(path: Path) -> tuple[dict[str, Tensor], ClassifierCard]:
    """Read what a classification run saved; `path` may be its folder.

    Raises:
        DataError: Files missing, damaged, or not belonging together.
        ConfigError: The card is of another task or version.
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
    if not isinstance(tree, dict) or set(tree) != {f.name for f in fields(ClassifierCard)}:
        raise ConfigError(f"{note} is no card of a classifier of this version of spark3d")
    card = ClassifierCard(
        **{**tree, "classes": tuple(tree["classes"]), "crop": tuple(tree["crop"])}
    )
    if file_sha256(path) != card.sha256:
        raise DataError(f"{path} is damaged: its SHA-256 differs from the one in {note.name}")
    try:
        return load_file(path), card
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path} cannot be read ({error})") from None
