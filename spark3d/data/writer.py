"""Writing a store: a case is there whole, with its record written last, or it is not there."""

import fcntl
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import xxhash
from numpy.typing import NDArray

from spark3d.data.chunks import encode
from spark3d.data.files import write_atomic
from spark3d.data.record import (
    FORMAT,
    CaseRecord,
    case_path,
    encode_extras,
    read_record,
    sealed,
    unsealed,
)
from spark3d.errors import ConfigError, EnvironmentProblem


@dataclass(frozen=True, eq=False)
class PreparedCase:
    """All that is stored of a case. `record.sidecar_hash` is filled in when it is written."""

    record: CaseRecord
    voxels: NDArray[np.int16]
    label: NDArray[np.integer] | None
    body: NDArray[np.uint8]
    coordinates: dict[int, NDArray[np.int32]]


class StoreWriter:
    """Sole writer of a store, as a context manager; several processes may call `write_case` for it.

    Args:
        folder: made if absent.
        settings: what the cases are prepared with; a store of other settings is refused.
        lock: suffix of the lock's name; writers of different suffixes may work side by side.

    Raises:
        EnvironmentProblem: no right to write, or another writer is at work.
        ConfigError: the folder holds something else, or a store of other settings.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], lock: str = "") -> None:
        self.folder, self.settings = folder, settings
        self._lock_name = f".lock{lock}"
        self._lock: TextIO | None = None

    def __enter__(self) -> "StoreWriter":
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = (self.folder / self._lock_name).open("w")
        except OSError as error:
            raise EnvironmentProblem(
                f"cannot write to {self.folder} ({error.strerror}): check the folder and its "
                "permissions"
            ) from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise EnvironmentProblem(
                f"another process is writing to {self.folder}: wait for it, or choose another "
                "folder"
            ) from None
        try:
            self._claim()
        except BaseException:
            self._lock.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            self._lock.close()

    def _claim(self) -> None:
        path = self.folder / "store.json"
        if not path.exists():
            others = [p.name for p in self.folder.iterdir() if not p.name.startswith(".lock")]
            if others:
                raise ConfigError(
                    f"{self.folder} is not empty and not a store: choose a new or empty folder "
                    "for --out"
                )
            write_atomic(path, sealed({"format": FORMAT, "settings": self.settings}))
            return
        found = unsealed(path, "the description of the store")["settings"]
        if found != self.settings:
            changed = sorted(k for k in self.settings if self.settings[k] != found.get(k))
            raise ConfigError(
                f"{self.folder} was prepared with other settings ({', '.join(changed)}): choose "
                "another folder for --out, or the settings in its store.json"
            )

    def finish(self, case_ids: Iterable[str]) -> None:
        """Write the sealed index over these cases, unless it is there already."""
        records = {i: read_record(self.folder, i) for i in sorted(case_ids)}
        index = {
            "cases": [data["case"] for data in records.values()],
            "seals": {case_id: data["seal"] for case_id, data in records.items()},
        }
        path = self.folder / "index.json"
        data = sealed(index)
        if not path.exists() or path.read_bytes() != data:
            write_atomic(path, data)


def write_case(folder: Path, case: PreparedCase, key: dict[str, Any], side: int = 64) -> None:
    """Commit one case: its files first, each atomically, then the record that makes it exist.

    Args:
        folder: the store.
        case: what to store.
        key: what the case was made from, to tell later whether it is up to date.
        side: voxels per axis of a chunk.

    Raises:
        EnvironmentProblem: no space or no right to write; earlier cases are intact.
    """
    case_id = case.record.id
    record_path = case_path(folder, case_id, ".json")
    try:
        record_path.parent.mkdir(parents=True, exist_ok=True)
        record_path.unlink(missing_ok=True)
    except OSError as error:
        raise EnvironmentProblem(f"cannot write to {folder} ({error.strerror})") from None
    files = {}
    parts = {"image": (".b2nd", case.voxels), "label": (".seg.b2nd", case.label)}
    for part, (suffix, array) in parts.items():
        if array is not None:
            data, frame = encode(array, side)
            write_atomic(case_path(folder, case_id, suffix), data)
            files[part] = frame.to_json()
    extras = encode_extras(case.body, case.coordinates)
    write_atomic(case_path(folder, case_id, ".npz"), extras)
    described = {**case.record.to_json(), "sidecar_hash": xxhash.xxh3_128_hexdigest(extras)}
    write_atomic(record_path, sealed({"case": described, "files": files, "key": key}))
