"""Sorting the DICOM files of a folder into series: which make a volume, which are passed over.

Of each file only the header is read. What may be a slice and cannot be read as one is a series of
its own, so that its case fails by name and no volume gets shorter without a word: a file with the
signature of DICOM that cannot be parsed, one called `.dcm` without it, one that cannot be opened,
an empty one beside DICOM files. The last two may have no suffix of another kind.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from spark3d.data.dicom_slice import Grouping, is_dicom, read_grouping
from spark3d.errors import DataError

NOT_VOLUMES = frozenset(
    {"RTSTRUCT", "RTPLAN", "RTDOSE", "RTRECORD", "SEG", "SR", "PR", "KO", "REG", "FID", "DOC"}
)
NO_SLICES = (
    ".txt", ".csv", ".tsv", ".json", ".xml", ".md", ".pdf", ".png", ".jpg", ".zip",
)  # fmt: skip
"""Well known suffixes of other files, which may be absent or empty without harm."""
NO_IMAGE = "DICOM files that hold no image (such as DICOMDIR or RTSTRUCT)"
LOCALISER = "localiser slices"
SINGLE = "DICOM series of a single image (scouts, dose reports)"


@dataclass(frozen=True)
class Series:
    """The files of one series.

    `key` and `patient` are texts of the header: they may leave the program as keyed hashes only.
    """

    key: str
    patient: str
    files: tuple[Path, ...]


def sort_series(
    files: Iterable[Path], progress: Callable[[], None] | None = None
) -> tuple[list[Series], Counter[str], list[Path]]:
    """Group the DICOM files among `files` by their series, wherever they lie.

    Args:
        files: any files.
        progress: called after each.

    Returns:
        The series in the order of their first files, those of an empty file last; how many of what
        kind were passed over; and the files that are no DICOM.
    """
    groups: dict[str, list[tuple[Path, Grouping | None]]] = {}
    passed_over: Counter[str] = Counter()
    others = []
    folders = set()
    for path in files:
        state = _state(path)
        if state == "dicom":
            folders.add(path.parent)
        if state == "other":
            others.append(path)
        elif state == "lost" or (found := _grouping(path)) is None:
            groups[f"file {path}"] = [(path, None)]
        elif not found.has_image or found.modality in NOT_VOLUMES:
            passed_over[NO_IMAGE] += 1
        elif found.localiser:
            passed_over[LOCALISER] += 1
        else:
            key = f"series {found.series or path.parent}"
            groups.setdefault(key, []).append((path, found))
        if progress:
            progress()
    empty = [path for path in others if path.parent in folders and _is_empty(path)]
    groups |= {f"file {path}": [(path, None)] for path in empty}
    others = [path for path in others if f"file {path}" not in groups]
    series = []
    for key, members in groups.items():
        first = members[0][1]
        if len(members) == 1 and first is not None and not first.frames:
            passed_over[SINGLE] += 1
            continue
        patient = f"patient {first.patient}" if first and first.patient else ""
        series.append(Series(key, patient, tuple(path for path, _ in members)))
    return series, passed_over, others


def _state(path: Path) -> Literal["dicom", "lost", "other"]:
    """Whether a file has the signature of DICOM, should have it, or is of another kind."""
    try:
        if is_dicom(path):
            return "dicom"
    except DataError:
        return "other" if path.suffix.lower() in NO_SLICES else "lost"
    return "lost" if path.suffix.lower() == ".dcm" else "other"


def _is_empty(path: Path) -> bool:
    """Whether a file may be a slice whose content was lost; it could be read just now."""
    return path.suffix.lower() not in NO_SLICES and not path.stat().st_size


def _grouping(path: Path) -> Grouping | None:
    try:
        return read_grouping(path)
    except DataError:
        return None
