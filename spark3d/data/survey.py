"""What is wrong with a set of volumes before any work: each case alone, then against the others.

A case is examined as it would be prepared, at its own spacing, so what passes here passes there.
Rules for what is unlike the rest, of which a person should look at each:

- spacing: an axis over 2.5 times, or under 1/2.5 of, the median of that axis;
- size: an extent in mm under a third of the median of that axis;
- modality: another than most (a CT whose intercept was lost looks like an MR);
- intensity: the mean over the body further from the median of CT means than 150 HU and than five
  times their median deviation;
- voxels: the same as those of another case.
"""

import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from spark3d.data.case import PrepareSpec, prepare_case
from spark3d.data.checks import fault
from spark3d.data.chunks import encode
from spark3d.data.job import Job, reason_of
from spark3d.data.layouts import CaseSource
from spark3d.data.record import CaseRecord
from spark3d.errors import DataError

SPACING_FACTOR = 2.5
SIZE_FACTOR = 3.0
MEAN_HU = 150.0
DEVIATIONS = 5.0
SAMPLES = 3


@dataclass(frozen=True)
class Examined:
    """One case: the fault that keeps it from being prepared, if any, and what is known of it.

    `record` is at the spacing of the source, cropped to the body; None where the volume itself
    cannot be used.
    """

    id: str
    fault: str | None
    record: CaseRecord | None


@dataclass(frozen=True)
class Estimate:
    """What preparing would take, from preparing a few of the cases here and now.

    Attributes:
        voxels: of the whole store.
        store_bytes: on the disk.
        seconds: of one process.
        sampled: cases that were prepared for it.
    """

    voxels: int
    store_bytes: int
    seconds: float
    sampled: int


def examine(job: Job) -> Examined:
    """Read a case to its last byte and check all that `prepare` would; nothing is written."""
    spec = replace(job.spec, spacing_mm=None)
    try:
        return Examined(job.case.id, None, prepare_case(job.case, spec).record)
    except (DataError, MemoryError) as error:
        found = reason_of(error, job.case.id)
    if job.case.label is None:
        return Examined(job.case.id, found, None)
    try:  # the image may be sound
        record = prepare_case(replace(job.case, label=None), spec).record
    except (DataError, MemoryError):
        record = None
    return Examined(job.case.id, found, record)


def median_spacing(records: Sequence[CaseRecord]) -> tuple[float, float, float]:
    """The spacing that `prepare` takes by default, mm in RAS+ order."""
    x, y, z = np.median(np.array([record.spacing_mm for record in records]), axis=0)
    return round(float(x), 4), round(float(y), 4), round(float(z), 4)


def unlike_the_rest(records: Sequence[CaseRecord]) -> dict[str, list[str]]:
    """Id -> remarks, for the cases that stand out by the rules at the top of this file."""
    remarks: dict[str, list[str]] = {record.id: [] for record in records}
    spacings = np.array([record.spacing_mm for record in records])
    extents = spacings * np.array([record.size for record in records])
    usual, common = np.median(spacings, axis=0), np.median(extents, axis=0)
    modality = Counter(record.modality for record in records).most_common(1)[0][0]
    for record, spacing, extent in zip(records, spacings, extents, strict=True):
        ratio = spacing / usual
        if ratio.max() > SPACING_FACTOR or ratio.min() < 1 / SPACING_FACTOR:
            remarks[record.id].append(f"W-SPACING: {_mm(spacing)} mm; the median is {_mm(usual)}")
        if (extent < common / SIZE_FACTOR).any():
            remarks[record.id].append(f"W-SIZE: {_mm(extent)} mm; the median is {_mm(common)}")
        if record.modality != modality:
            remarks[record.id].append(
                f"W-MODALITY: {record.modality} by its values among {modality}"
            )
    for case_id, mean, middle in _odd_means([r for r in records if r.modality == "CT"]):
        remarks[case_id].append(
            f"W-INTENSITY: {mean:.0f} HU on average; the median is {middle:.0f}"
        )
    return {case_id: found for case_id, found in remarks.items() if found}


def _odd_means(records: Sequence[CaseRecord]) -> list[tuple[str, float, float]]:
    means = np.array([record.mean[0] for record in records])
    if not means.size:
        return []
    middle = float(np.median(means))
    spread = 1.4826 * float(np.median(np.abs(means - middle)))
    odd = np.abs(means - middle) > max(MEAN_HU, DEVIATIONS * spread)
    return [
        (record.id, float(mean), middle)
        for record, mean, strange in zip(records, means, odd, strict=True)
        if strange
    ]


def same_voxels(
    records: Sequence[CaseRecord],
) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Cases with the voxels of another.

    Returns:
        Id -> remarks, and id -> faults where the two lie in different sections of a data set, of
        which one would be tested on what the other has taught.
    """
    groups: dict[str, list[CaseRecord]] = {}
    for record in records:
        groups.setdefault(record.content_hash, []).append(record)
    remarks: dict[str, list[str]] = {}
    leaks: dict[str, list[str]] = {}
    for members in (group for group in groups.values() if len(group) > 1):
        names = ", ".join(sorted(record.id for record in members))
        if len({record.section for record in members}) == 1:
            for record in members:
                remarks.setdefault(record.id, []).append(
                    f"W-DUPLICATE: the voxels of {names} agree"
                )
            continue
        sections = ", ".join(sorted({record.section for record in members}))
        for record in members:
            error = fault(
                "E-LEAK-VOXELS", record.id, f"the same voxels in {names} ({sections})",
                "no volume in two parts of a data set", "take it out of all parts but one",
            )  # fmt: skip
            leaks.setdefault(record.id, []).append(str(error))
    return remarks, leaks


def estimate(
    cases: Sequence[CaseSource], records: Sequence[CaseRecord], spec: PrepareSpec
) -> Estimate:
    """Prepare a few sound cases, spread over the set, and scale up by voxels; writes nothing.

    Args:
        cases: all of them.
        records: of the sound ones, at source spacing.
        spec: with the target spacing.
    """
    assert spec.spacing_mm is not None
    voxels = {record.id: _voxels_at(record, spec.spacing_mm) for record in records}
    by_size = sorted(records, key=lambda record: voxels[record.id])
    count = min(SAMPLES, len(by_size))
    picked = {by_size[(2 * k + 1) * len(by_size) // (2 * count)].id for k in range(count)}
    begun, n_bytes, n_voxels = time.perf_counter(), 0, 0
    for case in (case for case in cases if case.id in picked):
        prepared = prepare_case(case, spec)
        for array in (prepared.voxels, prepared.label):
            n_bytes += 0 if array is None else len(encode(array, spec.chunk)[0])
        n_voxels += prepared.voxels.size
    seconds = time.perf_counter() - begun
    total = sum(voxels.values())
    share = total / max(1, n_voxels)
    return Estimate(total, round(n_bytes * share), seconds * share, len(picked))


def _voxels_at(record: CaseRecord, spacing_mm: Sequence[float]) -> int:
    scale = math.prod(a / b for a, b in zip(record.spacing_mm, spacing_mm, strict=True))
    return round(record.channels * math.prod(record.size) * scale)


def _mm(values: np.ndarray) -> str:
    return " x ".join(f"{value:.3g}" for value in values)
