"""Evaluations as the report shows them: tables, spreads, cases, and a verdict in words."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from spark3d.errors import ConfigError
from spark3d.evaluation.results import (
    FILE,
    REFERENCE_GRID,
    Evaluation,
    load_evaluation,
    shared_organs,
)
from spark3d.evaluation.statistics import PairedDifference
from spark3d.evaluation.tables import (
    Cell,
    Row,
    Table,
    compare,
    digits,
    format_cell,
    format_interval,
)
from spark3d.reports.curves import Scores, box_chart, pair_chart
from spark3d.reports.html import (
    Change,
    Chart,
    Headline,
    ScoreCell,
    ScoreRow,
    ScoreTable,
    Tone,
)

LOWER_IS_BETTER = ("hd95_mm", "asd_mm")
UNDER_TRAINED = 0.3
"""An organ of the first run below this mean Dice makes a comparison say little."""


@dataclass(frozen=True)
class Scored:
    """An evaluation and the folder it was read from."""

    folder: Path
    scores: Evaluation


def read_scores(name: str | None, folder: Path) -> Scored:
    """Read an evaluation folder; `name` replaces the one in it."""
    scores = load_evaluation(folder)
    return Scored(folder, replace(scores, name=name) if name else scores)


def check_comparable(runs: Sequence[Evaluation]) -> None:
    """Refuse scores that do not stand for the same thing in every run.

    Raises:
        ConfigError: other grids, or other tolerances of the surface Dice.
    """
    for run in runs[1:]:
        if (one := grid_of(runs[0])) != (other := grid_of(run)):
            raise ConfigError(
                f"{runs[0].name} was scored on {one}, {run.name} on {other}: score both on the "
                "same, or report them apart"
            )
        for organ in shared_organs([runs[0], run]):
            within = [tolerance_mm(r, organ) for r in (runs[0], run)]
            if within[0] != within[1]:
                raise ConfigError(
                    f"the surface Dice of {organ} is within {within[0]} mm in {runs[0].name}, "
                    f"{within[1]} mm in {run.name}: evaluate both with the same --tolerance-mm"
                )


def tolerance_mm(run: Evaluation, organ: str) -> float | None:
    """Of the surface Dice of one organ; None where it was not recorded."""
    known = run.settings.get("tolerance_mm")
    return known.get(organ) if isinstance(known, Mapping) else known


def grid_of(run: Evaluation) -> str:
    """The grid that a run was scored on, in words that follow "on"."""
    grid = run.settings.get("grid", REFERENCE_GRID)
    return "the original grid" if grid == REFERENCE_GRID else f"the grid {grid}"


def score_table(runs: Sequence[Evaluation], metric: str) -> ScoreTable:
    """One metric of all runs for the page."""
    table = compare(runs, metric)
    tolerance = runs[0].settings.get("tolerance_mm")
    titles = {
        "dice": "Dice",
        "nsd": f"NSD within {tolerance:g} mm" if isinstance(tolerance, int | float) else "NSD",
        "hd95_mm": "HD95, mm",
        "asd_mm": "Mean surface distance, mm",
        "volume_error": "Volume error",
    }
    rows = tuple(_row(row, metric) for row in table.rows)
    return ScoreTable(titles[metric], table.runs, rows, _table_note(table))


def spread_charts(runs: Sequence[Evaluation]) -> list[Chart]:
    """Dice per organ as boxes, and each case from the first run to the second."""
    legend = tuple((r.name, i) for i, r in enumerate(runs))
    organs = shared_organs(runs)
    boxes = [
        Scores(r.name, {spaced_out(o): list(r.values(o, "dice").values()) for o in organs})
        for r in runs
    ]
    note = "Box: quartiles; thick line: median; dots: cases; whiskers: 1.5 quartile ranges."
    charts = [Chart("Dice per organ over cases", box_chart(boxes, "Dice", None), legend, note)]
    if len(runs) > 1:
        first, second = runs[0].means("dice"), runs[1].means("dice")
        svg = pair_chart(first, second, "mean Dice over organs")
        title = f"Every case: {runs[0].name} and {runs[1].name}"
        charts.append(Chart(title, svg, legend[:2]))
    return charts


def headlines(runs: Sequence[Evaluation]) -> list[Headline]:
    """Mean Dice of each run, and what each further run changes against the first."""
    table = compare(runs, "dice")
    total = table.rows[-1]
    found = []
    for i, (name, cell) in enumerate(zip(table.runs, total.cells, strict=True)):
        spread = "" if math.isnan(cell.sd) else f"± {cell.sd:.3f} over "
        note = f"mean Dice {spread}{cell.cases} cases"
        if not math.isnan(cell.interval.low):
            note += f"; 95 % bootstrap {format_interval(cell.interval, 'dice')}"
        found.append(
            Headline(name, format_cell(replace(cell, sd=math.nan), "dice"), note, colour=i)
        )
    for name, d in zip(table.runs[1:], total.differences, strict=True):
        if not d.pairs:
            continue
        note = f"{_interval(d, 'dice')}, up in {d.positive} of {d.pairs} cases"
        label = f"{name} minus {table.runs[0]}"
        found.append(Headline(label, f"{d.mean:+.3f}", note, tone(d, "dice")))
    return found


def verdict(runs: Sequence[Evaluation]) -> str:
    """What the scores say, in words that claim no more than the interval does."""
    total = compare(runs, "dice").rows[-1]
    if len(runs) == 1:
        return (
            f"{runs[0].name} reaches a mean Dice of {total.cells[0].mean:.3f} over "
            f"{total.cells[0].cases} cases and {len(runs[0].labels)} organs, on {grid_of(runs[0])}."
        )
    parts = []
    for run, d in zip(runs[1:], total.differences, strict=True):
        if not d.pairs:
            parts.append(f"{run.name} and {runs[0].name} share no case, so they are not compared.")
            continue
        says = {
            "good": f"{run.name} is better than {runs[0].name}",
            "bad": f"{run.name} is worse than {runs[0].name}",
            "even": f"No clear difference between {run.name} and {runs[0].name}",
        }[tone(d, "dice")]
        parts.append(
            f"{says}: {d.mean:+.3f} Dice ({_interval(d, 'dice')}; higher in {d.positive} of "
            f"{d.pairs} cases)."
        )
    weak = weak_organs(runs[0])
    if weak:
        parts.append(
            f"Take this with care: {runs[0].name} is under-trained, with a mean Dice below "
            f"{UNDER_TRAINED} for {', '.join(map(spaced_out, weak))}."
        )
    return capitalised(" ".join(parts))


def capitalised(text: str) -> str:
    """The text with its first letter large, and no other changed."""
    return text[:1].upper() + text[1:]


def spaced_out(organ: str) -> str:
    """An organ's name as people write it, `left_kidney` with a space."""
    return organ.replace("_", " ")


