"""From source files to a store: read, orient, resample, crop to the body, write; each case once.

`prepare` may be stopped at any moment and repeated: finished cases are recognised and left alone.
Every case that goes in comes out as written, skipped (already there) or failed with a reason.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from spark3d.data.case import PrepareSpec
from spark3d.data.checks import check_cases, fault, placed
from spark3d.data.files import remove_temporaries, write_atomic
from spark3d.data.grid import spacing_of
from spark3d.data.io import read_grid
from spark3d.data.job import Job, is_current, reason_of
from spark3d.data.pool import run_jobs
from spark3d.data.privacy import safe_cases
from spark3d.data.record import read_head, read_record, sealed, unsealed
from spark3d.data.sources import CaseSource
from spark3d.data.writer import StoreWriter
from spark3d.errors import DataError

__all__ = ["PrepareReport", "PrepareSpec", "finalize", "prepare"]

Progress = Callable[[int, int, str], None]


@dataclass
class PrepareReport:
    """Accounts for every case: written + skipped + failed is the number put in.

    Attributes:
        written: ids prepared now.
        skipped: ids found up to date.
        failed: id -> reason.
        duplicates: groups of ids whose source voxels are the same.
        spacing_mm: the target spacing that was used.
        renamed: source id -> id in the store, where a keyed hash replaced it.
    """

    written: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    duplicates: list[list[str]] = field(default_factory=list)
    spacing_mm: tuple[float, ...] = ()
    renamed: dict[str, str] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Cases put in."""
        return len(self.written) + len(self.skipped) + len(self.failed)

    @property
    def kept(self) -> list[str]:
        """Cases in the store."""
        return sorted((*self.written, *self.skipped))


def prepare(
    images: Sequence[CaseSource],
    out: Path | str,
    spec: PrepareSpec | None = None,
    workers: int = 0,
    progress: Progress | None = None,
    max_bad: int | None = None,
    shard: tuple[int, int] | None = None,
    memory_gib: float | None = None,
    verify: bool = False,
) -> PrepareReport:
    """Prepare cases into the store `out`, continuing where an earlier run stopped.

    Args:
        images: the cases.
        out: folder of the store; a second run with the same cases writes nothing.
        spec: how to prepare; `spacing_mm=None` takes the median spacing of `images`.
        workers: processes; 0 works in this one.
        progress: called after each case with (cases done, cases in all, id).
        max_bad: failed cases to accept; None accepts no labelled case and one unlabelled in 100. A
            share alone must not fail more cases than that of the whole set; `finalize` judges all.
        shard: (i, n) takes the i-th of n shares of the cases, i from 0; `finalize` then ends it.
            What shares of another count told before is removed.
        memory_gib: start no further case beyond this; None is half of the machine's memory.
        verify: read all of what is there already, and prepare again what was damaged.

    Raises:
        ConfigError: `out` is something else, or was prepared with other settings.
        DataError: no cases, a bad list, or more failures than `max_bad` (all others being done).
        EnvironmentProblem: no right to write, no space, another writer, a worker killed.
    """
    out = Path(out)
    check_cases(images, out)
    cases, renamed = safe_cases(images)
    spec = _with_spacing(spec or PrepareSpec(), cases, out)
    report = PrepareReport(spacing_mm=tuple(spec.spacing_mm or ()), renamed=renamed)
    mine = [case for case in cases if shard is None or _share_of(case.id, shard[1]) == shard[0]]
    with StoreWriter(out, spec.settings(), None if shard is None else shard[0]) as writer:
        if shard is None:
            remove_temporaries(out)
        else:
            _remove_other_counts(out, shard[1])
        todo = []
        for job in (Job(case, spec, out) for case in mine):
            if is_current(job, verify):
                report.skipped.append(job.case.id)
                if progress:
                    progress(report.total, len(mine), job.case.id)
            else:
                todo.append(job)
        if shard is not None and todo:  # until this share has ended again, finalize must wait
            _outcome_path(out, shard).unlink(missing_ok=True)
        for job, reason in run_jobs(todo, workers, memory_gib, writer.workers_lock):
            if reason is None:
                report.written.append(job.case.id)
            else:
                report.failed[job.case.id] = reason
            if progress:
                progress(report.total, len(mine), job.case.id)
        report.duplicates = _duplicates(out, report.kept)
        refuse_too_many(report, cases, max_bad, out)
        if shard is None and not report.kept:
            raise DataError(_no_case(out, report.failed))
        outcome = _outcome(report, mine)
        if shard is None:
            _end(writer, outcome)
        else:
            labelled, bad_labelled = _labelled(mine, report.failed)
            outcome |= {"labelled": labelled, "bad_labelled": bad_labelled}
            outcome["listed"] = {"cases": len(cases), "hash": _ids_hash(cases)}
            _write_changed(_outcome_path(out, shard), outcome)
    return report


