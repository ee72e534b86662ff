"""Writing a store: a case is there whole, with its record written last, or it is not there."""

import contextlib
import fcntl
import logging
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import xxhash
from numpy.typing import NDArray

from spark3d.data.chunks import encode
from spark3d.data.files import put_in_place, write_atomic, write_beside
from spark3d.data.record import (
    FORMAT,
    SUFFIXES,
    CaseRecord,
    case_path,
    encode_extras,
    read_head,
    read_record,
    sealed,
)
from spark3d.errors import ConfigError, EnvironmentProblem

log = logging.getLogger(__name__)
OURS = (".lock*", ".store.json.*.tmp")
"""What a folder may hold before it is a store: locks, and what a kill right at the start left."""


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

    A new store that fails before it has a case leaves nothing behind.

    Args:
        folder: made if absent.
        settings: what the cases are prepared with; a store of other settings is refused.
        shard: number of a share; writers of different shares may work side by side, but none beside
            a writer of the whole.

    Raises:
        EnvironmentProblem: no right to write, or another writer is at work.
        ConfigError: the folder holds something else, or a store of other settings.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], shard: int | None = None) -> None:
        self.folder, self.settings, self._shard = folder, settings, shard
        self._locks: list[TextIO] = []
        self._new_folder = self._new_store = False

    def __enter__(self) -> "StoreWriter":
        self._new_folder = not self.folder.exists()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise EnvironmentProblem(_refusal(self.folder, error)) from None
        try:
            if self._shard is None:
                self._lock(".lock", fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._wait_for_orphans()
                self._claim()
            else:
                self._lock(".lock", fcntl.LOCK_SH | fcntl.LOCK_NB)
                self._lock(f".lock-{self._shard}", fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._wait_for_orphans()
                self._lock(".lock-claim", fcntl.LOCK_EX)  # of shares that start together, in turn
                self._claim()
                self._locks.pop().close()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, problem: type[BaseException] | None = None, *_: object) -> None:
        if problem is not None and self._new_store and self._shard is None:
            self._leave_nothing()
        for lock in self._locks:
            lock.close()
        self._locks.clear()

    def _leave_nothing(self) -> None:
        """Remove a store that this writer began and that has no case, so that it hinders nobody."""
        if any(self.folder.glob("cases/*/*.json")):
            return
        shutil.rmtree(self.folder / "cases", ignore_errors=True)
        with contextlib.suppress(OSError):  # the problem that led here is the one to tell
            for path in (self.folder / "store.json", self.workers_lock, self.folder / ".lock"):
                path.unlink(missing_ok=True)
            if self._new_folder:
                self.folder.rmdir()

    def _lock(self, name: str, kind: int) -> None:
        """Take a lock that ends with this process, however it ends; warn where there are none.

        Raises:
            EnvironmentProblem: no right to write, or another process holds it.
        """
        try:
            self._locks.append((self.folder / name).open("w+"))
        except OSError as error:
            raise EnvironmentProblem(_refusal(self.folder, error)) from None
        try:
            fcntl.flock(self._locks[-1], kind)
        except BlockingIOError:
            raise EnvironmentProblem(
                f"another process is writing to {self.folder}: wait for it, or choose another "
                "folder"
            ) from None
        except OSError as error:
            log.warning(
                "no lock on %s (%s): start no second process on it", self.folder, error.strerror
            )

    @property
    def workers_lock(self) -> Path:
        """File that worker processes of this writer share a lock on for as long as they live."""
        return self.folder / (".lock-work" if self._shard is None else f".lock-work-{self._shard}")

    def _wait_for_orphans(self, seconds: float = 10.0) -> None:
        """Let workers end whose writer was killed: they notice it within a second or two.

        Raises:
            EnvironmentProblem: they do not end.
        """
        until = time.monotonic() + seconds
        while True:
            try:
                with self.workers_lock.open("w+") as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > until:
                    raise EnvironmentProblem(
                        f"worker processes of a killed run still write to {self.folder}: end them, "
                        "then give the command again"
                    ) from None
                time.sleep(0.1)
            except OSError:
                return  # no locks there, as `_lock` has said

    def _claim(self) -> None:
        """Describe a new store, or hold the description of an old one against the settings."""
        path = self.folder / "store.json"
        foreign = [file for file in self.folder.iterdir() if not any(map(file.match, OURS))]
        if not path.exists():  # after the listing, as without locks another share may write it
            if foreign:
                raise ConfigError(
                    f"{self.folder} is not empty and not a store: choose a new or empty folder "
                    "for --out"
                )
            write_atomic(path, sealed({"format": FORMAT, "settings": self.settings}))
            self._new_store = True
            return
        found = read_head(self.folder)["settings"]
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
    """Commit one case: all its files beside the old ones, then in their place, the record last.

    A kill between the two leaves a case without a record, which does not exist; any failure before
    leaves the old one.

    Args:
        folder: the store.
        case: what to store.
        key: what the case was made from, to tell later whether it is up to date.
        side: voxels per axis of a chunk.

    Raises:
        EnvironmentProblem: no space or no right to write; this and other cases are as they were.
    """
    case_id = case.record.id
    record_path = case_path(folder, case_id, ".json")
    content, files = {}, {}
    for part, array in (("image", case.voxels), ("label", case.label)):
        if array is not None:
            data, frame = encode(array, side)
            content[case_path(folder, case_id, SUFFIXES[part])] = data
            files[part] = frame.to_json()
    extras = encode_extras(case.body, case.coordinates)
    content[case_path(folder, case_id, ".npz")] = extras
    described = {**case.record.to_json(), "sidecar_hash": xxhash.xxh3_128_hexdigest(extras)}
    content[record_path] = sealed({"case": described, "files": files, "key": key})
    try:
        record_path.parent.mkdir(parents=True, exist_ok=True)
        staged = write_beside(content)  # a full disk is met here, the old case being whole still
        record_path.unlink(missing_ok=True)
    except OSError as error:
        raise EnvironmentProblem(_refusal(folder, error)) from None
    put_in_place(staged)


def _refusal(folder: Path, error: OSError) -> str:
    return f"cannot write to {folder} ({error.strerror}): check the folder and its permissions"
