"""A list of cases as a JSON file: what `prepare` reads in place of a folder.

It names files where they lie, so it is for the machine it was made on; it holds paths, which can
name patients, and stays with the data.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from spark3d.data.checks import fault
from spark3d.data.files import readable_json, write_atomic
from spark3d.data.layouts import SECTIONS, CaseSource, FoundCases
from spark3d.data.names import safe_name

FORMAT = "spark3d cases 1"


def is_case_list(path: Path) -> bool:
    """Whether a path is a file that can only be a list of cases."""
    return path.is_file() and path.suffix == ".json"


def write_case_list(path: Path, found: FoundCases) -> None:
    """Write a list with absolute paths; the same cases give the same bytes.

    Links are not followed: what they lead to may have no suffix, or lie away from its voxels.
    """
    content = {
        "format": FORMAT,
        "modality": found.modality,
        "labels": found.labels,
        "fourth_axis": found.fourth_axis,
        "cases": [_entry(case) for case in found.cases],
    }
    write_atomic(path, readable_json(content))


def read_case_list(path: Path) -> FoundCases:
    """Read what `write_case_list` wrote, or what was written by hand in its form.

    Raises:
        DataError: another file, entries that do not fit, or a section that does not exist.
    """
    try:
        data = json.loads(path.read_text("utf-8"))
        if data["format"] != FORMAT:
            raise ValueError(data["format"])
        cases = tuple(_case(entry, path.parent) for entry in data["cases"])
        labels = data.get("labels")
        declared = None if labels is None else {str(k): int(v) for k, v in labels.items()}
        modality = str(data.get("modality", "auto"))
        fourth_axis = bool(data.get("fourth_axis", False))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise fault(
            "E-CASE-LIST", path, f"a file that is no list of cases ({type(error).__name__})",
            f'JSON with "format": "{FORMAT}" and "cases": [{{"id", "image", ...}}]',
            "give a folder, or make the list with data_prep.ct_folder",
        ) from None  # fmt: skip
    known = tuple(dict.fromkeys(SECTIONS.values()))
    if wrong := sorted({safe_name(case.section, "*") for case in cases} - set(known)):
        raise fault(
            "E-CASE-LIST", path, f"the sections {', '.join(wrong)}", f"one of {', '.join(known)}",
            "correct them, as cases of an unknown section would be trained on",
        )  # fmt: skip
    return FoundCases("list", cases, modality, declared, fourth_axis)


def _entry(case: CaseSource) -> dict[str, Any]:
    entry: dict[str, Any] = {"id": case.id, "section": case.section}
    if case.has_patient:
        entry["patient"] = case.group
    entry["image"] = str(case.image.absolute())
    if case.label is not None:
        entry["label"] = str(case.label.absolute())
    for key, paths in (("more_channels", case.more_channels), ("slices", case.slices)):
        if paths:
            entry[key] = [str(path.absolute()) for path in paths]
    return entry


def _case(entry: Mapping[str, Any], base: Path) -> CaseSource:
    known = {"id", "patient", "section", "image", "label", "more_channels", "slices"}
    if set(entry) - known or not all(isinstance(entry[key], str) for key in ("id", "image")):
        raise KeyError("unknown keys, or no text")
    label = entry.get("label")
    case = CaseSource(
        id=entry["id"],
        image=base / entry["image"],
        label=None if label is None else base / label,
        group=str(entry.get("patient", "")),
        stated="patient" in entry,
        section=str(entry.get("section", "unlabelled")),
        more_channels=tuple(base / name for name in entry.get("more_channels", ())),
    )
    return replace(case, slices=tuple(base / name for name in entry.get("slices", ())))
