"""Whether the files of a case are still those that were read: size, time of change, content."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spark3d.data.checks import fault
from spark3d.data.io import data_files
from spark3d.data.sources import CaseSource
from spark3d.data.streams import unreadable

Stamp = tuple[Path, int, int]
"""A file, its bytes, and when it changed last, in ns."""


def stamps(case: CaseSource) -> list[Stamp]:
    """Of each file of a case, the label's too.

    Raises:
        DataError: one is not there.
    """
    found = []
    for path in source_files(case):
        try:
            stat = path.stat()
        except OSError as error:
            raise unreadable(path, error) from None
        found.append((path, stat.st_size, stat.st_mtime_ns))
    return found


def fingerprint(stamped: Sequence[Stamp]) -> list[dict[str, Any]]:
    """What is recorded of the files, without their names: bytes, time of change, SHA-256."""
    return [
        {"bytes": size, "mtime_ns": changed, "sha256": _sha256(path)}
        for path, size, changed in stamped
    ]


def check_unchanged(case: CaseSource, before: Sequence[Stamp]) -> None:
    """Refuse files that changed while they were read, as their hash may be of other voxels.

    Raises:
        DataError: E-CHANGED, or one is not there.
    """
    if stamps(case) != list(before):
        raise fault(
            "E-CHANGED", case.id, "a file that changed while it was read",
            "files that stay as they are", "give the command again once all are in place",
        )  # fmt: skip


def same_files(case: CaseSource, known: Sequence[dict[str, Any]]) -> bool:
    """By size and time of change; by content where only the time differs."""
    paths = source_files(case)
    if len(paths) != len(known):
        return False
    for path, entry in zip(paths, known, strict=True):
        stat = path.stat()
        if stat.st_size != entry["bytes"]:
            return False
        if stat.st_mtime_ns != entry["mtime_ns"] and _sha256(path) != entry["sha256"]:
            return False
    return True


def source_files(case: CaseSource) -> tuple[Path, ...]:
    """Every file that a case is read from."""
    sources = (*case.sources, *([case.label] if case.label else []))
    return tuple(path for source in sources for path in data_files(source))


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise unreadable(path, error) from None
