"""Which names may be shown: those of a strict pattern, as any other may be a patient's."""

import re
from pathlib import Path

from spark3d.data.record import STRICT_ID

UID = re.compile(r"\d+(\.\d+){5,}")
SUFFIXES = (".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd", ".dcm")


def is_safe_name(name: str) -> bool:
    """Letters, digits, `.`, `_` and `-`, not hidden, and no DICOM UID, which a PACS can resolve."""
    return bool(STRICT_ID.fullmatch(name)) and not name.startswith(".") and not UID.search(name)


def safe_name(name: str, otherwise: str) -> str:
    """The name if it may be shown."""
    return name if is_safe_name(name) else otherwise


def shown(place: Path | str) -> str:
    """A path for messages: parts that are not safe become `*`, with their suffix if it is known.

    Ids of cases are safe, so a message with a case's id stays useful; `spark3d doctor --names`
    tells the files behind the ids.
    """
    return str(Path(*(_part(part) for part in Path(place).parts)))


def _part(part: str) -> str:
    if part in ("/", "..", ".") or is_safe_name(part.removeprefix(".")):
        return part
    return "*" + next((suffix for suffix in SUFFIXES if part.endswith(suffix)), "")