def finalize(out: Path | str, max_bad: int | None = None) -> int:
    """End a store that was prepared in shares, once all of them are there.

    Args:
        out: folder of the store.
        max_bad: failed cases to accept over all shares, as for `prepare`.

    Returns:
        Cases in the store.

    Raises:
        DataError: no share, a share is missing, altered or of an earlier version, shares of
            different counts or different lists of cases, or more failures than `max_bad`.
    """
    out = Path(out)
    settings = read_head(out)["settings"]
    paths = sorted((out / "shards").glob("*-of-*.json"))
    counts = {int(path.stem.split("-of-")[1]) for path in paths}
    if len(counts) != 1:
        raise fault(
            "E-SHARDS", out, f"shares counted out of {sorted(counts) or 'nothing'}",
            "all shares of one count", "run every share with the same --shard I/N, which removes "
            "the outcomes of another N",
        )  # fmt: skip
    n = counts.pop()
    missing = [i for i in range(n) if not _outcome_path(out, (i, n)).exists()]
    if missing:
        raise fault(
            "E-SHARDS", out, f"no outcome of the shares {missing} of {n}", "all of them",
            "run these shares, then finalize again",
        )  # fmt: skip
    parts = [unsealed(path, "the outcome of a share") for path in paths]
    again = "run every share again (cases that are there stay), then finalize again"
    if not all("labelled" in part and "listed" in part for part in parts):
        raise fault(
            "E-SHARDS", out, "shares of an earlier version",
            "how many labelled cases each had, and of which list", again,
        )  # fmt: skip
    if len({part["listed"]["hash"] for part in parts}) > 1:
        sizes = sorted({str(part["listed"]["cases"]) for part in parts})
        raise fault(
            "E-SHARDS", out, f"shares of different lists of cases ({' or '.join(sizes)} cases)",
            "the same cases for all of them", again,
        )  # fmt: skip
    kept = sorted(case for part in parts for case in part["kept"])
    failed = {case: why for part in parts for case, why in part["failed"].items()}
    if not kept:
        raise DataError(_no_case(out, failed))
    total, labelled, bad_labelled = (
        sum(part[key] for part in parts) for key in ("total", "labelled", "bad_labelled")
    )
    _refuse_too_many(failed, total, labelled, bad_labelled, max_bad, out, "--end-shards ")
    outcome = {
        "total": total,
        "kept": kept,
        "failed": failed,
        "duplicates": _duplicates(out, kept),
    }
    with StoreWriter(out, settings) as writer:
        remove_temporaries(out)
        _end(writer, outcome)
    return len(kept)


def _end(writer: StoreWriter, outcome: dict[str, Any]) -> None:
    _write_changed(writer.folder / "report" / "prepare.json", outcome)
    writer.finish(outcome["kept"])


def _with_spacing(spec: PrepareSpec, cases: Sequence[CaseSource], out: Path) -> PrepareSpec:
    """Fill in an automatic spacing: that of the store if there is one, else the median of the data.

    Headers that cannot be read are passed over here; their cases fail later, by name.
    """
    if spec.spacing_mm is not None:
        return spec
    if (out / "store.json").exists():
        found = read_head(out)["settings"]
        return replace(spec, spacing_mm=tuple(found["spacing_mm"]))
    spacings, reasons = [], []
    for case in cases:
        try:
            spacings.append(spacing_of(read_grid(case.sources[0], spec.geometry).ras()[1]))
        except DataError as error:
            reasons.append(reason_of(error, case.id))
    if not spacings:
        raise fault(
            "E-NO-CASES", out.name, f"no volume whose header can be read, as in {reasons[0]}",
            "at least one", "'spark3d doctor' tells what is wrong with each",
        )  # fmt: skip
    x, y, z = (round(float(s), 4) for s in np.median(np.array(spacings), axis=0))
    return replace(spec, spacing_mm=(x, y, z))


