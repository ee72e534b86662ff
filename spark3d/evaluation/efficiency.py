"""Label efficiency: scores of several arms over label counts and subsets, compared pair by pair.

An arm is a start (from scratch, or from some encoder). One job is one fine-tuning: an arm, a number
of labels, a subset. Two jobs that differ in their arm only are a pair.
"""

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from spark3d.evaluation.results import Evaluation, shared_organs
from spark3d.evaluation.statistics import (
    Interval,
    PairedDifference,
    mean_and_sd,
    paired_difference,
    t_interval,
)
from spark3d.evaluation.tables import MEAN_ROW, NOT_SCORED, TITLES, digits

UNDER_TRAINED = 0.3
"""An organ of the first arm below this mean Dice makes a comparison say little."""


@dataclass(frozen=True)
class JobScores:
    """The scores of one finished fine-tuning."""

    arm: str
    labels: int
    subset: int
    scores: Evaluation

    def value(self, metric: str, organ: str | None = None) -> float:
        """Mean over cases: of one organ, or of the mean over organs of each case."""
        found = self.scores.means(metric) if organ is None else self.scores.values(organ, metric)
        return mean_and_sd(list(found.values()))[0]


@dataclass(frozen=True)
class Point:
    """One arm at one label count: spread over subsets, and the paired change to the first arm.

    Args:
        labels: labelled training cases.
        arm: the start.
        subsets: jobs behind the point.
        mean: over subsets; `sd` its standard deviation (ddof 1), `interval` the t-interval.
        change: second minus first over the subsets that both have; None for the first arm.
    """

    labels: int
    arm: str
    subsets: int
    mean: float
    sd: float
    interval: Interval
    change: PairedDifference | None


def points(
    jobs: Sequence[JobScores], arms: Sequence[str], metric: str, organ: str | None = None
) -> list[Point]:
    """Every arm at every label count, counts ascending, arms in the given order.

    Args:
        jobs: finished ones, in any order.
        arms: the first is what the others are compared with.
        metric: of `spark3d.evaluation.metrics`.
        organ: one organ; None takes the mean over organs.
    """
    table: dict[tuple[int, str], dict[str, float]] = {}
    for job in jobs:
        table.setdefault((job.labels, job.arm), {})[str(job.subset)] = job.value(metric, organ)
    found = []
    for labels in sorted({job.labels for job in jobs}):
        for arm in arms:
            values = table.get((labels, arm))
            if values is None:
                continue
            first = table.get((labels, arms[0]), {})
            change = paired_difference(first, values, np.random.default_rng(0))
            mean, sd = mean_and_sd(list(values.values()))
            found.append(
                Point(
                    labels, arm, len(values), mean, sd, t_interval(list(values.values())),
                    change if arm != arms[0] else None,
                )
            )  # fmt: skip
    return found


def organs_of(jobs: Sequence[JobScores]) -> list[str]:
    """The organs that are scored in every job."""
    return shared_organs([job.scores for job in jobs]) if jobs else []


def under_trained(jobs: Sequence[JobScores], arm: str) -> list[str]:
    """Where an arm had hardly begun to find an organ: one line per label count."""
    lines = []
    for labels in sorted({job.labels for job in jobs}):
        mine = [job for job in jobs if job.labels == labels and job.arm == arm]
        means = {o: mean_and_sd([j.value("dice", o) for j in mine])[0] for o in organs_of(mine)}
        weak = [f"{organ} {mean:.2f}" for organ, mean in means.items() if mean < UNDER_TRAINED]
        if weak:
            lines.append(
                f"{labels} labels: {arm} has a mean Dice below {UNDER_TRAINED} for "
                f"{', '.join(weak)}; it is under-trained, and a difference says little."
            )
    return lines


def table_rows(
    jobs: Sequence[JobScores], arms: Sequence[str], metric: str, organ: str | None = None
) -> tuple[list[str], list[list[str]]]:
    """Heads and rows as text: a row per label count, then per arm its mean and its change."""
    found = {(p.labels, p.arm): p for p in points(jobs, arms, metric, organ)}
    heads = ["labels", "subsets", *arms]
    for arm in arms[1:]:
        heads += [f"{arm} minus {arms[0]} [95 %]", "up/pairs", "p, sign flips", "p, Wilcoxon"]
    rows = []
    for labels in sorted({labels for labels, _ in found}):
        here = [found.get((labels, arm)) for arm in arms]
        rows.append([str(labels), str(max(p.subsets for p in here if p))])
        rows[-1] += [_mean(p, metric) for p in here]
        for point in here[1:]:
            rows[-1] += _change(point.change if point else None, metric)
    return heads, rows


def markdown(jobs: Sequence[JobScores], arms: Sequence[str], metrics: Sequence[str]) -> str:
    """Tables of all metrics, then Dice of every organ, as Markdown."""
    parts = []
    for metric in metrics:
        parts.append(f"## {TITLES[metric]}, {MEAN_ROW}\n")
        parts.append(markdown_table(*table_rows(jobs, arms, metric)))
    for organ in organs_of(jobs):
        parts.append(f"## {TITLES['dice']}, {organ}\n")
        parts.append(markdown_table(*table_rows(jobs, arms, "dice", organ)))
    return "\n".join(parts)


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table with its first column to the left and the others to the right."""
    lines = ["| " + " | ".join(heads) + " |", "|---|" + "---:|" * (len(heads) - 1)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def csv_text(jobs: Sequence[JobScores], arms: Sequence[str], metrics: Sequence[str]) -> str:
    """Numbers: a line per metric, organ (and their mean), label count and arm."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = ["metric", "organ", "labels", "arm", "subsets", "mean", "sd", "low", "high"]
    names += ["pairs", "difference", "difference_low", "difference_high", "positive", "negative"]
    writer.writerow([*names, "wilcoxon_p", "permutation_p"])
    for metric in metrics:
        for organ in [None, *organs_of(jobs)]:
            for p in points(jobs, arms, metric, organ):
                numbers = [p.mean, p.sd, p.interval.low, p.interval.high]
                if (d := p.change) is None:
                    numbers += [math.nan] * 8
                else:
                    numbers += [d.pairs, d.mean, d.interval.low, d.interval.high]
                    numbers += [d.positive, d.negative, d.wilcoxon_p, d.permutation_p]
                texts = ["" if math.isnan(v) else f"{v:.6g}" for v in numbers]
                writer.writerow([metric, organ or MEAN_ROW, p.labels, p.arm, p.subsets, *texts])
    return text.getvalue()


def _mean(point: Point | None, metric: str) -> str:
    if point is None or math.isnan(point.mean):
        return NOT_SCORED
    n = digits(metric)
    spread = "" if math.isnan(point.sd) else f" ± {point.sd:.{n}f}"
    return f"{point.mean:.{n}f}{spread}"


def _change(change: PairedDifference | None, metric: str) -> list[str]:
    if change is None or math.isnan(change.mean):
        return [NOT_SCORED] * 4
    n = digits(metric)
    text = f"{change.mean:+.{n}f}"
    if not math.isnan(change.interval.low):
        text += f" [{change.interval.low:+.{n}f}, {change.interval.high:+.{n}f}]"
    pairs = f"{change.positive}/{change.pairs}"
    tests = [f"{p:.3f}" for p in (change.permutation_p, change.wilcoxon_p)]
    return [text, pairs, *(tests if change.pairs > 1 else [NOT_SCORED] * 2)]
