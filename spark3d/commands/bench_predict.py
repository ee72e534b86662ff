"""`spark3d bench predict`: our sliding windows against MONAI's, same network, same volume.

Every measurement runs in a process of its own and is written as it comes; the same command goes on
where it was stopped.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from spark3d.benchmarks.meter import paired_ratios, spread
from spark3d.benchmarks.predict_cases import (
    CONTESTANTS,
    LAST,
    MEASURES,
    QUICK,
    Measure,
    PredictCase,
    PredictJob,
    predict_jobs,
)
from spark3d.commands.bench import in_a_process, wide_console
from spark3d.commands.bench_results import Measurement, complete, load
from spark3d.errors import ConfigError

Runner = Callable[[PredictJob, int], dict[str, Any]]


def bench_predict_command(
    out: Path,
    measures: Sequence[str] = MEASURES,
    quick: bool = False,
    threads: int = 2,
    seconds: float = 600.0,
    rounds: int = 3,
    runner: Runner | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Measure what `out` does not hold yet, then print the table.

    Args:
        out: JSON file of results; those of another thread count are refused.
        measures: "agree" (logits), "peak" (memory), "time".
        quick: a tiny volume, to see that everything runs.
        threads: of torch.
        seconds: no second or later round of timing begins after it.
        rounds: most rounds counted; each is a process of its own, and kept when it ends.
        runner: how a job is run; by default in a fresh process.
        console: where the table goes.

    Raises:
        ConfigError: `measures` holds something else or nothing.
        DataError: `out` is not a file of results.
        EnvironmentProblem: a measurement failed for another reason than memory.
    """
    chosen: list[Measure] = [m for m in MEASURES if m in measures]
    if set(measures) - set(MEASURES) or not chosen or min(threads, rounds) < 1:
        raise ConfigError(
            f"measures {list(measures)}, {threads} threads, {rounds} rounds: choose from "
            f"{', '.join(MEASURES)} and at least one thread and round"
        )
    case = QUICK if quick else PredictCase()
    run = runner or functools.partial(in_a_process, worker="spark3d.benchmarks.predict")
    document = load(out, "machine", {"threads": threads})
    wanted = [
        Measurement(
            job.key, functools.partial(run, job, threads), case.name,
            until=seconds if job.round > 1 else None,
        )
        for job in predict_jobs(case, chosen, rounds)
    ]  # fmt: skip
    complete(out, document, wanted)
    found = document["results"][case.name]
    screen = console or wide_console()
    screen.print(table(case, found))
    screen.print(footer(case, found, document["machine"], out))
    return document["results"]


def table(case: PredictCase, found: Mapping[str, Any]) -> Table:
    """A row per contestant: seconds and peak memory, and both over ours."""
    rich = Table(title=case.name, box=box.SIMPLE, title_justify="left")
    rich.add_column("contestant")
    for head in ("seconds", "times ours (paired)", "peak MiB", "times ours", "above start, MiB"):
        rich.add_column(head, justify="right")
    timed, ours = rounds_of(found), found.get(f"peak: {LAST}", {})
    taken = {n: [r["seconds"][n] for r in timed if "seconds" in r] for n in CONTESTANTS}
    failed = next((r["failed"] for r in timed if "failed" in r), "")
    ratios = paired_ratios(taken, LAST) if taken[LAST] else {}
    for name in CONTESTANTS:
        ratio, peak = ratios.get(f"{name}/{LAST}"), found.get(f"peak: {name}", {})
        row = [name, f"{spread(taken[name])['median']:.1f}" if taken[name] else failed]
        row.append(
            f"{ratio['median']:.2f} ({ratio['low']:.2f}-{ratio['high']:.2f})" if ratio else ""
        )
        if "peak" in peak:
            times = f"{peak['peak'] / ours['peak']:.2f}" if "peak" in ours and name != LAST else ""
            row += [_mib(peak["peak"]), times, _mib(peak["peak"] - peak["before"])]
        else:
            row += [peak.get("failed", ""), "", ""]
        rich.add_row(*row)
    return rich


def rounds_of(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the rounds of timing gave."""
    return [result for key, result in found.items() if key.startswith("time: ")]


def footer(
    case: PredictCase, found: Mapping[str, Any], machine: Mapping[str, Any], out: Path
) -> str:
    """Agreement, machine, and where the figures are."""
    agree = found.get("agree")
    parts = [
        f"largest difference of a logit {agree['largest_difference']:.1e} (largest logit "
        f"{agree['largest_logit']:.1f})" if agree else "agreement not measured",
        f"all logits at once: {_mib(case.class_map_bytes)} MiB",
        f"{machine.get('cpu', 'unknown')}, {machine['threads']} threads",
        f"torch {machine.get('torch', 'unknown')}",
    ]  # fmt: skip
    if load_average := [value for r in rounds_of(found) for value in r.get("load", ())]:
        parts.append(f"load {min(load_average):.1f} to {max(load_average):.1f}")
    return "; ".join([*parts, str(out)])


def _mib(value: float) -> str:
    return f"{value / 2**20:.0f}"
