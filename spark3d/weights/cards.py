"""Weights of a fine-tuned network with the card, a JSON file beside them, that describes them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from spark3d.errors import ConfigError, DataError
from spark3d.weights.exchange import file_sha256, passport_path, save_tensors, whole_file


def save_with_card(path: Path, state: Mapping[str, Tensor], card: Mapping[str, Any]) -> None:
    """Write the weights, then their card with their SHA-256; each whole or not at all."""
    written = {**card, "sha256": save_tensors(path, state)}
    with whole_file(passport_path(path)) as part:
        part.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")


def load_with_card(
    path: Path, keys: set[str], of: str = "", newer: frozenset[str] = frozenset()
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_with_card` wrote.

    Args:
        path: the weights, or the folder of their run.
        keys: the card must have just these.
        of: whose card it should be, for the message: " of a classifier".
        newer: keys that older cards do not have.

    Raises:
        DataError: files missing, damaged, or not belonging together.
        ConfigError: the card has other keys.
    """
    path = path / "model.safetensors" if path.is_dir() else path
    note = passport_path(path)
    for needed in (path, note):
        if not needed.is_file():
            raise DataError(f"no {needed.name} in {path.parent}; is the fine-tuning finished?")
    try:
        card = json.loads(note.read_text(encoding="utf-8"))
    except ValueError:
        raise DataError(f"{note} is damaged; copy it again from the run that wrote it") from None
    if not isinstance(card, dict) or not keys - newer <= set(card) <= keys:
        raise ConfigError(f"{note} is no card{of} of this version of spark3d")
    if file_sha256(path) != card["sha256"]:
        raise DataError(f"{path} is damaged: its SHA-256 differs from the one in {note.name}")
    try:
        return load_file(path), card
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path} cannot be read ({error})") from None
