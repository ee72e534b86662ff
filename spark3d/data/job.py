"""One case as a piece of work: is it in the store already, and if not, put it there."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from spark3d.data.case import PrepareSpec, prepare_case
from spark3d.data.checks import fault, placed
from spark3d.data.chunks import ChunkedFile, Frame
from spark3d.data.record import SUFFIXES, CaseRecord, case_path, read_record
from spark3d.data.source_files import check_unchanged, fingerprint, same_files, stamps
from spark3d.data.sources import CaseSource
from spark3d.data.writer import write_case
from spark3d.errors import DataError


@dataclass(frozen=True)
class Job:
    """One case to be prepared into the store at `out`."""

    case: CaseSource
    spec: PrepareSpec
    out: Path


def run_job(job: Job) -> str | None:
    """Prepare and commit one case.

    Returns:
        None, or the reason why the case cannot be used.

    Raises:
        EnvironmentProblem: the machine, not the case, is at fault.
    """
    try:
        before = stamps(job.case)
        prepared = prepare_case(job.case, job.spec)
        key = {"settings": _settings_hash(job.spec), "files": fingerprint(before)}
        check_unchanged(job.case, before)
        write_case(job.out, prepared, key, job.spec.chunk)
    except (DataError, MemoryError) as error:
        return reason_of(error, job.case.id)
    return None


def reason_of(error: DataError | MemoryError, case_id: str) -> str:
    """Why a case cannot be used, with its id, which a path does not tell where parts are hidden."""
    if isinstance(error, MemoryError):
        found, expected = "too little memory for it", "room for six copies of it"
        return str(fault("E-MEMORY", case_id, found, expected, "lower --workers"))
    reason = str(error)
    place = reason.partition(": ")[2].partition(": found ")[0]
    return reason if case_id in place else placed(reason, f"{case_id} ({place})")


def is_current(job: Job, verify: bool = False) -> bool:
    """Whether the store holds this case, whole, from the same files and settings.

    Damage that leaves the lengths of files is seen with `verify` only, which reads them.
    """
    case_id = job.case.id
    if not case_path(job.out, case_id, ".json").exists():
        return False
    try:
        data = read_record(job.out, case_id)
    except DataError:
        return False
    for part, suffix in SUFFIXES.items():
        path = case_path(job.out, case_id, suffix)
        frame = data["files"].get(part)
        if frame is not None and not (path.exists() and path.stat().st_size == frame["n_bytes"]):
            return False
    described = data["case"]
    known = described["group"], described["section"], described.get("patient", "")
    same_place = known == (job.case.group, job.case.section, job.case.patient)
    one_scale = not isinstance(described["scale"], list) and described["scale"] != 1
    return (
        same_place
        and not (one_scale and described["channels"] > 1)  # which may have lost a channel
        and case_path(job.out, case_id, ".npz").exists()
        and data["key"]["settings"] == _settings_hash(job.spec)
        and same_files(job.case, data["key"]["files"])
        and not (verify and _damaged(job, data))
    )


def _damaged(job: Job, data: dict[str, Any]) -> bool:
    """Whether any byte of a case differs from what was prepared."""
    case_id = job.case.id
    try:
        for part, frame in data["files"].items():
            path = case_path(job.out, case_id, SUFFIXES[part])
            ChunkedFile(path, Frame.from_json(frame), case_id).verify()
        _ = CaseRecord.from_json(data["case"], case_path(job.out, case_id, ".npz")).body
    except DataError:
        return True
    return False


def _settings_hash(spec: PrepareSpec) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(spec.settings(), sort_keys=True).encode())
