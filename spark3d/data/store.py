"""A folder of prepared cases, each whole or absent, read with a hash tested each time.

store.json            what it was prepared with
index.json            the sealed list of its cases, written when preparing has ended
cases/ab/<id>.b2nd    intensities `(c, *size)`, int16
cases/ab/<id>.seg.b2nd  labels `(*size)`
cases/ab/<id>.npz     body share per cell, coordinates of classes
cases/ab/<id>.json    the case's record, written last: without it the case does not exist
"""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spark3d.data.chunks import ChunkedFile, Frame
from spark3d.data.record import (
    FORMAT,
    SUFFIXES,
    CaseRecord,
    case_path,
    read_head,
    seal_of,
    unsealed,
)
from spark3d.data.writer import PreparedCase, StoreWriter, write_case
from spark3d.errors import DataError

__all__ = ["CaseRecord", "PreparedCase", "Store", "StoreWriter", "case_path", "write_case"]


class Store:
    """A finished store, open for reading; cheap to copy to worker processes.

    Args:
        folder: the store.
        settings: what it was prepared with.
        cases: its records, in the order of their ids.
        seals: id -> seal of the case's record file.
    """

    def __init__(
        self,
        folder: Path,
        settings: dict[str, Any],
        cases: tuple[CaseRecord, ...],
        seals: dict[str, str],
    ) -> None:
        self.folder, self.settings, self.cases = folder, settings, cases
        self.seals = seals
        self._by_id = {record.id: record for record in cases}
        self._open = lru_cache(64)(self._open_file)

    @classmethod
    def open(cls, path: Path | str) -> "Store":
        """Open a store that `prepare` has finished.

        Raises:
            DataError: not a store, unfinished, damaged, or of another format.
        """
        folder = Path(path)
        if not (folder / "store.json").exists():
            raise DataError(
                f"E-NO-STORE: {folder}: found no store.json; expected a prepared store; run "
                f"'spark3d prepare' with --out {folder}"
            )
        head = read_head(folder)
        if head["format"] != FORMAT:
            raise DataError(
                f"E-STORE-FORMAT: {folder}: found format {head['format']}; expected {FORMAT}; "
                "prepare again"
            )
        if not (folder / "index.json").exists():
            raise DataError(
                f"E-STORE-UNFINISHED: {folder}: found no index; expected a store whose preparing "
                "has ended; run the same prepare command again"
            )
        index = unsealed(folder / "index.json", "the index of the store")
        cases = tuple(
            CaseRecord.from_json(data, case_path(folder, data["id"], ".npz"))
            for data in index["cases"]
        )
        return cls(folder, head["settings"], cases, index["seals"])

    @property
    def spacing_mm(self) -> tuple[float, ...]:
        """Millimetres per voxel, common to all cases."""
        return tuple(self.settings["spacing_mm"])

    @property
    def label_names(self) -> dict[int, str]:
        """Class value -> name as the source declared, without the background."""
        declared = self.settings.get("labels") or {}
        return {v: k for k, v in sorted(declared.items(), key=lambda kv: kv[1]) if v}

    def __len__(self) -> int:
        return len(self.cases)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_open"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open = lru_cache(64)(self._open_file)

    def record(self, case_id: str) -> CaseRecord:
        """The record of one case.

        Raises:
            DataError: there is no such case.
        """
        if case_id not in self._by_id:
            raise DataError(
                f"E-NO-CASE: {self.folder}: found no case {case_id}; expected one of its "
                f"{len(self)}; check the split, or prepare the case"
            )
        return self._by_id[case_id]

    def read(
        self, case_id: str, start: Sequence[int] | None = None, size: Sequence[int] | None = None
    ) -> NDArray[np.float32]:
        """A box of intensities `(c, *size)` in physical units (HU for CT).

        Args:
            case_id: the case.
            start: first voxel, default the origin.
            size: voxels per axis, default up to the far end.

        Raises:
            ValueError: the box does not lie inside the case.
            DataError: unknown case, or damage on disk.
        """
        record = self.record(case_id)
        start, size = _box(record, start, size)
        box = (0, *start), (record.channels, *size)
        return record.physical(self._open(case_id, "image").read(*box, dtype=np.float32))

    def read_label(
        self, case_id: str, start: Sequence[int] | None = None, size: Sequence[int] | None = None
    ) -> NDArray[np.generic]:
        """The same box of the label map, `(*size)`, uint8 or int16.

        Raises:
            ValueError: the case has no label, or the box does not lie inside it.
            DataError: unknown case, or damage on disk.
        """
        record = self.record(case_id)
        if not record.has_label:
            raise ValueError(f"case {case_id} has no label")
        return self._open(case_id, "label").read(*_box(record, start, size))

    def verify(self, case_id: str) -> None:
        """Read all of a case.

        Raises:
            DataError: anything of it was altered.
        """
        record = self.record(case_id)
        self.read(case_id)
        if record.has_label:
            self.read_label(case_id)
        _ = record.body

    def voxel_hash(self, case_id: str) -> str:
        """Hash of a case's stored intensities and labels, under its id.

        It is the same however often the case is prepared, from whatever copy of the same files, by
        one version of the compressor and with chunks of one size.

        Raises:
            DataError: unknown case, or its record was altered.
        """
        record, frames = self.record(case_id), self._record_file(case_id)["files"]
        kept = {part: [f["shape"], f["dtype"], f["chunk_hashes"]] for part, f in frames.items()}
        return seal_of({"id": case_id, "scale": record.scale, "shift": record.shift, **kept})

    def _open_file(self, case_id: str, part: str) -> ChunkedFile:
        frame = Frame.from_json(self._record_file(case_id)["files"][part])
        return ChunkedFile(case_path(self.folder, case_id, SUFFIXES[part]), frame, case_id)

    def _record_file(self, case_id: str) -> dict[str, Any]:
        data = unsealed(case_path(self.folder, case_id, ".json"), f"the record of case {case_id}")
        if data["seal"] != self.seals[case_id]:
            raise DataError(
                f"E-STORE-DAMAGED: case {case_id}: its record is not the one in the index; run "
                "prepare again"
            )
        return data


def _box(
    record: CaseRecord, start: Sequence[int] | None, size: Sequence[int] | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    first = tuple(start) if start is not None else (0,) * len(record.size)
    if size is None:
        return first, tuple(n - a for n, a in zip(record.size, first, strict=True))
    return first, tuple(size)
