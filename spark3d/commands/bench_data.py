"""`spark3d bench data`: the store against other ways to read and write a volume, on this machine.

Every measurement runs in a process of its own. Results are written as they come; the same command
goes on where it was stopped.
"""

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from spark3d.benchmarks.data import MEASURES, DataJob
from spark3d.benchmarks.data_volume import VolumeSpec
from spark3d.commands.bench import wide_console
from spark3d.commands.bench_data_tables import as_markdown, as_tables
from spark3d.commands.bench_results import Measurement, complete, load
from spark3d.errors import ConfigError, EnvironmentProblem

Runner = Callable[[DataJob], dict[str, Any]]
REAL_CT = Path("trunk_ct") / "chest_ct_1p5mm.nii.gz"
IN_MEMORY = ("nibabel .nii.gz", "MONAI LoadImaged", "store")
QUICK_SIZE = (96, 80, 72)


def bench_data_command(
    out: Path,
    file: Path | None = None,
    measures: Sequence[str] = tuple(MEASURES),
    quick: bool = False,
    chunk: int = 64,
    seconds: float = 60.0,
    rounds: int = 30,
    scratch: Path | None = None,
    markdown: bool = False,
    runner: Runner | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Measure what `out` does not hold yet, then print the tables.

    Args:
        out: JSON file of results; measurements of another volume are refused.
        file: CT to make the volume of; None looks under SPARK3D_DATA, then takes a phantom.
        measures: names of `MEASURES`.
        quick: a tiny volume, to see that everything runs.
        chunk: side of the store's chunks, 64 or 32.
        seconds: per measurement, beyond the least number of rounds.
        rounds: most rounds counted.
        scratch: folder for the volume in all formats (half a gigabyte), kept for the next call;
            None is a folder beside `out`. It must lie on the disk that is to be measured.
        markdown: print the tables as Markdown.
        runner: how a job is run; by default in a fresh process.
        console: where the tables go.

    Raises:
        ConfigError: `measures` holds something else or nothing, or `file` is no file.
        DataError: `out` is not a file of results, or of another volume.
        EnvironmentProblem: a measurement failed.
    """
    chosen = [name for name in MEASURES if name in measures]
    if set(measures) - set(MEASURES) or not chosen or rounds < 1 or chunk not in (32, 64):
        raise ConfigError(
            f"measures {list(measures)}, {rounds} rounds, chunk {chunk}: choose from "
            f"{', '.join(MEASURES)}, at least one round, and a chunk of 32 or 64"
        )
    screen = console or wide_console()
    size = QUICK_SIZE if quick else VolumeSpec.size
    spec = VolumeSpec(_source(file, screen), size, chunk=chunk)
    document = load(out, "volume", spec.describe())
    folder = scratch or out.with_name(f"{out.stem}_volumes")
    wanted = [
        Measurement(job.key, functools.partial(runner or in_a_process, job))
        for job in _jobs(chosen, folder, spec, seconds, rounds, quick)
    ]
    complete(out, document, wanted)
    if markdown:
        screen.print(as_markdown(document), markup=False, highlight=False, soft_wrap=True)
    else:
        for part in as_tables(document):
            screen.print(part)
        screen.print(f"results: {out}; volumes: {folder}, to be removed when no longer needed")
    return document


def _source(file: Path | None, console: Console) -> str | None:
    """The CT to tile: as given, else the real one under SPARK3D_DATA, else none."""
    if file is not None:
        if not file.is_file():
            raise ConfigError(f"--data {file}: no such file; give a CT in NIfTI")
        return str(file.absolute())
    if data := os.environ.get("SPARK3D_DATA"):
        found = Path(data) / REAL_CT
        if found.is_file():
            return str(found.absolute())
    console.print("no CT given (--data FILE, or SPARK3D_DATA): a phantom stands in for it")
    return None


def _jobs(
    chosen: Sequence[str], folder: Path, spec: VolumeSpec, seconds: float, rounds: int, quick: bool
) -> list[DataJob]:
    """The processes to run, in order."""
    out = []
    for measure in chosen:
        for what in {"memory": IN_MEMORY, "step": ("0", "2")}.get(measure, ("",)):
            job = DataJob(
                measure, str(folder.absolute()), spec, 32 if quick else 96, seconds,
                (min(3, rounds), rounds), what, 4 if quick else 20,
            )  # fmt: skip
            out.append(job)
    return out


def in_a_process(job: DataJob) -> dict[str, Any]:
    """Run a job in a fresh process.

    Raises:
        EnvironmentProblem: it failed.
    """
    return fresh_process("spark3d.benchmarks.data", job.to_json(), job.key, job.measure == "step")


def fresh_process(module: str, job: str, key: str, trains: bool) -> dict[str, Any]:
    """The last line, JSON, that a module prints for a job.

    Args:
        module: run with `-m`.
        job: its argument.
        key: what to call the job in a message.
        trains: it takes the threads that a training takes; else one.

    Raises:
        EnvironmentProblem: it failed.
    """
    environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    if trains:
        environment = dict(os.environ)
    call = [sys.executable, "-m", module, job]
    done = subprocess.run(call, env=environment, capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise EnvironmentProblem(f"measuring {key} failed: {reason}")
    return json.loads(lines[-1])
