"""The scores of one run over its test cases, as they lie in `evaluation.json` and `.csv`."""

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spark3d.errors import DataError
from spark3d.evaluation.metrics import METRICS

FILE = "evaluation.json"
REFERENCE_GRID, STORE_GRID = "of the reference files", "of the prepared store"
"""What scores are taken on, as `settings["grid"]` says it."""


@dataclass(frozen=True)
class CaseScores:
    """One case: organ -> metric -> value, NaN where an organ is not scored."""

    id: str
    organs: Mapping[str, Mapping[str, float]]

    def mean(self, metric: str) -> float:
        """Mean of one metric over the organs that are scored; NaN if none is."""
        known = [s[metric] for s in self.organs.values() if not math.isnan(s[metric])]
        return sum(known) / len(known) if known else math.nan


@dataclass(frozen=True)
class Evaluation:
    """All cases of one run.

    Args:
        name: how tables call the run.
        labels: label -> organ, without the background.
        cases: one entry per case.
        settings: what a reader must know to repeat it (tolerance, absent rule, versions, folders).
    """

    name: str
    labels: Mapping[int, str]
    cases: tuple[CaseScores, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def values(self, organ: str, metric: str) -> dict[str, float]:
        """Case id -> value of one organ."""
        return {c.id: c.organs[organ][metric] for c in self.cases}

    def means(self, metric: str) -> dict[str, float]:
        """Case id -> mean over the organs of that case."""
        return {c.id: c.mean(metric) for c in self.cases}

    def ranked(self, metric: str = "dice") -> list[str]:
        """Case ids from the lowest to the highest mean; cases without a score are left out."""
        known = {k: v for k, v in self.means(metric).items() if not math.isnan(v)}
        return sorted(known, key=lambda k: known[k])

    def to_json(self) -> str:
        """The text of `evaluation.json`; a score that is NaN is null."""
        cases = [
            {"id": c.id, "organs": {o: _null_nan(s) for o, s in c.organs.items()}}
            for c in self.cases
        ]
        labels = {str(k): v for k, v in self.labels.items()}
        document = {"name": self.name, "labels": labels, "settings": dict(self.settings)}
        return json.dumps({**document, "cases": cases}, indent=1, allow_nan=False) + "\n"

    def to_csv(self) -> str:
        """One line per case and organ; a score that is NaN is empty."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["case", "organ", *METRICS])
        for case in self.cases:
            for organ, scores in case.organs.items():
                values = ["" if math.isnan(v := scores[m]) else f"{v:.6g}" for m in METRICS]
                writer.writerow([case.id, organ, *values])
        return text.getvalue()


def load_evaluation(path: Path) -> Evaluation:
    """Read `evaluation.json`, or the one in a folder.

    Raises:
        DataError: if there is none, or it is not such a file.
    """
    file = path / FILE if path.is_dir() else path
    if not file.is_file():
        raise DataError(f"{file}: no such evaluation; make it with `spark3d evaluate`")
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        return Evaluation(
            name=document["name"],
            labels={int(k): v for k, v in document["labels"].items()},
            cases=case_scores(document["cases"]),
            settings=document.get("settings", {}),
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DataError(
            f"{file}: not an evaluation of spark3d ({type(error).__name__}: {error}); make it "
            "again with `spark3d evaluate`"
        ) from error


def case_scores(cases: Iterable[Mapping[str, Any]]) -> tuple[CaseScores, ...]:
    """The cases as they stand in `evaluation.json`; a score of null is NaN."""
    return tuple(CaseScores(c["id"], _organs(c["organs"])) for c in cases)


def shared_organs(evaluations: Iterable[Evaluation]) -> list[str]:
    """The organs that all runs have, in the order of the first."""
    runs = list(evaluations)
    rest = [set(run.labels.values()) for run in runs[1:]]
    return [o for o in runs[0].labels.values() if all(o in names for names in rest)]


def _null_nan(scores: Mapping[str, float]) -> dict[str, float | None]:
    return {m: None if math.isnan(v) else v for m, v in scores.items()}


def _organs(organs: Mapping[str, Mapping[str, float | None]]) -> dict[str, dict[str, float]]:
    return {
        organ: {m: math.nan if (v := scores[m]) is None else float(v) for m in METRICS}
        for organ, scores in organs.items()
    }
