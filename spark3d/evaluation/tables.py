"""Tables of one or several runs: organs down, runs across, and what a paired comparison says.

A table is numbers first (`Table`); the terminal, Markdown and CSV are three ways to write it.
"""

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from rich import box
from rich.table import Table as RichTable

from spark3d.evaluation.legacy import LegacyTable
from spark3d.evaluation.results import Evaluation, shared_organs
from spark3d.evaluation.statistics import (
    UNKNOWN,
    Interval,
    PairedDifference,
    bootstrap_interval,
    mean_and_sd,
    paired_difference,
)

TITLES = {
    "dice": "Dice",
    "nsd": "NSD",
    "hd95_mm": "HD95 (mm)",
    "asd_mm": "ASD (mm)",
    "volume_error": "Volume error",
}
MEAN_ROW = "mean of organs"
NOT_SCORED = "n/a"


@dataclass(frozen=True)
class Cell:
    """One organ of one run: mean and standard deviation over the cases where it is scored.

    `interval` is the 95 % bootstrap interval of the mean over these cases.
    """

    mean: float
    sd: float
    cases: int
    interval: Interval = UNKNOWN


@dataclass(frozen=True)
class Row:
    """One organ, or the mean over organs; `differences` are of each further run to the first."""

    name: str
    cells: tuple[Cell, ...]
    differences: tuple[PairedDifference, ...]
    is_total: bool = False


@dataclass(frozen=True)
class Table:
    """One metric of several runs; the last row is the mean over the organs of each case."""

    metric: str
    runs: tuple[str, ...]
    rows: tuple[Row, ...]


def compare(runs: Sequence[Evaluation], metric: str, seed: int = 0) -> Table:
    """One metric of the runs side by side, over the organs all of them have.

    The spread is over cases. Differences pair the cases that a run shares with the first run.

    Args:
        seed: of the bootstrap, and of the sign flips in the paired test.
    """
    rows = []
    for organ in [*shared_organs(runs), None]:
        values = [r.means(metric) if organ is None else r.values(organ, metric) for r in runs]
        cells = tuple(
            Cell(
                *mean_and_sd(list(v.values())),
                sum(not math.isnan(x) for x in v.values()),
                bootstrap_interval(list(v.values()), np.random.default_rng(seed)),
            )
            for v in values
        )
        differences = tuple(
            paired_difference(values[0], v, np.random.default_rng(seed)) for v in values[1:]
        )
        rows.append(Row(organ or MEAN_ROW, cells, differences, is_total=organ is None))
    return Table(metric, tuple(r.name for r in runs), tuple(rows))


def summary_table(
    run: Evaluation, metrics: Sequence[str] = ("dice", "nsd", "hd95_mm")
) -> RichTable:
    """One run for the terminal: organs down, metrics across."""
    tables = [compare([run], m) for m in metrics]
    rich = _rich(f"{run.name}: mean ± SD over {len(run.cases)} cases")
    for m in metrics:
        rich.add_column(TITLES[m], justify="right")
    for rows in zip(*(t.rows for t in tables), strict=True):
        texts = [format_cell(r.cells[0], m) for r, m in zip(rows, metrics, strict=True)]
        rich.add_row(rows[0].name, *texts, style="bold" if rows[0].is_total else "")
    spans = [format_interval(t.rows[-1].cells[0].interval, t.metric) for t in tables]
    rich.add_row("95 % bootstrap", *spans)
    return rich


def legacy_rich_table(table: LegacyTable) -> RichTable:
    """The variants that other programs print, under their own names."""
    rich = RichTable(
        title="Legacy variants of mean Dice: for comparison with figures made so, and only these",
        box=box.SIMPLE_HEAD, title_style="bold", title_justify="left",
    )  # fmt: skip
    rich.add_column("what is averaged")
    rich.add_column("Dice", justify="right")
    for name, mean in table.means.items():
        rich.add_row(name, NOT_SCORED if math.isnan(mean) else f"{mean:.3f}")
    return rich


def format_interval(interval: Interval, metric: str) -> str:
    """Both ends, or that there are too few cases."""
    if math.isnan(interval.low):
        return NOT_SCORED
    n = digits(metric)
    return f"{interval.low:.{n}f} to {interval.high:.{n}f}"


def rich_table(table: Table) -> RichTable:
    """Several runs for the terminal."""
    rich = _rich(f"{TITLES[table.metric]}: mean ± SD over cases")
    for name in _heads(table):
        rich.add_column(name, justify="right")
    for row in table.rows:
        rich.add_row(row.name, *_texts(row, table), style="bold" if row.is_total else "")
    return rich


def markdown_table(table: Table) -> str:
    """Several runs as a Markdown table."""
    heads = _heads(table)
    lines = [
        f"| {TITLES[table.metric]} | " + " | ".join(heads) + " |",
        "|---|" + "---:|" * len(heads),
    ]
    for row in table.rows:
        name = f"**{row.name}**" if row.is_total else row.name
        lines.append(f"| {name} | " + " | ".join(_texts(row, table)) + " |")
    return "\n".join(lines) + "\n"


def csv_table(tables: Sequence[Table]) -> str:
    """Tables as numbers: one line per metric, organ and run; differences are to the first run."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = ["pairs", "difference", "low", "high", "positive", "negative"]
    names += ["wilcoxon_p", "permutation_p"]
    writer.writerow(["metric", "organ", "run", "mean", "sd", "low", "high", "cases", *names])
    for table in tables:
        for row in table.rows:
            for i, (run, cell) in enumerate(zip(table.runs, row.cells, strict=True)):
                d = row.differences[i - 1] if i else None
                numbers = [cell.mean, cell.sd, cell.interval.low, cell.interval.high, cell.cases]
                if d is not None:
                    numbers += [d.pairs, d.mean, d.interval.low, d.interval.high, d.positive]
                    numbers += [d.negative, d.wilcoxon_p, d.permutation_p]
                else:
                    numbers += [math.nan] * len(names)
                writer.writerow([table.metric, row.name, run, *map(_number, numbers)])
    return text.getvalue()


def format_cell(cell: Cell, metric: str) -> str:
    """Mean ± SD with the digits that suit the metric."""
    if math.isnan(cell.mean):
        return NOT_SCORED
    n = digits(metric)
    spread = "" if math.isnan(cell.sd) else f" ± {cell.sd:.{n}f}"
    return f"{cell.mean:.{n}f}{spread}"


def format_difference(difference: PairedDifference, metric: str) -> str:
    """Signed mean difference, its 95 % interval, and how many pairs went up."""
    if math.isnan(difference.mean):
        return NOT_SCORED
    n = digits(metric)
    text = f"{difference.mean:+.{n}f}"
    if not math.isnan(difference.interval.low):
        low, high = difference.interval.low, difference.interval.high
        text += f" [{low:+.{n}f}, {high:+.{n}f}]"
    return f"{text} {difference.positive}/{difference.pairs}"


def _heads(table: Table) -> list[str]:
    changes = [f"{name} minus {table.runs[0]} [95 %] up/pairs" for name in table.runs[1:]]
    return [*table.runs, *changes]


def _texts(row: Row, table: Table) -> list[str]:
    cells = [format_cell(c, table.metric) for c in row.cells]
    return cells + [format_difference(d, table.metric) for d in row.differences]


def _rich(title: str) -> RichTable:
    rich = RichTable(title=title, box=box.SIMPLE_HEAD, title_style="bold", title_justify="left")
    rich.add_column("organ")
    return rich


def digits(metric: str) -> int:
    """Decimals that suit a metric: two for mm, three for shares."""
    return 2 if metric.endswith("_mm") else 3


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.6g}"
