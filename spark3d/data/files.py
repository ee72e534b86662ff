"""Writing files so that a reader sees the old one or the whole new one, never a part."""

import contextlib
import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spark3d.errors import EnvironmentProblem

PIECE = 2**18
"""Bytes read back at a time; they stay in the processor's cache."""


def write_atomic(path: Path, data: bytes) -> None:
    """Write beside the target, flush to the disk, then rename over it.

    Raises:
        EnvironmentProblem: no space, no right to write; the old file, if any, is untouched.
    """
    put_in_place(write_beside({path: data}))


def readable_json(content: Any) -> bytes:
    """JSON for people: letters beyond ASCII as they are, names that are no UTF-8 as escapes."""
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    return text.encode("utf-8", "backslashreplace")  # of a surrogate, that is JSON's own escape


def write_beside(files: Mapping[Path, bytes]) -> dict[Path, Path]:
    """Write each content to a temporary file beside its target, on the disk and read back.

    Returns:
        Target -> temporary, for `put_in_place`.

    Raises:
        EnvironmentProblem: no space, no right to write; nothing is left of any of them.
    """
    staged: dict[Path, Path] = {}
    for path, data in files.items():
        temporary = staged[path] = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with temporary.open("wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            _compare(temporary, data)
        except OSError as error:
            _discard(staged)
            raise _problem(path, error) from error
    return staged


def _compare(path: Path, data: bytes) -> None:
    """Read a file back, piece by piece: a second copy of a volume costs more than to read it.

    Raises:
        OSError: it does not hold exactly `data`.
    """
    done = 0
    with path.open("rb", buffering=0) as stream:
        while (piece := stream.read(PIECE)) and data.startswith(piece, done):
            done += len(piece)
        rest = piece or stream.read(1)
    if rest or done != len(data):
        raise OSError(errno.EIO, "what was read back differs from what was written")


def put_in_place(staged: Mapping[Path, Path]) -> None:
    """Rename temporaries over their targets, in order.

    Raises:
        EnvironmentProblem: no right to; temporaries that are left are removed.
    """
    for path, temporary in staged.items():
        try:
            os.replace(temporary, path)
            sync_folder(path.parent)
        except OSError as error:
            _discard(staged)
            raise _problem(path, error) from error


def _discard(staged: Mapping[Path, Path]) -> None:
    for temporary in staged.values():
        with contextlib.suppress(OSError):  # of the two problems the first one is told
            temporary.unlink(missing_ok=True)


def remove_temporaries(folder: Path) -> None:
    """Remove what writers that were killed left behind; no writer may be at work."""
    for path in folder.rglob(".*.tmp"):
        path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries, so that a rename survives a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _problem(path: Path, error: OSError) -> EnvironmentProblem:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    remedy = "free some space" if full else "check the folder and its permissions"
    return EnvironmentProblem(
        f"could not write {path.name} in {path.parent} ({error.strerror}): {remedy} and repeat the "
        "command; files that were there are intact"
    )
