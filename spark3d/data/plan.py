"""Choosing intensity window, crop and batch from what a store holds, with the reason for each.

Rules, in the order in which they are applied:

- modality: that of most cases.
- window: CT is clipped to the soft-tissue window -175..250 HU and scaled to 0..1 (the usual window
  for abdominal organs, BTCV); to -1000..400 HU where air in the body dominates (mean below -300
  HU: lungs). Any other modality has no unit, so each case is brought to mean 0 and deviation 1
      over its body.
- crop: on each axis the largest multiple of the cell that fits into the median case, but at least
  two cells; then the longest axis loses a cell until the crop has at most 96^3 voxels.
- batch: as many crops as two of 96^3 voxels have voxels, from 2 to 16, no more than there are
  cases.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from spark3d.data.intensity import Window
from spark3d.data.record import CaseRecord
from spark3d.errors import DataError

SOFT_TISSUE_HU = (-175.0, 250.0)
LUNG_HU = (-1000.0, 400.0)
LUNG_MEAN_HU = -300.0
CROP_VOXELS = 96**3
BATCH_VOXELS = 2 * CROP_VOXELS
MAX_BATCH = 16


@dataclass(frozen=True)
class Plan:
    """What was chosen, and why.

    Attributes:
        modality: "CT" or "MR".
        spacing_mm: of the store.
        window: intensities -> range of the network.
        crop: voxels per axis of a training crop.
        batch: crops per step.
        reasons: one line for each of `modality`, `spacing`, `window`, `crop` and `batch`.
    """

    modality: str
    spacing_mm: tuple[float, ...]
    window: Window
    crop: tuple[int, ...]
    batch: int
    reasons: dict[str, str]


def suggest_plan(
    records: Sequence[CaseRecord],
    spacing_mm: Sequence[float],
    cell: Sequence[int],
) -> Plan:
    """Choose window, crop and batch for these cases by the rules at the top of this file.

    Args:
        records: the cases to train on.
        spacing_mm: of their store.
        cell: voxels per axis that a crop must be a multiple of; of two axes for axial slices.

    Raises:
        DataError: no records.
    """
    if not records:
        raise DataError("E-NO-CASES: found no case to plan for; give at least one")
    modality, count = Counter(record.modality for record in records).most_common(1)[0]
    window, window_reason = _window(modality, records)
    crop, crop_reason = _crop([record.size[: len(cell)] for record in records], cell)
    batch = max(2, min(MAX_BATCH, BATCH_VOXELS // math.prod(crop)))
    batch = max(1, min(batch, len(records)))
    reasons = {
        "modality": f"{count} of {len(records)} cases are {modality}",
        "spacing": "that of the store",
        "window": window_reason,
        "crop": crop_reason,
        "batch": f"{batch} crops of {math.prod(crop)} voxels, at most {BATCH_VOXELS} in all, "
        f"from {len(records)} cases",
    }
    return Plan(modality, tuple(spacing_mm), window, crop, batch, reasons)


def _window(modality: str, records: Sequence[CaseRecord]) -> tuple[Window, str]:
    if modality != "CT":
        reason = "no common unit: each case to mean 0 and deviation 1 over its body"
        return Window(mode="zscore"), reason
    mean = float(np.median([record.mean[0] for record in records if record.modality == "CT"]))
    if mean < LUNG_MEAN_HU:
        low, high = LUNG_HU
        why = f"lungs dominate (median of the mean is {mean:.0f} HU)"
    else:
        low, high = SOFT_TISSUE_HU
        why = f"soft tissue (median of the mean is {mean:.0f} HU)"
    return Window(mode="unit", low=low, high=high), f"CT, {why}: {low:g}..{high:g} HU to 0..1"


def _crop(sizes: Sequence[tuple[int, ...]], cell: Sequence[int]) -> tuple[tuple[int, ...], str]:
    median = [int(n) for n in np.median(np.array(sizes), axis=0)]
    cells = [max(2, n // c) for n, c in zip(median, cell, strict=True)]

    def voxels() -> int:
        return math.prod(n * c for n, c in zip(cells, cell, strict=True))

    while voxels() > CROP_VOXELS and max(cells) > 2:
        sides = [n * c if n > 2 else 0 for n, c in zip(cells, cell, strict=True)]
        cells[sides.index(max(sides))] -= 1
    crop = tuple(n * c for n, c in zip(cells, cell, strict=True))
    shape = " x ".join(str(n) for n in median)
    short = sum(any(a < b for a, b in zip(size, crop, strict=True)) for size in sizes)
    padded = f"; {short} cases are smaller on some axis and padded" if short else ""
    unit = " x ".join(str(c) for c in cell)
    return (
        crop,
        f"multiples of {unit} within the median size {shape} and {CROP_VOXELS} voxels{padded}",
    )
