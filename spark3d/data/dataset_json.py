"""The `dataset.json` of Decathlon tasks and nnU-Net datasets: paths, labels, modality."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from spark3d.data.checks import fault


def read_json(path: Path) -> dict[str, Any]:
    """The mapping in a `dataset.json`.

    Raises:
        DataError: it is no JSON, or no mapping.
    """
    try:
        data = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise fault(
            "E-DATASET-JSON", path, f"a file that is no JSON ({type(error).__name__})", "JSON",
            "correct it, or move it away to read the folder as plain files",
        ) from None  # fmt: skip
    if not isinstance(data, dict):
        raise fault("E-DATASET-JSON", path, "no mapping", "a mapping of keys", "correct it")
    return data


def image_and_label(entry: Any, root: Path) -> tuple[str, str | None]:
    """The two paths of one entry.

    Raises:
        DataError: the entry names no image.
    """
    if not (isinstance(entry, dict) and isinstance(entry.get("image"), str)):
        raise fault(
            "E-DATASET-JSON", root / "dataset.json", "a case without an 'image'",
            'entries {"image": ..., "label": ...} or paths', "correct the entry",
        )  # fmt: skip
    return entry["image"], entry.get("label")


def inside(root: Path, relative: str) -> Path:
    """A path of the description, which must not lead out of the folder.

    Raises:
        DataError: it does.
    """
    path = Path(relative)
    if path.is_absolute() or ".." in path.parts:
        raise fault(
            "E-DATASET-JSON", root / "dataset.json", "a path that leads out of the folder",
            "paths inside it", "make the paths relative to dataset.json",
        )  # fmt: skip
    return root / path


def declared_labels(declared: Any, root: Path) -> dict[str, int] | None:
    """Name -> value from {"0": "background"} (Decathlon) or {"background": 0} (nnU-Net).

    Raises:
        DataError: a value is no whole number.
    """
    if not isinstance(declared, dict):
        return None
    try:
        if all(str(key).isdigit() for key in declared):
            return {str(name): int(value) for value, name in declared.items()}
        return {str(name): int(value) for name, value in declared.items()}
    except (TypeError, ValueError):
        raise fault(
            "E-DATASET-JSON", root / "dataset.json", "labels that are not whole numbers",
            "one number per name", "regions of several labels are not supported",
        ) from None  # fmt: skip


def declared_modality(names: Iterable[Any]) -> str:
    """ "CT" if all channels are, "MR" for any others, "auto" if none is named."""
    known = [str(name).upper() for name in names]
    if not known:
        return "auto"
    return "CT" if all(name == "CT" for name in known) else "MR"
