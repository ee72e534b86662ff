"""The passport of encoder weights: what a user must know before loading them elsewhere."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from spark3d.errors import DataError

FORMAT = 1
PACKAGES = ("spark3d", "torch", "monai", "timm", "safetensors")


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that define the network."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@dataclass(frozen=True)
class Passport:
    """What stands beside `encoder.safetensors`, as JSON.

    Attributes:
        backbone: Name for `build_backbone`.
        ndim: Number of spatial axes.
        in_channels: Channels of the input.
        options: Arguments of `build_backbone`.
        axes: Axis order of the volumes, "RAS" for prepared stores.
        spacing_mm: Voxel size along these axes; none for ordinary images.
        intensity: How values became network input, such as `{"clip_hu": [-200, 300]}`.
        objective: Name of the pre-training task.
        recipe: The resolved recipe.
        content_hashes: Of the voxels of every pre-training volume, or of the bytes of every image
            file, to tell overlaps with test data.
        patient_hashes: Keyed hashes of the patients of these volumes, where their source told them;
            see `spark3d.data.privacy`.
        steps: Optimiser steps behind the weights.
        history: What was done to them before: imports, conversions, earlier pre-training.
        objective_sha256: Of `objective.safetensors`, the rest of the pre-training; empty if none.
        versions: Of Python and the packages.
        sha256: Of the weights' file; filled in on saving.
        format: Version of this description.
    """

    backbone: str
    ndim: int
    in_channels: int
    options: Mapping[str, Any] = field(default_factory=dict)
    axes: str = "RAS"
    spacing_mm: tuple[float, ...] | None = None
    intensity: Mapping[str, Any] = field(default_factory=dict)
    objective: str = ""
    recipe: Mapping[str, Any] = field(default_factory=dict)
    content_hashes: tuple[str, ...] = ()
    patient_hashes: tuple[str, ...] = ()
    steps: int = 0
    history: tuple[str, ...] = ()
    objective_sha256: str = ""
    versions: Mapping[str, str] = field(default_factory=package_versions)
    sha256: str = ""
    format: int = FORMAT

    def to_json(self) -> str:
        """Readable JSON, keys in the order of the attributes."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str = "passport") -> Passport:
        """Read what `to_json` wrote.

        Args:
            text: The JSON.
            source: Name of the file, for messages.

        Raises:
            DataError: Not JSON, a missing or unknown field, or a newer format.
        """
        try:
            found = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{source} is no valid JSON ({error}); copy it again from the run that wrote it"
            ) from error
        known = {entry.name for entry in fields(cls)}
        needed = {"backbone", "ndim", "in_channels"}
        if not isinstance(found, dict) or not needed <= found.keys():
            raise DataError(f"{source} is no passport of encoder weights: it needs {needed}")
        if found.get("format", FORMAT) > FORMAT or not found.keys() <= known:
            raise DataError(
                f"{source} has format {found.get('format')} and fields {found.keys() - known} that "
                "this version does not know; upgrade spark3d"
            )
        for name in ("spacing_mm", "content_hashes", "patient_hashes", "history"):
            if found.get(name) is not None:
                found[name] = tuple(found[name])
        return cls(**found)