def weak_organs(run: Evaluation) -> list[str]:
    """Organs whose mean Dice says that training had hardly begun to find them."""
    return [r.name for r in compare([run], "dice").rows[:-1] if r.cells[0].mean < UNDER_TRAINED]


def command_of(folder: Path) -> list[str]:
    """Command lines recorded by an evaluation and by the prediction it scored."""
    settings = load_evaluation(folder / FILE).settings
    return [str(settings[key]) for key in ("predict_command", "command") if settings.get(key)]


def tone(difference: PairedDifference, metric: str) -> Tone:
    """Good or bad where the interval, as it is printed, leaves out 0; even otherwise."""
    low, high = (
        round(v, digits(metric)) for v in (difference.interval.low, difference.interval.high)
    )
    if metric == "volume_error" or math.isnan(low) or low <= 0 <= high:
        return "even"
    return "good" if (low > 0) != (metric in LOWER_IS_BETTER) else "bad"


def _row(row: Row, metric: str) -> ScoreRow:
    means = [c.mean for c in row.cells if not math.isnan(c.mean)]
    best = (min if metric in LOWER_IS_BETTER else max)(means, default=math.nan)
    marks = len(row.cells) > 1 and metric != "volume_error"
    cells = tuple(_cell(c, metric, marks and c.mean == best) for c in row.cells)
    changes = tuple(
        Change(
            "n/a" if math.isnan(d.mean) else f"{d.mean:+.{digits(metric)}f}",
            _range(d, metric),
            f"{d.positive} / {d.pairs}",
            tone(d, metric),
        )
        for d in row.differences
    )
    return ScoreRow(spaced_out(row.name), cells, changes, row.is_total)


def _cell(cell: Cell, metric: str, best: bool) -> ScoreCell:
    mean, _, spread = format_cell(cell, metric).partition(" ")
    bar = cell.mean if metric in ("dice", "nsd") and not math.isnan(cell.mean) else None
    return ScoreCell(mean, spread, bar, best)


def _table_note(table: Table) -> str:
    tests = []
    for name, d in zip(table.runs[1:], table.rows[-1].differences, strict=True):
        if d.pairs > 1:
            tests.append(
                f"{name} against {table.runs[0]}, mean of organs, {d.pairs} pairs: sign-flip test "
                f"p = {d.permutation_p:.3g}, Wilcoxon p = {d.wilcoxon_p:.3g}."
            )
    if tests:
        tests.append("Intervals are over cases of one training each, not over seeds.")
    return " ".join(tests)


def _interval(d: PairedDifference, metric: str) -> str:
    text = _range(d, metric)
    return f"95 % interval {text}" if text else "one pair, no interval"


def _range(d: PairedDifference, metric: str) -> str:
    if math.isnan(d.interval.low):
        return ""
    n = digits(metric)
    return f"{d.interval.low:+.{n}f} to {d.interval.high:+.{n}f}"
