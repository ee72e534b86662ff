"""Label-efficiency studies as the report shows them."""

import math
from dataclasses import dataclass
from pathlib import Path

from spark3d.commands.label_tables import (
    SHOWN,
    ReadStudy,
    label_points,
    own_rates,
    read_study,
    warnings,
)
from spark3d.evaluation.efficiency import Point, organs_of, points, table_rows
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
        study, parts = self.study, []
        found = points(study.jobs, study.arms, "dice")
        for arm in study.arms[1:]:
            said = [_said(p) for p in found if p.arm == arm and p.change and p.change.pairs]
            if said:
                parts.append(f"{arm} against {study.arms[0]}: {'; '.join(said)}.")
        if len(study.arms) == 1:
            means = [f"{p.mean:.3f} at {p.labels} labels" for p in found]
            return f"{study.arms[0]}: mean Dice {'; '.join(means)}."
        return " ".join(parts) or f"{self.name}: no pair is finished yet."


def _said(point: Point) -> str:
    """One label count in words that claim no more than the interval does."""
    change = point.change
    assert change is not None
    low, high = (round(v, 3) for v in (change.interval.low, change.interval.high))
    clear = not math.isnan(low) and (low > 0 or high < 0)
    word = "" if clear else " (not clear)"
    return f"{change.mean:+.3f} Dice at {point.labels} labels{word}"


def read_study_folder(name: str, folder: Path) -> StudyFolder:
    """Read the folder of a study."""
    return StudyFolder(name, read_study(folder))


def study_section(folder: StudyFolder) -> Study:
    """Chart, tables per metric and per organ."""
    study, facts = folder.study, folder.study.facts
    lead = (
        f"{facts['done']} fine-tunings of {facts['steps']} steps, scored on "
        f"{len(facts['validation'])} cases on the grid {facts['grid']}."
    )
    if len(study.arms) > 1:
        rates = own_rates(facts)
        differs = "the start and its learning rate differ" if rates else "only the start differs"
        lead += (
            f" In a pair, {differs}: split, subset, crops and the weights that are not "
            f"pre-trained are the same. {rates}"
        ).rstrip()
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
