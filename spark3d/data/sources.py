"""Finding the cases in a folder as people keep them: plain folders, Decathlon, BTCV, nnU-Net.

Only names, `dataset.json` and, in a plain folder, the headers of DICOM files are read here. The
order of cases is that of their ids, which are safe to show: see `data/privacy.py`.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from spark3d.data.case_list import is_case_list, read_case_list
from spark3d.data.checks import check_cases, check_label_names, fault
from spark3d.data.dataset_json import read_json
from spark3d.data.layouts import (
    CaseSource,
    FoundCases,
    decathlon,
    img_and_label,
    is_nnunet,
    nnunet,
    plain,
)
from spark3d.data.privacy import safe_cases
from spark3d.errors import ConfigError

__all__ = ["CaseSource", "FoundCases", "find", "find_cases"]


def find_cases(folder: Path | str, group_pattern: str | None = None) -> list[CaseSource]:
    """The cases of a folder, whatever of the known layouts it has; see `find`."""
    return list(find(folder, group_pattern).cases)


def find(
    folder: Path | str,
    group_pattern: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> FoundCases:
    """Recognise the layout of a folder and list its cases.

    Args:
        folder: a Decathlon task or nnU-Net dataset (with `dataset.json`), a BTCV tree
            (`RawData/Training/img`), `img` beside `label` with files called alike, or any folder
            of volume files and DICOM series, searched recursively; files there that are called
            label, seg, mask, gt and the like, or lie in a folder so called, are no images. Each
            series is a case; its patient is that of its headers. Or a list of cases, a JSON file
            that `data/case_list.py` describes.
        group_pattern: regular expression searched in the id; its first group names the patient.
        progress: called with (files done, files in all) while headers of DICOM files are read.

    Raises:
        ConfigError: `group_pattern` is no regular expression, or has no group.
        DataError: no such folder, no volume in it, duplicate ids, listed files that are absent,
            a folder that may not be read.
    """
    root, pattern = Path(folder), _patient_pattern(group_pattern)
    try:
        return _find(root, pattern, progress)
    except PermissionError as error:  # cases in there would be missed without a word
        raise fault(
            "E-UNREADABLE", Path(error.filename or root), "a folder that may not be read",
            "read access to all of it",
            "change its permissions, or move it out of the data folder",
        ) from None  # fmt: skip


def _find(
    root: Path, pattern: re.Pattern[str] | None, progress: Callable[[int, int], None] | None
) -> FoundCases:
    if not root.is_dir() and not is_case_list(root):
        raise fault(
            "E-NO-FOLDER", root, "no such folder", "a folder of volumes", "check the path of --data"
        )
    found = _recognise(root, progress)
    if found.labels:
        check_label_names(found.labels, root)
    safe, renamed = safe_cases(list(_grouped(found.cases, pattern)))
    cases = tuple(sorted(safe, key=lambda case: case.id))
    if not cases and found.passed_over:
        raise fault(
            "E-NO-CASES", root, f"no volume but {len(found.passed_over)} files named as label maps",
            "at least one image", "rename or move them if they are images",
        )  # fmt: skip
    check_cases(cases, root, found.layout == "list")
    return replace(found, cases=cases, renamed=len(renamed))


def _recognise(root: Path, progress: Callable[[int, int], None] | None) -> FoundCases:
    if is_case_list(root):
        return read_case_list(root)
    description = root / "dataset.json"
    if description.is_file():
        data = read_json(description)
        return nnunet(root, data) if is_nnunet(root, data) else decathlon(root, data)
    trees = (root, root / "RawData", root / "Abdomen" / "RawData")
    for tree in trees:
        if any((tree / part / "img").is_dir() for part in ("Training", "Testing")):
            return img_and_label({tree / "Training": "training", tree / "Testing": "test"})
    if (root / "img").is_dir() and (root / "label").is_dir():
        return img_and_label({root: "training"})
    if (root / "imagesTr").is_dir():
        return nnunet(root, {})
    return plain(root, progress)


def _patient_pattern(text: str | None) -> re.Pattern[str] | None:
    if not text:
        return None
    try:
        pattern = re.compile(text)
    except (re.error, OverflowError) as error:
        raise ConfigError(
            f"--group-pattern {text} is no regular expression ({error}): give one like '^(p[0-9]+)'"
        ) from None
    if not pattern.groups:
        raise ConfigError(
            f"--group-pattern {text} has no group: put the part that names the patient in brackets,"
            " as in '^(p[0-9]+)'"
        )
    return pattern


def _grouped(cases: Iterable[CaseSource], pattern: re.Pattern[str] | None) -> Iterable[CaseSource]:
    for case in cases:
        match = pattern.search(case.id) if pattern else None
        patient = match.group(1) if match else None  # a group of what matches may be left out
        yield replace(case, group=patient, stated=True) if patient else case