def _outcome_path(out: Path, shard: tuple[int, int]) -> Path:
    return out / "shards" / f"{shard[0]}-of-{shard[1]}.json"


def _remove_other_counts(out: Path, n: int) -> None:
    """Outcomes of shares of another count than `n`; they tell of a division that is given up."""
    for path in (out / "shards").glob("*-of-*.json"):
        if not path.stem.endswith(f"-of-{n}"):
            path.unlink(missing_ok=True)


def _ids_hash(cases: Sequence[CaseSource]) -> str:
    """Of all ids, whatever their order."""
    return xxhash.xxh3_128_hexdigest("\n".join(sorted(case.id for case in cases)).encode())


def _share_of(case_id: str, n: int) -> int:
    return xxhash.xxh3_64_intdigest(f"share {case_id}".encode()) % n


def _duplicates(out: Path, kept: Sequence[str]) -> list[list[str]]:
    same: dict[str, list[str]] = {}
    for case_id in kept:
        same.setdefault(read_record(out, case_id)["case"]["content_hash"], []).append(case_id)
    return sorted(ids for ids in same.values() if len(ids) > 1)


def refuse_too_many(
    report: PrepareReport, cases: Sequence[CaseSource], max_bad: int | None, out: Path
) -> None:
    """Raise if more cases failed than `max_bad`, or than one unlabelled in 100 and no labelled one.

    Raises:
        DataError: with the reason of every failure.
    """
    labelled, bad_labelled = _labelled(cases, report.failed)
    _refuse_too_many(report.failed, len(cases), labelled, bad_labelled, max_bad, out)


def _labelled(cases: Sequence[CaseSource], failed: Mapping[str, str]) -> tuple[int, int]:
    """How many of the cases are labelled, and how many of these failed."""
    labelled = {case.id for case in cases if case.label is not None}
    return len(labelled), len(labelled & set(failed))


def _refuse_too_many(
    failed: Mapping[str, str],
    total: int,
    labelled: int,
    bad_labelled: int,
    max_bad: int | None,
    out: Path,
    option: str = "",
) -> None:
    bad_plain = len(failed) - bad_labelled
    allowed_plain = (total - labelled) // 100
    within = bad_labelled == 0 and bad_plain <= allowed_plain
    if max_bad is not None:
        within = len(failed) <= max_bad
    if within:
        return
    expected = f"0 labelled and {allowed_plain} unlabelled" if max_bad is None else str(max_bad)
    reasons = "".join(f"\n  {reason}" for reason in failed.values())
    raise DataError(
        f"E-TOO-MANY-BAD: {out}: found {len(failed)} unusable cases of {total} "
        f"({bad_labelled} of them labelled); expected at most {expected}; correct them, or "
        f"`spark3d prepare {option}--max-bad {len(failed)}` goes on without them{reasons}"
    )


def _no_case(out: Path, failed: Mapping[str, str]) -> str:
    """What is said where no case can be used, however many bad ones are accepted."""
    reasons = "".join(f"\n  {reason}" for reason in failed.values())
    return (
        f"E-NO-CASES: {out}: found {len(failed)} unusable cases and no other; expected at least "
        f"one that can be used; correct them{reasons}"
    )


def _outcome(report: PrepareReport, cases: Sequence[CaseSource]) -> dict[str, Any]:
    """The account that stays in the store; reasons without paths, which can name a patient."""
    ids = {case.id for case in cases}
    failed = {k: placed(why, k) for k, why in report.failed.items() if k in ids}
    return {
        "total": report.total,
        "kept": report.kept,
        "failed": failed,
        "duplicates": report.duplicates,
    }


def _write_changed(path: Path, content: dict[str, Any]) -> None:
    data = sealed(content)
    if not path.exists() or path.read_bytes() != data:
        path.parent.mkdir(exist_ok=True)
        write_atomic(path, data)
