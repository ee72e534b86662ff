"""`spark3d prepare`: a folder of volumes in, a store of prepared cases out."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from spark3d.data.names import shown
from spark3d.data.nifti_header import Geometry
from spark3d.data.prepare import PrepareReport, PrepareSpec, finalize, prepare
from spark3d.data.sources import FoundCases, find
from spark3d.data.store import Store
from spark3d.engine.progress import PROGRESS_COLUMNS
from spark3d.errors import ConfigError


def prepare_command(
    data: Path,
    out: Path,
    spacing: str = "auto",
    modality: str = "auto",
    geometry: Geometry = "agree",
    nan_fill: float | None = None,
    group_pattern: str | None = None,
    workers: int = 2,
    max_bad: int | None = None,
    chunk: int = 64,
    shard: str | None = None,
    end_shards: bool = False,
    memory_gib: float | None = None,
    verify: bool = False,
    console: Console | None = None,
) -> PrepareReport | None:
    """Prepare the cases of a folder into a store and say what became of each.

    Args:
        data: Decathlon task, nnU-Net dataset, BTCV tree, or any folder of volumes (NIfTI, NRRD,
            MetaImage, DICOM series).
        out: the store; an interrupted run goes on where it stopped.
        spacing: "auto" (median of the data), one number for all axes, or "x,y,z" in mm, RAS+.
        modality: "auto", "CT" or "MR".
        geometry: "agree" refuses contradictory headers, "sform" or "qform" trusts that one.
        nan_fill: value for NaN voxels; they are refused otherwise.
        group_pattern: regular expression that finds the patient in a case's id (first group).
        workers: processes; 0 works in this one.
        max_bad: unusable cases to accept; over all shares with `end_shards`.
        chunk: voxels per axis of a chunk on disk, 64 or 32.
        shard: "i/n", i from 1: prepare only this share, e.g. in a job array.
        end_shards: end a store prepared in shares (all must be there) and do nothing else.
        memory_gib: memory that all workers together may take.
        verify: read all of what is there already and prepare again what was damaged.
        console: where to print.

    Returns:
        The account of all cases; None with `end_shards`.

    Raises:
        ConfigError: an option makes no sense, or `out` holds something else.
        DataError: unusable cases, or none at all.
        EnvironmentProblem: no room or right to write.
    """
    console = console or Console()
    if end_shards:
        console.print(f"{finalize(out, max_bad)} cases in {out}")
        return None

    with Progress(
        *PROGRESS_COLUMNS, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("reading DICOM headers", total=None, visible=False)
        found = find(
            data,
            group_pattern,
            lambda done, total: bar.update(task, completed=done, total=total, visible=True),
        )
    show_found(found, data, console)
    spec = PrepareSpec(
        spacing_mm=parse_spacing(spacing),
        modality=_choose(modality, found.modality),
        geometry=geometry,
        fourth_axis=found.fourth_axis,
        nan_fill=nan_fill,
        labels=found.labels,
        chunk=_one_of("chunk", chunk, (32, 64)),
    )

    with Progress(*PROGRESS_COLUMNS, console=console) as bar:
        task = bar.add_task("preparing", total=len(found.cases))
        report = prepare(
            found.cases,
            out,
            spec,
            workers=workers,
            progress=lambda done, total, _: bar.update(task, completed=done, total=total),
            max_bad=max_bad,
            shard=parse_shard(shard),
            memory_gib=memory_gib,
            verify=verify,
        )
        bar.update(task, completed=report.total, total=report.total)

    _show_report(report, console)
    if shard is None:
        _show_store(Store.open(out), console)
    return report


def parse_spacing(text: str) -> tuple[float, float, float] | None:
    """Read "auto", "1.5" or "1.5,1.5,2".

    Raises:
        ConfigError: anything else.
    """
    if text == "auto":
        return None
    try:
        numbers = [float(part) for part in text.replace("x", ",").split(",")]
    except ValueError:
        numbers = []
    if len(numbers) == 1:
        numbers *= 3
    if len(numbers) != 3 or not all(1e-3 <= number <= 100 for number in numbers):
        raise ConfigError(
            f"--spacing {text}: give 'auto', one number, or three like 1.5,1.5,2 (mm, RAS order)"
        )
    x, y, z = numbers
    return x, y, z


def parse_shard(text: str | None) -> tuple[int, int] | None:
    """Read "2/8" as share 1 (from 0) of 8.

    Raises:
        ConfigError: anything else.
    """
    if text is None:
        return None
    part, _, count = text.partition("/")
    if not (part.isdigit() and count.isdigit() and 1 <= int(part) <= int(count)):
        raise ConfigError(f"--shard {text}: give I/N with I from 1 to N, like 2/8")
    return int(part) - 1, int(count)


def _choose(asked: str, declared: str) -> str:
    return declared if asked == "auto" else _one_of("modality", asked, ("CT", "MR"))


def _one_of(name: str, value: Any, allowed: tuple) -> Any:
    if value not in allowed:
        raise ConfigError(f"--{name} {value}: give one of {', '.join(map(str, allowed))}")
    return value


def show_found(found: FoundCases, data: Path, console: Console) -> None:
    sections: dict[str, int] = {}
    for case in found.cases:
        sections[case.section] = sections.get(case.section, 0) + 1
    parts = ", ".join(f"{n} {section}" for section, n in sorted(sections.items()))
    labelled = sum(case.label is not None for case in found.cases)
    console.print(
        f"{shown(data)}: {len(found.cases)} cases ({found.layout} layout; {parts}; "
        f"{labelled} labelled)"
    )
    if found.passed_over:
        console.print(f"  passed over {len(found.passed_over)} files named as label maps")
    for notice in found.notices:
        console.print(f"  {notice}")
    if found.renamed:
        console.print(
            f"  {found.renamed} ids made by a keyed hash, as names and UIDs can tell a patient; "
            "'spark3d doctor --names FILE' lists which file is which",
            soft_wrap=True,
        )


def _show_report(report: PrepareReport, console: Console) -> None:
    console.print(
        f"{report.total} cases = {len(report.written)} written + {len(report.skipped)} already "
        f"there + {len(report.failed)} left out"
    )
    for reason in report.failed.values():
        console.print(f"  left out: {reason}", markup=False)
    for same in report.duplicates:
        console.print(f"  same voxels: {', '.join(same)}")


def _show_store(store: Store, console: Console) -> None:
    sizes = sorted(record.size for record in store.cases)
    table = Table(title=f"store {store.folder}", show_header=False)
    table.add_row("cases", str(len(store)))
    table.add_row("spacing", " x ".join(f"{s:g}" for s in store.spacing_mm) + " mm")
    middle = [sorted(size[axis] for size in sizes)[len(sizes) // 2] for axis in range(3)]
    table.add_row("median size", " x ".join(map(str, middle)))
    table.add_row("modality", ", ".join(sorted({record.modality for record in store.cases})))
    classes = sorted({value for record in store.cases for value in record.labels or ()})
    table.add_row("classes", ", ".join(map(str, classes)) or "none")
    console.print(table)
