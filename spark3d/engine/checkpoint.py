"""Atomic checkpoints, verified when read; a damaged one falls back to the one before, aloud."""

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from spark3d.errors import DataError, EnvironmentProblem

log = logging.getLogger(__name__)


def sha256(path: Path) -> str:
    """Hash of a file's bytes, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def write_atomically(path: Path, content: bytes) -> None:
    """Write next to `path`, flush to disk, then rename: readers see the old file or the new one.

    Raises:
        EnvironmentProblem: the disk is full or not writable; nothing is left behind.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise EnvironmentProblem(
            f"cannot write {path}: {error.strerror}; free space or choose another --out"
        ) from None


class Stateful(Protocol):
    """What has a state to save and to put back: modules and optimisers."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state_dict: Any, /) -> Any: ...


class Checkpoints:
    """The newest `keep` checkpoints of a run, `step_00000100.pt` with a hash beside each."""

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder = folder
        self.keep = keep

    def files(self) -> list[Path]:
        """Committed checkpoints, oldest first."""
        return sorted(f for f in self.folder.glob("step_*.pt") if f.with_suffix(".json").is_file())

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Save `state` as that after `step` steps; the hash is written last and commits it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"step_{step:08d}.pt"
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with temporary.open("wb") as file:
                torch.save({"step": step, **state}, file)
                file.flush()
                os.fsync(file.fileno())
            mark = {"step": step, "sha256": sha256(temporary), "bytes": temporary.stat().st_size}
            path.with_suffix(".json").unlink(missing_ok=True)
            os.replace(temporary, path)
        except (OSError, RuntimeError) as error:
            temporary.unlink(missing_ok=True)
            raise EnvironmentProblem(
                f"cannot write the checkpoint {path}: {error}; the previous one is untouched"
            ) from None
        write_atomically(path.with_suffix(".json"), json.dumps(mark).encode())
        for old in self.files()[: -self.keep]:
            old.with_suffix(".json").unlink()
            old.unlink()
        return path

    def latest(self) -> dict[str, Any] | None:
        """The newest checkpoint that verifies, or None if the run has none yet.

        Raises:
            DataError: there are checkpoints, and every one is damaged.
        """
        files = self.files()
        for path in reversed(files):
            problem = self._problem(path)
            if problem is None:
                return torch.load(path, map_location="cpu", weights_only=True)
            log.warning(
                "checkpoint %s is damaged (%s): using the one before it", path.name, problem
            )
        if files:
            raise DataError(
                f"every checkpoint in {self.folder} is damaged; start again with another --out"
            )
        return None

    def resume(self, parts: Mapping[str, "Stateful"]) -> int:
        """Put the newest state that verifies into `parts`; the steps done, 0 if there is none.

        Raises:
            DataError: as `latest`.
        """
        state = self.latest()
        if state is None:
            return 0
        for name, part in parts.items():
            part.load_state_dict(state[name])
        log.info("resuming %s after step %d", self.folder.parent, state["step"])
        return state["step"]

    def save_parts(self, step: int, parts: Mapping[str, "Stateful"]) -> Path:
        """Save the state of `parts`, which `resume` puts back."""
        return self.save(step, {name: part.state_dict() for name, part in parts.items()})

    def _problem(self, path: Path) -> str | None:
        try:
            mark = json.loads(path.with_suffix(".json").read_text())
            if sha256(path) != mark["sha256"]:
                return "its hash differs from the one recorded when it was written"
        except (OSError, ValueError, KeyError) as error:
            return f"its record cannot be read: {error}"
        return None
