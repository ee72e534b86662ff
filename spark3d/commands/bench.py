"""`spark3d bench core`: packed cells against the whole grid times the mask, on this machine.

Every measurement runs in a process of its own, so that threads and their waiting policy are set
before torch is loaded, and peak memory belongs to one contestant. Results are written as they come;
the same command goes on where it was stopped.
"""

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from spark3d.benchmarks.cases import Job, Measure, curve_cases, jobs, main_cases
from spark3d.benchmarks.predict_cases import PredictJob
from spark3d.commands.bench_tables import Results, curve_table, footer, main_table
from spark3d.errors import ConfigError, DataError, EnvironmentProblem

log = logging.getLogger(__name__)

Runner = Callable[[Job, int], dict[str, Any]]
MEASURES: tuple[Measure, ...] = ("time", "saved", "peak")


def bench_core_command(
    out: Path,
    measures: Sequence[str] = MEASURES,
    quick: bool = False,
    curve: bool = False,
    threads: int = 2,
    seconds: float = 60.0,
    rounds: int = 9,
    minutes: float | None = None,
    runner: Runner | None = None,
    console: Console | None = None,
) -> Results:
    """Measure what `out` does not hold yet, then print the table.

    Args:
        out: JSON file of results; measurements of another machine or thread count are refused.
        measures: "time", "saved" (activations), "peak" (memory).
        quick: tiny networks, to see that everything runs.
        curve: cost over crop size and share of hidden cells instead of the main table.
        threads: of torch.
        seconds: of timing per case, beyond the least number of rounds.
        rounds: most rounds counted; the least are two, or this if lower.
        minutes: no new measurement begins after this time.
        runner: how a job is run; by default in a fresh process.
        console: where the table goes.

    Raises:
        ConfigError: `measures` holds something else or nothing.
        DataError: `out` is not a file of results, or of another machine or thread count.
        EnvironmentProblem: a measurement failed for another reason than memory.
    """
    chosen: list[Measure] = [m for m in MEASURES if m in measures and not (curve and m == "peak")]
    if set(measures) - set(MEASURES) or not chosen or min(threads, rounds) < 1:
        raise ConfigError(
            f"measures {list(measures)}, {threads} threads, {rounds} rounds: choose from "
            f"{', '.join(MEASURES)} (no peak with the curve) and at least one thread and round"
        )
    cases = curve_cases(quick) if curve else main_cases(quick)
    document = load(out, threads)
    began = time.perf_counter()
    for job in jobs(cases, chosen, seconds, (min(2, rounds), rounds)):
        found = document["results"].setdefault(job.case.name, {})
        if job.key in found:
            continue
        if minutes is not None and time.perf_counter() - began > 60 * minutes:
            log.warning("out of time: the same command goes on with %s", job.case.name)
            break
        answer = (runner or in_a_process)(job, threads)
        document["machine"] = answer.get("machine", document["machine"])
        found[job.key] = answer["result"]
        save(out, document)
        log.info("%s: %s", job.case.name, job.key)
    screen = console or wide_console()
    screen.print((curve_table if curve else main_table)(cases, document["results"]))
    screen.print(footer(document, out))
    return document["results"]


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


def load(path: Path, threads: int) -> dict[str, Any]:
    """The results so far, or an empty document.

    Raises:
        DataError: something else stands there, or it was measured with other threads.
    """
    if not path.is_file():
        return {"machine": {"threads": threads}, "results": {}}
    try:
        document = json.loads(path.read_text())
        before = document["machine"]["threads"]
        document["results"].keys()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} holds no results of `spark3d bench`: choose another") from error
    if before != threads:
        raise DataError(
            f"{path} was measured with {before} threads, not {threads}: choose another file"
        )
    return document


def save(path: Path, document: Mapping[str, Any]) -> None:
    """Replace the file at once, so that a kill leaves the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(document, indent=1) + "\n")
    temporary.replace(path)
