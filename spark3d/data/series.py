"""Sorting the DICOM files of a folder into series: which make a volume, which are passed over.

Of each file only the header is read. A file with the signature of DICOM that cannot be parsed is a
series of its own, so that its case fails by name and is not lost.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from spark3d.data.dicom_slice import Grouping, is_dicom, read_grouping
from spark3d.errors import DataError

NOT_VOLUMES = frozenset(
    {"RTSTRUCT", "RTPLAN", "RTDOSE", "RTRECORD", "SEG", "SR", "PR", "KO", "REG", "FID", "DOC"}
)
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
        The series in the order of their first files; how many of what kind were passed over; and
        the files that are no DICOM.
    """
    groups: dict[str, list[tuple[Path, Grouping | None]]] = {}
    passed_over: Counter[str] = Counter()
    others = []
    for path in files:
        if not is_dicom(path):
            others.append(path)
        elif (found := _grouping(path)) is None:
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
    series = []
    for key, members in groups.items():
        first = members[0][1]
        if len(members) == 1 and first is not None and not first.frames:
            passed_over[SINGLE] += 1
            continue
        patient = f"patient {first.patient}" if first and first.patient else ""
        series.append(Series(key, patient, tuple(path for path, _ in members)))
    return series, passed_over, others


def _grouping(path: Path) -> Grouping | None:
    try:
        return read_grouping(path)
    except DataError:
        return None
