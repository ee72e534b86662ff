"""`spark3d doctor`: what is wrong with a folder of volumes, and what preparing it would take."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from spark3d.commands.prepare import show_found
from spark3d.data.case import PrepareSpec
from spark3d.data.checks import placed
from spark3d.data.files import readable_json, write_atomic
from spark3d.data.job import Job
from spark3d.data.nifti_header import Geometry
from spark3d.data.plan import Plan, suggest_plan
from spark3d.data.pool import memory_of, run_each
from spark3d.data.record import CaseRecord
from spark3d.data.sources import FoundCases, find
from spark3d.data.survey import (
    Estimate,
    Examined,
    estimate,
    examine,
    median_spacing,
    same_voxels,
    unlike_the_rest,
)
from spark3d.engine.progress import PROGRESS_COLUMNS
from spark3d.errors import ConfigError, DataError

SHOWN = 40
CELL = (16, 16, 16)
"""Stride of the default network: a suggested crop is a multiple of it."""


@dataclass
class Diagnosis:
    """What was found.

    Attributes:
        layout: of the folder; empty where none was recognised.
        folder_fault: why the folder as a whole cannot be used.
        notices: what was passed over.
        cases: all of them.
        must: id -> faults to be fixed.
        look: id -> what is unlike the rest.
        plan: suggested, None without a sound case.
        taken: what preparing takes, likewise.
        memory_gib: that one worker takes for the largest case.
    """

    layout: str = ""
    folder_fault: str | None = None
    notices: tuple[str, ...] = ()
    cases: list[Examined] = field(default_factory=list)
    must: dict[str, list[str]] = field(default_factory=dict)
    look: dict[str, list[str]] = field(default_factory=dict)
    plan: Plan | None = None
    taken: Estimate | None = None
    memory_gib: float = 0.0


def doctor_command(
    data: Path,
    out: Path = Path("doctor.json"),
    modality: str = "auto",
    geometry: Geometry = "agree",
    nan_fill: float | None = None,
    group_pattern: str | None = None,
    workers: int = 2,
    names: Path | None = None,
    memory_gib: float | None = None,
    console: Console | None = None,
) -> Diagnosis:
    """Read every volume of a folder and say what must be fixed before it is prepared.

    Args:
        data: any folder that `prepare` takes.
        out: gets all of it as JSON.
        modality: "auto", "CT" or "MR", as for `prepare`.
        geometry: as for `prepare`.
        nan_fill: as for `prepare`.
        group_pattern: as for `prepare`.
        workers: processes; 0 works in this one.
        names: gets the file behind each case id, which can tell patients; readable to you alone.
        memory_gib: that all workers together may take.
        console: where to print.

    Raises:
        ConfigError: an option makes no sense.
        DataError: something must be fixed; the file at `out` is written all the same.
        EnvironmentProblem: no right to write.
    """
    console = console or Console()
    if modality not in ("auto", "CT", "MR"):
        raise ConfigError(f"--modality {modality}: give one of auto, CT, MR")
    result = Diagnosis()
    with Progress(
        *PROGRESS_COLUMNS, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("reading DICOM headers", total=None, visible=False)

        def step(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total, visible=True)

        try:
            found = find(data, group_pattern, step)
        except DataError as error:
            result.folder_fault = str(error)
            write_atomic(out, to_json(result))
            raise
    show_found(found, data, console)
    if names is not None:
        write_names(names, found)
    spec = PrepareSpec(
        modality=found.modality if modality == "auto" else modality,
        geometry=geometry,
        fourth_axis=found.fourth_axis,
        nan_fill=nan_fill,
        labels=found.labels,
    )
    result.layout, result.notices = found.layout, found.notices
    jobs = [Job(case, spec, Path()) for case in found.cases]
    with Progress(
        *PROGRESS_COLUMNS, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("reading volumes", total=len(jobs))
        for _, examined in run_each(examine, jobs, workers, memory_gib):
            result.cases.append(examined)
            bar.advance(task)
    result.cases.sort(key=lambda examined: examined.id)
    judge(result, found, spec, jobs)
    write_atomic(out, to_json(result))
    show(result, console, out, max(1, workers))
    if result.must:
        raise DataError(
            f"E-DOCTOR: {len(result.must)} of {len(result.cases)} cases must be fixed or taken out "
            f"before they are prepared; each is listed with its remedy in {out}"
        )
    return result


def judge(result: Diagnosis, found: FoundCases, spec: PrepareSpec, jobs: Sequence[Job]) -> None:
    """Hold the cases against each other, and estimate from the sound ones what preparing takes."""
    result.must = {one.id: [one.fault] for one in result.cases if one.fault}
    readable = [one.record for one in result.cases if one.record]
    if readable:
        result.look = unlike_the_rest(readable)
        remarks, leaks = same_voxels(readable)
        for target, more in ((result.look, remarks), (result.must, leaks)):
            for case_id, lines in more.items():
                target.setdefault(case_id, []).extend(lines)
    sound = [one.record for one in result.cases if one.record and not one.fault]
    if sound:
        spacing = median_spacing(sound)
        spec = replace(spec, spacing_mm=spacing)
        result.taken = estimate(found.cases, sound, spec)
        result.plan = suggest_plan(sound, spacing, CELL)
    result.memory_gib = max(memory_of(replace(job, spec=spec)) for job in jobs) / 2**30


def write_names(path: Path, found: FoundCases) -> None:
    """Id -> file or folder of every case."""
    table = {case.id: str(case.image) for case in found.cases}
    write_atomic(path, readable_json(table))
    path.chmod(0o600)


def to_json(result: Diagnosis) -> bytes:
    """`doctor.json`; no path, no text of a header."""
    plan, taken = result.plan, result.taken
    suggested = plan and {
        "modality": plan.modality,
        "spacing_mm": list(plan.spacing_mm),
        "window": plan.window.__dict__,
        "crop": list(plan.crop),
        "reasons": plan.reasons,
    }
    content = {
        "layout": result.layout,
        "fault": result.folder_fault and _without_found(result.folder_fault),
        "notices": list(result.notices),
        "cases": [_case(result, one) for one in result.cases],
        "must_be_fixed": sorted(result.must),
        "to_look_at": sorted(result.look),
        "suggested": suggested,
        "estimate": taken and {**taken.__dict__, "memory_gib_per_worker": result.memory_gib},
    }
    return (json.dumps(content, indent=1, allow_nan=False) + "\n").encode()


def _case(result: Diagnosis, one: Examined) -> dict[str, Any]:
    record = one.record
    known = record and {
        "section": record.section,
        "modality": record.modality,
        "channels": record.channels,
        "size": list(record.source.ras()[0]),
        "body_size": list(record.size),
        "spacing_mm": list(record.spacing_mm),
        "intensity": [stats.__dict__ for stats in record.intensity],
        "labels": None if record.labels is None else list(record.labels),
        "filled": record.filled,
        "content_hash": record.content_hash,
    }
    return {
        "id": one.id,
        "faults": [placed(line, one.id) for line in result.must.get(one.id, [])],
        "remarks": result.look.get(one.id, []),
        "volume": known,
    }


def _without_found(reason: str) -> str:
    """The fault of a folder as it may be kept: what was found there can quote paths and names."""
    code, expected = reason.partition(": ")[0], reason.partition("; expected ")[2]
    return f"{code}: the folder: expected {expected}"


def show(result: Diagnosis, console: Console, out: Path, workers: int) -> None:
    """What must be fixed, what to look at, what is suggested."""
    rows = [("must be fixed", line) for lines in result.must.values() for line in lines]
    rows += [
        ("look at", f"{case_id}: {line}")
        for case_id, lines in result.look.items()
        for line in lines
    ]
    if rows:
        table = Table(show_lines=True)
        table.add_column("", no_wrap=True)
        table.add_column("what was found, what was expected, what to do", overflow="fold")
        for verdict, line in rows[:SHOWN]:
            table.add_row(verdict, line.replace("[", r"\["))
        console.print(table)
        if len(rows) > SHOWN:
            console.print(f"and {len(rows) - SHOWN} more in {out}")
    sound = len(result.cases) - len(result.must)
    summary = Table(show_header=False)
    summary.add_row("cases", f"{len(result.cases)}: {sound} sound, {len(result.must)} to be fixed")
    records = [one.record for one in result.cases if one.record]
    if records:
        summary.add_row("volumes", _ranges(records))
    if result.plan and result.taken:
        plan, taken = result.plan, result.taken
        minutes = taken.seconds / workers / 60
        spacing = " x ".join(f"{s:g}" for s in plan.spacing_mm)
        summary.add_row("suggested spacing", f"{spacing} mm (median)")
        summary.add_row("suggested window", plan.reasons["window"])
        summary.add_row("modality", plan.reasons["modality"])
        summary.add_row(
            "store", f"about {taken.store_bytes / 2**20:.3g} MiB, {minutes:.2g} minutes with "
            f"{workers} workers (from {taken.sampled} cases prepared here)",
        )  # fmt: skip
        summary.add_row("memory", f"up to {result.memory_gib:.2g} GiB per worker")
    console.print(summary)
    console.print(f"all of it: {out}")


def _ranges(records: Sequence[CaseRecord]) -> str:
    """The least and greatest size, spacing and intensity."""
    parts = []
    for name, values, unit in (
        ("size", [record.source.ras()[0] for record in records], "voxels"),
        ("spacing", [record.spacing_mm for record in records], "mm"),
    ):
        low, high = map(min, zip(*values, strict=True)), map(max, zip(*values, strict=True))
        ends = (" x ".join(f"{v:g}" for v in end) for end in (low, high))
        parts.append(f"{name} {' to '.join(ends)} {unit}")
    low = min(stats.minimum for record in records for stats in record.intensity)
    high = max(stats.maximum for record in records for stats in record.intensity)
    return "; ".join([*parts, f"intensity {low:g} to {high:g}"])
