"""`predict.json`: what made the label maps of a folder, and which of them are whole."""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from spark3d.build import LoadedSegmenter
from spark3d.commands.command_line import recorded_command
from spark3d.commands.runs import versions
from spark3d.data.files import write_atomic
from spark3d.data.source_files import Stamp, check_unchanged, fingerprint, same_files
from spark3d.data.sources import CaseSource
from spark3d.errors import ConfigError, EnvironmentProblem
from spark3d.weights.exchange import file_sha256

FILE = "predict.json"
SUFFIX: Mapping[str, str] = MappingProxyType({"nifti": ".nii.gz", "dicom-seg": ".dcm"})
"""Of the files that hold label maps, by format."""


class OtherPrediction(ConfigError):
    """A folder holds label maps of another model, or made with other settings."""


class Ledger:
    """`predict.json`: what made the label maps of a folder, and which of them are whole."""

    def __init__(self, folder: Path, record: dict[str, Any], trained_on: frozenset[str]) -> None:
        self.folder, self.record, self.trained_on = folder, record, trained_on

    @classmethod
    def open(
        cls,
        folder: Path,
        segmenter: LoadedSegmenter,
        settings: Mapping[str, Any],
        held_out: Sequence[str] | None = None,
    ) -> "Ledger":
        """Start a folder, or go on with one of the same model and settings.

        Args:
            folder: gets the label maps.
            segmenter: what makes them.
            settings: how.
            held_out: the cases that the model's run held out, where only these are asked for.

        Raises:
            ConfigError: the folder holds something else.
            EnvironmentProblem: it cannot be made.
        """
        record = {
            "kind": "predict",
            "command": shlex.join(recorded_command()),
            "model_sha256": segmenter.card.sha256,
            "settings": json.loads(json.dumps(settings)),
            "labels": {str(k): name for k, name in segmenter.labels.items()},
            "window": asdict(segmenter.window),
            "spacing_mm": list(segmenter.spacing_mm),
            "protocol": segmenter.card.recipe.get("protocol"),
            "score": segmenter.card.recipe.get("score", {}),
            "held_out": None if held_out is None else list(held_out),
            "versions": versions(),
            "cases": {},
        }
        file = folder / FILE
        if file.is_file():
            record["cases"] = _same_prediction(file, record)
        elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ConfigError(f"--out {folder} holds something else; choose a new folder")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise EnvironmentProblem(
                f"cannot write --out {folder}: {error.strerror}; choose another folder"
            ) from None
        ledger = cls(folder, record, frozenset(segmenter.card.trained_on))
        ledger._write()
        return ledger

    def file(self, case: str) -> Path:
        """Where the label map of a case is kept."""
        return self.folder / f"{case}{SUFFIX[self.record['settings']['format']]}"

    def is_done(self, case: CaseSource) -> bool:
        """Whether the label map of a case is there as it was written, of the same image files."""
        file, entry = self.file(case.id), self.record["cases"].get(case.id)
        return (
            entry is not None
            and file.is_file()
            and file_sha256(file) == entry["sha256"]
            and same_files(replace(case, label=None), entry.get("files", ()))
        )

    def add(
        self, case: CaseSource, read: Sequence[Stamp], content_hash: str, moved: str, seconds: float
    ) -> None:
        """Note a label map that has just been written, of files as they were when read.

        Raises:
            DataError: they have changed since.
        """
        files = fingerprint(read)
        check_unchanged(case, read)
        self.record["cases"][case.id] = {
            "files": files,
            "content_hash": content_hash,
            "trained_on": content_hash in self.trained_on,
            "sha256": file_sha256(self.file(case.id)),
            "moved": moved,
            "seconds": round(seconds, 2),
        }
        self._write()

    def discard(self, case: str) -> None:
        """Remove a label map that is not, or no longer, of the case's image."""
        self.file(case).unlink(missing_ok=True)
        if self.record["cases"].pop(case, None) is not None:
            self._write()

    def _write(self) -> None:
        write_atomic(self.folder / FILE, (json.dumps(self.record, indent=1) + "\n").encode())


def _same_prediction(file: Path, record: dict[str, Any]) -> dict[str, Any]:
    try:
        old = json.loads(file.read_text(encoding="utf-8"))
        cases = dict(old["cases"])
        old["settings"] = {"modality": "auto", **old["settings"]}  # as it was before it was noted
        different = [k for k in ("model_sha256", "settings", "labels") if old[k] != record[k]]
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(f"{file} cannot be read; choose a new folder for --out") from None
    if different:
        raise OtherPrediction(
            f"--out {file.parent} holds predictions with other {', '.join(different)}; choose a "
            "new folder"
        )
    return cases
