"""Checkpoints that other programs wrote: read as tensors only, unwrapped, their keys made plain."""

from __future__ import annotations

import argparse
import pickle
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from spark3d.errors import ConfigError, DataError

WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model_state_dict", "model", "module")
"""Entries under which training programs keep the weights; averaged ones first, as timm does."""
PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.", "encoder.", "network.")
"""What wrappers put before every key: data parallel, torch.compile, a trainer's attribute."""


@dataclass(frozen=True)
class Foreign:
    """The weights of somebody else's checkpoint.

    Attributes:
        state: The tensors under the file's own keys.
        entry: Where in the file they stood; empty if the file is the state dict itself.
        others: Further entries that hold weights.
        ignored: Entries among the weights that are no tensors.
    """

    state: dict[str, Tensor]
    entry: str
    others: tuple[str, ...]
    ignored: tuple[str, ...]


def read_foreign(path: Path, entry: str | None = None) -> Foreign:
    """Read a `.safetensors` file, or any other with torch, of which nothing but tensors is built.

    A pickle that asks for anything else is refused and never read in another way.

    Args:
        path: The checkpoint.
        entry: Which entry to take where a file has several; by default averaged weights first.

    Raises:
        DataError: The file is missing or damaged, holds code, or no weights.
        ConfigError: It has no such entry.
    """
    found = _load(path)
    if not isinstance(found, Mapping):
        raise DataError(
            f"{path} holds a {type(found).__name__}, not weights by name; save the network's "
            "state_dict() instead"
        )
    inside = {key: value for key, value in found.items() if _has_tensors(value)}
    if entry is not None and entry not in inside:
        known = ", ".join(map(str, inside)) or "none: it is the state dict itself"
        raise ConfigError(
            f"{path.name} has no weights under {entry!r}; entries with weights: {known}"
        )
    if entry is None and not _has_tensors(found):
        entry = next((name for name in (*WRAPPERS, *inside) if name in inside), None)
        if entry is None:
            raise DataError(
                f"{path} holds no weights; its entries are {', '.join(map(str, found))}"
            )
    state: Mapping[str, Any] = found if entry is None else inside[entry]
    tensors = {str(key): value for key, value in state.items() if isinstance(value, Tensor)}
    return Foreign(
        tensors,
        entry or "",
        tuple(str(key) for key in inside if key != entry),
        tuple(str(key) for key in state if str(key) not in tensors) if entry else (),
    )


def plain_keys(state: Mapping[str, Tensor], known: Collection[str]) -> dict[str, Tensor]:
    """The state without what a wrapper put before every key, unless some keys are `known`."""
    while state and not any(key in known for key in state):
        prefix = next((p for p in PREFIXES if all(key.startswith(p) for key in state)), None)
        if prefix is None:
            break
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return dict(state)


def _load(path: Path) -> Any:
    if not path.is_file():
        raise DataError(f"{path} is no file; give a checkpoint (.pth, .pt, .bin or .safetensors)")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # plain values, timm's `args`
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        asked = re.search(r"(?:GLOBAL|function) ([\w.]+\.\w+)", str(error))
        what = f"asks for {asked.group(1)}" if asked else "is damaged or asks for more than tensors"
        raise DataError(
            f"{path} {what}, which loading weights must not run: refused; ask its authors for "
            "safetensors, or save the bare state_dict() where you trust the file"
        ) from None
    except (SafetensorError, RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:120]
        raise DataError(
            f"{path} is no checkpoint, or a damaged one ({reason}); fetch it again"
        ) from None


def _has_tensors(value: object) -> bool:
    return isinstance(value, Mapping) and any(isinstance(v, Tensor) for v in value.values())
