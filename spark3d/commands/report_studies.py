"""Label-efficiency studies as the report shows them."""

import math
from dataclasses import dataclass
from pathlib import Path

from spark3d.commands.label_tables import SHOWN, ReadStudy, label_points, read_study, warnings
from spark3d.evaluation.efficiency import organs_of, points, table_rows
from spark3d.evaluation.tables import TITLES
from spark3d.reports.efficiency import efficiency_chart
from spark3d.reports.html import Chart, Study, TextTable


@dataclass(frozen=True)
class StudyFolder:
    """A study and what the page calls it."""

    name: str
    study: ReadStudy

    @property
    def command(self) -> str:
        """The command line that made it."""
        return str(self.study.facts["command"])

    @property
    def verdict(self) -> str:
        """What the paired differences say, count by count, and no more."""
        study = self.study
        parts = []
        for p in points(study.jobs, study.arms, "dice"):
            if (d := p.change) is None or math.isnan(d.mean):
                continue
            low, high = (round(v, 3) for v in (d.interval.low, d.interval.high))
            clear = not math.isnan(low) and (low > 0 or high < 0)
            word = ("better" if low > 0 else "worse") if clear else "not clearly different"
            interval = "" if math.isnan(low) else f", 95 % interval {low:+.3f} to {high:+.3f}"
            parts.append(
                f"{p.labels} labels: {p.arm} is {word} ({d.mean:+.3f} Dice{interval}, up in "
                f"{d.positive} of {d.pairs} pairs)."
            )
        return " ".join(parts) or f"{self.name}: no pair is finished yet."


def read_study_folder(name: str, folder: Path) -> StudyFolder:
    """Read the folder of a study."""
    return StudyFolder(name, read_study(folder))


def study_section(folder: StudyFolder) -> Study:
    """Chart, tables per metric and per organ."""
    study, facts = folder.study, folder.study.facts
    lead = (
        f"{facts['done']} fine-tunings of {facts['steps']} steps, scored on "
        f"{len(facts['validation'])} cases on the grid {facts['grid']}. In a pair, only the start "
        "differs: split, subset, crops and the weights that are not pre-trained are the same."
    )
    legend = tuple((arm, number) for number, arm in enumerate(study.arms))
    chart = Chart(
        f"{folder.name}: mean Dice over labels", efficiency_chart(label_points(study), study.arms),
        legend, "Mean over subsets; bars are 95 % t-intervals, at right of the paired change.",
    )  # fmt: skip
    tables = [_table(study, metric, None) for metric in SHOWN]
    tables += [_table(study, "dice", organ) for organ in organs_of(study.jobs)]
    return Study(lead, tuple(warnings(study)), chart, tuple(tables))


def _table(study: ReadStudy, metric: str, organ: str | None) -> TextTable:
    heads, rows = table_rows(study.jobs, study.arms, metric, organ)
    title = TITLES[metric] if organ is None else organ.replace("_", " ")
    return TextTable(title, tuple(heads), tuple(tuple(row) for row in rows))
