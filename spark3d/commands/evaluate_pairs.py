"""Which prediction belongs to which reference, and whether the two can be compared."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from spark3d.commands.predict_ledger import FILE as PREDICT_FILE
from spark3d.data.checks import check_same_grid, fault
from spark3d.data.grid import Volume
from spark3d.data.io import Source, read_label
from spark3d.data.names import shown
from spark3d.data.nifti_header import Geometry
from spark3d.data.privacy import safe_cases
from spark3d.data.sources import CaseSource, find
from spark3d.errors import DataError

DATASETS = ("dataset.json", "RawData", "Abdomen", "Training", "Testing", "img", "imagesTr")
"""Names in a folder that tell a dataset from a plain folder of label maps."""


@dataclass(frozen=True)
class Pair:
    """One case: its prediction, its reference, and its image where that is known.

    `geometry` says which part of a contradictory header of the files to trust.
    """

    id: str
    prediction: Path
    reference: Path
    image: Source | None = None
    geometry: Geometry = "agree"


@dataclass(frozen=True)
class Pairs:
    """All cases to score.

    Args:
        cases: in the order of their ids.
        labels: label -> organ.
        window: darkest and brightest intensity for pictures, None to choose by case.
        unpredicted: references left out for lack of a prediction.
        spacing_mm: of the grid the model reads, None where it is not recorded.
        scored: labels that the run's recipe scores, none for all.
        trained_on: cases whose voxels the model was trained on.
    """

    cases: tuple[Pair, ...]
    labels: dict[int, str]
    window: tuple[float, float] | None
    unpredicted: tuple[str, ...]
    spacing_mm: tuple[float, ...] | None = None
    scored: tuple[int, ...] = ()
    trained_on: tuple[str, ...] = ()

    @property
    def organs(self) -> dict[int, str]:
        """The labels that are scored."""
        return {k: name for k, name in self.labels.items() if not self.scored or k in self.scored}


def find_pairs(
    predictions: Path,
    references: Path,
    labels: Mapping[int, str] | None,
    partial: bool,
    images: Path | None = None,
    geometry: Geometry | None = None,
) -> Pairs:
    """Pair label maps by case id.

    Of a dataset, only the sections that have predictions count, such as its validation cases; of
    predictions with `--held-out`, only the cases that the model's run held out.
    Headers are trusted as `geometry` says, or as the prediction did.

    Raises:
        DataError: no such folder, no file, cases without a partner (all listed), no labels known.
    """
    predicted = label_files(predictions, "predictions")
    record = read_record(predictions)
    cases, declared = _references(references)
    known = {c.id: c for c in cases if c.label is not None}
    strange = sorted(predicted.keys() - known.keys())
    if strange:
        raise DataError(
            f"{len(strange)} predictions in {shown(predictions)} have no reference in "
            f"{shown(references)}: {_some(strange)}; give the folder of their labels, with files "
            "called alike"
        )
    sections = {known[case].section for case in predicted}
    wanted = {case for case, c in known.items() if c.section in sections}
    if (held_out := record.get("held_out")) is not None:
        wanted &= set(held_out)
    missing = sorted(wanted - predicted.keys())
    if missing and not partial:
        raise DataError(
            f"{len(missing)} references in {shown(references)} have no prediction in "
            f"{shown(predictions)}: {_some(missing)}; predict them, or ask for a partial evaluation"
        )
    volumes = {c.id: c.sources[0] for c in find(images).cases} if images else {}
    trusted: Geometry = geometry or (record.get("settings") or {}).get("geometry") or "agree"
    pairs = []
    for case in sorted(predicted):
        reference = known[case]
        given = None if reference.image == reference.label else reference.image
        image = volumes.get(case, given)
        pairs.append(Pair(case, predicted[case], reference.label or Path(), image, trusted))
    return Pairs(
        tuple(pairs),
        dict(labels or _labels(record) or declared or _found(pairs)),
        _window(record),
        tuple(missing),
        _spacing(record),
        tuple((record.get("score") or {}).get("labels", ())),
        tuple(sorted(c for c in predicted if record_of(record, c).get("trained_on"))),
    )


def record_of(record: Mapping[str, Any], case: str) -> Mapping[str, Any]:
    """What `predict` noted of one case; empty where it noted nothing."""
    return (record.get("cases") or {}).get(case) or {}


def read_pair(pair: Pair, labels: Iterable[int]) -> tuple[Volume, Volume]:
    """Reference and prediction of a case, on one grid, with declared labels only.

    Raises:
        DataError: they are on two grids, or hold other labels; names the case.
    """
    reference = read_label(pair.reference, geometry=pair.geometry)
    prediction = read_label(pair.prediction)
    try:
        check_same_grid(prediction.source, reference.source, pair.id)
    except DataError:
        raise fault(
            "E-EVAL-GRID", pair.id,
            f"a prediction of size {prediction.source.size} on another grid than the reference of "
            f"size {reference.source.size}", "one grid, to 1e-3 mm",
            "predict from the image that the reference was drawn on",
        ) from None  # fmt: skip
    for volume, what in ((reference, "reference"), (prediction, "prediction")):
        allowed = {0, *labels}
        wrong = sorted({int(v) for v in np.unique(volume.array)} - allowed)
        if wrong:
            raise fault(
                "E-LABEL-RANGE", pair.id, f"the labels {_some(wrong)} in the {what}",
                f"the declared labels {_some(sorted(allowed))}",
                "declare these labels, or map them to declared ones",
            )  # fmt: skip
    return reference, prediction


def label_files(folder: Path, what: str) -> dict[str, Path]:
    """Case id, safe to show -> label map of the NIfTI files that lie directly in a folder.

    Raises:
        DataError: no such folder, or none in it.
    """
    if not folder.is_dir():
        raise DataError(f"no such folder of {what}: {shown(folder)}")
    seen = (f for f in sorted(folder.iterdir()) if not f.name.startswith("."))
    files = [f for f in seen if f.name.endswith((".nii", ".nii.gz"))]
    named = [CaseSource(f.name.removesuffix(".gz").removesuffix(".nii"), f) for f in files]
    found = {case.id: case.image for case in safe_cases(named)[0]}
    if not files:
        hint = "; predict without --format dicom-seg to score" if any(folder.glob("*.dcm")) else ""
        raise DataError(f"no NIfTI file in the folder of {what}, {shown(folder)}{hint}")
    if len(found) < len(files):
        raise DataError(
            f"{shown(folder)} holds a case twice, as .nii and .nii.gz; keep one of the two"
        )
    return found


def _references(folder: Path) -> tuple[list[CaseSource], dict[int, str]]:
    """Labelled cases and declared labels of a dataset or of a plain folder of label maps."""
    if folder.is_dir() and any((folder / name).exists() for name in DATASETS):
        found = find(folder)
        named = {v: name for name, v in (found.labels or {}).items() if v}
        return safe_cases(found.cases)[0], named
    files = label_files(folder, "references")
    return [CaseSource(id=case, image=file, label=file) for case, file in files.items()], {}


def read_record(predictions: Path) -> dict[str, Any]:
    """What `predict` noted beside its label maps; empty where it did not make them.

    Raises:
        DataError: it is damaged.
    """
    file = predictions / PREDICT_FILE
    if not file.is_file():
        return {}
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        record = None
    if not isinstance(record, dict):
        raise DataError(f"{file} is damaged; predict again, or move it away")
    return record


def _labels(record: Mapping[str, Any]) -> dict[int, str]:
    return {int(k): str(name) for k, name in record.get("labels", {}).items()}


def _found(pairs: Iterable[Pair]) -> dict[int, str]:
    """Names for the labels that occur in the references, where nobody declared any."""
    maps = (read_label(pair.reference, geometry=pair.geometry) for pair in pairs)
    values = {int(v) for label in maps for v in np.unique(label.array)}
    if not values - {0}:
        raise DataError("no label in any reference; give the folder of the reference labels")
    return {v: f"label {v}" for v in sorted(values - {0})}


def _window(record: Mapping[str, Any]) -> tuple[float, float] | None:
    window = record.get("window", {})
    low, high = window.get("low"), window.get("high")
    return None if low is None or high is None else (float(low), float(high))


def _spacing(record: Mapping[str, Any]) -> tuple[float, ...] | None:
    spacing = record.get("spacing_mm")
    return tuple(float(s) for s in spacing) if spacing else None


def _some(values: Iterable[object], most: int = 8) -> str:
    texts = [str(v) for v in values]
    rest = f" and {len(texts) - most} more" if len(texts) > most else ""
    return ", ".join(texts[:most]) + rest
