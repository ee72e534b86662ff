"""`spark3d bench images`: how fast images are read, made into crops and trained on, here.

Every measurement runs in a process of its own. Results are written as they come; the same command
goes on where it was stopped.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from spark3d.benchmarks.images import MEASURES, ImagesJob, as_text, make_photographs
from spark3d.commands.bench import wide_console
from spark3d.commands.bench_data import fresh_process
from spark3d.commands.bench_results import Measurement, complete, load
from spark3d.commands.stores import existing_folder
from spark3d.errors import ConfigError

Runner = Callable[[ImagesJob], dict[str, Any]]
PHOTOGRAPHS, FEW = 512, 12
SAYS = {
    "scan": "first scan of a folder: read, decoded at an eighth of the size, hashed",
    "load": "loader alone: decoded, cropped, resized",
    "step": "pre-training step, a timm ResNet-50 and SparK's light decoder",
}


def bench_images_command(
    out: Path,
    data: Path | None = None,
    measures: Sequence[str] = tuple(MEASURES),
    workers: Sequence[int] = (0, 2),
    batch: int = 64,
    steps: int = 20,
    quick: bool = False,
    runner: Runner | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Measure what `out` does not hold yet, then print the table.

    Args:
        out: JSON file of results; those of another folder or batch are refused.
        data: folder of images; None writes photographs of noise beside `out`.
        measures: names of `MEASURES`.
        workers: processes that make samples (threads of the scan), one measurement for each.
        batch: images a step.
        steps: counted.
        quick: a tiny network on tiny crops, to see that everything runs.
        runner: how a job is run; by default in a fresh process.
        console: where the table goes.

    Raises:
        ConfigError: `measures` or `workers` hold something else or nothing.
        DataError: no such folder, or `out` is not a file of results of this folder and batch.
        EnvironmentProblem: a measurement failed.
    """
    chosen = [name for name in MEASURES if name in measures]
    if set(measures) - set(MEASURES) or not chosen or min((batch, steps)) < 1:
        raise ConfigError(
            f"measures {list(measures)}, batch {batch}, {steps} steps: choose from "
            f"{', '.join(MEASURES)}, and a batch and steps of at least one"
        )
    if not workers or min(workers) < 0:
        raise ConfigError(f"workers {list(workers)}: give numbers of 0 or more, with commas")
    batch, steps, crop = (4, 2, 64) if quick else (batch, steps, 224)
    folder = data or out.with_name(f"{out.stem}_photographs")
    if data is None:
        make_photographs(folder, FEW if quick else PHOTOGRAPHS)
    existing_folder(folder, "give a folder of PNG or JPEG files")
    measured = {"folder": str(folder.absolute()), "batch": batch, "crop": crop}
    document = load(out, "images", measured)
    where = str(folder.absolute())
    todo = [
        ImagesJob(measure, where, count, crop, batch, steps, small=quick)
        for measure in chosen
        for count in workers
    ]
    run = runner or _in_a_process
    complete(out, document, [Measurement(job.key, functools.partial(run, job)) for job in todo])
    screen = console or wide_console()
    screen.print(_table(document["results"]))
    machine = document["machine"]
    screen.print(
        f"crops of {crop}, batch {batch}, {machine.get('cpu', '?')}, {machine.get('cores', '?')} "
        f"cores; results: {out}; images: {folder}"
    )
    return document


def _in_a_process(job: ImagesJob) -> dict[str, Any]:
    return fresh_process("spark3d.benchmarks.images", as_text(job), job.key, job.measure == "step")


def _table(results: Mapping[str, Any]) -> Table:
    table = Table(title="Images a second", box=box.SIMPLE)
    for name in ("what", "workers", "images/s", "of its time", "load"):
        table.add_column(name, justify="left" if name == "what" else "right")
    for key, found in results.items():
        measure, _, rest = key.partition(": ")
        share = ""
        if "idle" in found:
            share = f"{found['idle']:.1%} waits for images ({found['device']})"
        elif "hash_share" in found:
            share = f"{found['hash_share']:.1%} hashing"
        load = max(found.get("load", [0.0]))
        speed = f"{found['images_per_s']:.1f}"
        table.add_row(SAYS[measure], rest.removesuffix(" workers"), speed, share, f"{load:.1f}")
    return table
