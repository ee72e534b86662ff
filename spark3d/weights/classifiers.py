"""A fine-tuned classifier on disk: `model.safetensors` under timm's keys, and its card."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from spark3d.weights.cards import load_with_card, save_with_card
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
    save_with_card(path, state, asdict(card))


def load_classifier_weights(path: Path) -> tuple[dict[str, Tensor], ClassifierCard]:
    """Read what a classification run saved; `path` may be its folder.

    Raises:
        DataError: Files missing, damaged, or not belonging together.
        ConfigError: The card is of another task or version.
    """
    keys = {f.name for f in fields(ClassifierCard)}
    state, tree = load_with_card(path, keys, " of a classifier")
    tree["classes"], tree["crop"] = tuple(tree["classes"]), tuple(tree["crop"])
    return state, ClassifierCard(**tree)
