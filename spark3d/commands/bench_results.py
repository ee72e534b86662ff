"""The JSON file in which a `spark3d bench` keeps its results, and goes on after a stop."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spark3d.errors import DataError


def load(path: Path, subject: str, measured: Mapping[str, Any]) -> dict[str, Any]:
    """The results so far, or an empty document.

    Args:
        path: JSON file, there or not.
        subject: key of the document under which it says what was measured.
        measured: what is to be measured now; it must be the same.

    Returns:
        "machine", "results" by name, and `subject`.

    Raises:
        DataError: something else stands there, or the results are of something else.
    """
    if not path.is_file():
        return {"machine": {}, "results": {}, subject: dict(measured)}
    try:
        document = json.loads(path.read_text())
        before = document[subject]
        changed = [key for key in measured if measured[key] != before.get(key)]
        document["results"].keys()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path} holds no results of this `spark3d bench`: choose another file"
        ) from error
    if changed:
        found = "; ".join(f"{key} {before.get(key)}, now {measured[key]}" for key in changed)
        raise DataError(f"{path} was measured otherwise ({found}): choose another file")
    return document


def save(path: Path, document: Mapping[str, Any]) -> None:
    """Replace the file at once, so that a kill leaves the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(document, indent=1) + "\n")
    temporary.replace(path)
