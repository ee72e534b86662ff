"""`spark3d bench core`: packed cells against the whole grid times the mask, on this machine.

Every measurement runs in a process of its own, so that threads and their waiting policy are set
before torch is loaded, and peak memory belongs to one contestant. Results are written as they come;
the same command goes on where it was stopped.
"""

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from spark3d.benchmarks.cases import Case, Job, Measure, curve_cases, jobs, main_cases
from spark3d.benchmarks.predict_cases import PredictJob
from spark3d.commands.bench_results import Measurement, complete, load
from spark3d.commands.bench_tables import (
    Results,
    as_markdown,
    curve_table,
    footer,
    growth_points,
    main_table,
    profile_tables,
)
from spark3d.errors import ConfigError, EnvironmentProblem
from spark3d.reports.growth import save_growth

Runner = Callable[[Job, int], dict[str, Any]]
MEASURES: tuple[Measure, ...] = ("time", "saved", "peak")
KNOWN: tuple[Measure, ...] = (*MEASURES, "profile")


def bench_core_command(
    out: Path,
    measures: Sequence[str] = MEASURES,
    quick: bool = False,
    curve: bool = False,
    threads: int = 2,
    seconds: float = 60.0,
    rounds: int = 9,
    minutes: float | None = None,
    figure: Path | None = None,
    markdown: bool = False,
    runner: Runner | None = None,
    console: Console | None = None,
) -> Results:
    """Measure what `out` does not hold yet, then print the table.

    Args:
        out: JSON file of results; those of another CPU, number of cores or of threads, or version
            of torch are refused.
        measures: "time", "saved" (activations), "peak" (memory), "profile" (where time goes).
        quick: tiny networks, to see that everything runs.
        curve: cost over crop size and share of hidden cells instead of the main table.
        threads: of torch.
        seconds: of timing per case, beyond the least number of rounds.
        rounds: most rounds counted; the least are two, or this if lower.
        minutes: no new measurement begins after this time.
        figure: the curve is drawn there, as `.svg` or `.png`.
        markdown: print the tables as Markdown.
        runner: how a job is run; by default in a fresh process.
        console: where the table goes.

    Raises:
        ConfigError: `measures` holds something else or nothing.
        DataError: `out` is not a file of results, or of another machine or thread count.
        EnvironmentProblem: a measurement failed for another reason than memory.
    """
    chosen = _chosen(measures, curve, threads, rounds)
    if figure and not (curve and figure.suffix in (".svg", ".png")):
        raise ConfigError(f"--figure {figure}: a file .svg or .png, together with --curve")
    cases = curve_cases(quick) if curve else main_cases(quick)
    document = load(out, "machine", {"threads": threads})
    run = runner or in_a_process
    until = None if minutes is None else 60 * minutes
    wanted = [
        Measurement(job.key, functools.partial(run, job, threads), job.case.name, until)
        for job in jobs(cases, chosen, seconds, (min(2, rounds), rounds))
    ]
    complete(out, document, wanted)
    show(cases, document, out, curve, chosen, markdown, console or wide_console())
    if figure:
        save_growth(growth_points(cases, document["results"]), figure)
    return document["results"]


def _chosen(measures: Sequence[str], curve: bool, threads: int, rounds: int) -> list[Measure]:
    """The measures in a fixed order; peak and profile are not those of a curve."""
    possible = ("time", "saved") if curve else KNOWN
    chosen: list[Measure] = [m for m in KNOWN if m in measures and m in possible]
    if set(measures) - set(KNOWN) or not chosen or min(threads, rounds) < 1:
        raise ConfigError(
            f"measures {list(measures)}, {threads} threads, {rounds} rounds: choose from "
            f"{', '.join(KNOWN)} (time and saved with the curve) and at least one thread and round"
        )
    return chosen


def show(
    cases: Sequence[Case],
    document: Mapping[str, Any],
    out: Path,
    curve: bool,
    chosen: Sequence[Measure],
    markdown: bool,
    screen: Console,
) -> None:
    """Print the tables of what was chosen."""
    results = document["results"]
    tables = [curve_table(cases, results)] if curve else []
    if not curve and set(chosen) - {"profile"}:
        tables.append(main_table(cases, results))
    if "profile" in chosen:
        tables += profile_tables(cases, results)
    for table in tables:
        if markdown:
            screen.print(as_markdown(table), markup=False, highlight=False, soft_wrap=True)
        else:
            screen.print(table)
    screen.print(footer(document, out), markup=not markdown, soft_wrap=markdown)


def wide_console() -> Console:
    """The terminal; a file or pipe gets lines as long as the table needs."""
    console = Console()
    return console if console.is_terminal else Console(width=130)


def in_a_process(
    job: Job | PredictJob, threads: int, worker: str = "spark3d.benchmarks.worker"
) -> dict[str, Any]:
    """Run a job in a fresh process with `threads` threads that sleep while they wait.

    Args:
        job: what to measure.
        threads: of torch.
        worker: the module that does it.

    Raises:
        EnvironmentProblem: it failed; a process killed for lack of memory is a result.
    """
    environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": str(threads)}
    call = [sys.executable, "-m", worker, str(threads)]
    done = subprocess.run(
        [*call, json.dumps(job.as_dict())], env=environment, capture_output=True, text=True
    )
    if done.returncode == -9:
        return {"result": {"failed": "killed, most likely for lack of memory"}}
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise EnvironmentProblem(f"measuring {job.case.name} ({job.key}) failed: {reason}")
    return json.loads(lines[-1])
