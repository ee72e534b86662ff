"""What a label-efficiency study writes from its finished jobs, and how the report reads it."""

import json
import logging
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table as RichTable

from spark3d.commands.command_line import recorded_command
from spark3d.commands.label_jobs import Job, Study, read_result
from spark3d.commands.runs import versions
from spark3d.config import FinetuneRecipe, load_recipe
from spark3d.data.files import write_atomic
from spark3d.errors import DataError
from spark3d.evaluation.efficiency import (
    JobScores,
    csv_text,
    markdown,
    points,
    table_rows,
    under_trained,
)
from spark3d.evaluation.metrics import METRICS
from spark3d.evaluation.results import REFERENCE_GRID, STORE_GRID, Evaluation, case_scores
from spark3d.reports.efficiency import LabelPoint, save_chart

log = logging.getLogger(__name__)

STUDY = "label_efficiency.json"
RESULTS = "results.jsonl"
SHOWN = ("dice", "nsd", "hd95_mm")


@dataclass(frozen=True)
class ReadStudy:
    """A study on disk: its arms, the finished jobs, and what a reader must know."""

    arms: tuple[str, ...]
    jobs: tuple[JobScores, ...]
    facts: Mapping[str, Any]


def write_tables(study: Study, arms: Sequence[str], plan: Sequence[Job], console: Console) -> int:
    """Write the results of all finished jobs as lines, tables and curves; returns how many."""
    done = [job for job in plan if study.is_done(job)]
    if not done:
        return 0
    lines = [read_result(study.folder(job)) for job in done]
    facts = {
        "arms": list(arms),
        "labels": {str(k): v for k, v in study.labels.items()},
        "jobs": len(plan),
        "done": len(done),
        "steps": load_recipe(FinetuneRecipe, study.recipe).optim.steps,
        "rates": {job.arm: job.lr for job in plan if job.lr is not None},
        "grid": STORE_GRID if study.volumes is None else REFERENCE_GRID,
        "tolerance_mm": study.tolerance_mm,
        "validation": list(study.validation),
        "command": shlex.join(recorded_command()),
        "versions": versions(),
    }
    text = "".join(json.dumps(line) + "\n" for line in lines)
    write_atomic(study.out / RESULTS, text.encode())
    write_atomic(study.out / STUDY, (json.dumps(facts, indent=1) + "\n").encode())
    read = read_study(study.out)
    write_atomic(study.out / "label_efficiency.csv", csv_text(read.jobs, arms, METRICS).encode())
    write_atomic(study.out / "label_efficiency.md", page(read).encode())
    for kind in ("svg", "png"):
        save_chart(label_points(read), arms, study.out / f"curve.{kind}")
    console.print(rich_table(read))
    for line in warnings(read):
        console.print(line)
    console.print(f"tables, curve and {RESULTS}: {study.out}")
    return len(done)


def read_study(folder: Path) -> ReadStudy:
    """Read what `write_tables` wrote.

    Raises:
        DataError: no study, or a damaged one.
    """
    try:
        facts = json.loads((folder / STUDY).read_text("utf-8"))
        lines = [json.loads(t) for t in (folder / RESULTS).read_text("utf-8").splitlines()]
        labels = {int(k): v for k, v in facts["labels"].items()}
        jobs = tuple(
            JobScores(
                line["arm"], line["labels"], line["subset"],
                Evaluation(line["key"], labels, case_scores(line["cases"])),
            )
            for line in lines
        )  # fmt: skip
        return ReadStudy(tuple(facts["arms"]), jobs, facts)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{folder} holds no study of label efficiency ({type(error).__name__}: {error}); make "
            "it with `spark3d label-efficiency`"
        ) from None


def page(study: ReadStudy) -> str:
    """The study as Markdown."""
    facts = study.facts
    head = (
        f"# Label efficiency: {', '.join(study.arms)}\n\n"
        f"`{facts['command']}`\n\n"
        f"{facts['done']} of {facts['jobs']} jobs of {facts['steps']} steps each, scored on "
        f"{len(facts['validation'])} cases on the grid {facts['grid']}. Mean ± SD over "
        "subsets of the mean over cases; differences are paired subset by subset, with "
        f"t-intervals. {own_rates(facts)}".rstrip()
        + "\n\n"
    )
    notes = "".join(f"- {line}\n" for line in warnings(study))
    return head + (notes + "\n" if notes else "") + markdown(study.jobs, study.arms, SHOWN)


def own_rates(facts: Mapping[str, Any]) -> str:
    """The starts that do not learn at the recipe's rate, for a reader; empty if all do."""
    rates = facts.get("rates", {})
    told = ", ".join(f"{arm} {rate:g}" for arm, rate in rates.items())
    return f"Learning rates of their own: {told}." if told else ""


def warnings(study: ReadStudy) -> list[str]:
    """What a reader must know before believing a difference."""
    lines = under_trained(study.jobs, study.arms[0])
    facts = study.facts
    if facts["done"] < facts["jobs"]:
        lines.append(f"Not finished: {facts['done']} of {facts['jobs']} jobs.")
    changes = [p.change for p in points(study.jobs, study.arms, "dice") if p.change]
    if len(study.arms) > 1 and (fewest := min((c.pairs for c in changes), default=0)) < 5:
        lines.append(f"Only {fewest} pairs at some label count; 5 are the least to conclude from.")
    return lines


def rich_table(study: ReadStudy) -> RichTable:
    """Mean Dice for the terminal."""
    heads, rows = table_rows(study.jobs, study.arms, "dice")
    rich = RichTable(title="Dice, mean over organs and cases", box=box.SIMPLE_HEAD)
    for head in heads:
        rich.add_column(head, justify="right")
    for row in rows:
        rich.add_row(*row)
    return rich


def label_points(study: ReadStudy, metric: str = "dice") -> list[LabelPoint]:
    """What the chart draws."""
    return [
        LabelPoint(
            p.arm, p.labels, p.mean, p.interval.low, p.interval.high,
            None if p.change is None else (
                p.change.mean, p.change.interval.low, p.change.interval.high
            ),
        )
        for p in points(study.jobs, study.arms, metric)
    ]  # fmt: skip
