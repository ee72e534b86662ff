"""Dice as other programs print it, each under its own name and never mixed with ours.

Published figures differ in what they average. Training-time validation often counts the background
as a class, on the resampled grid; one public helper counts an organ that the reference lacks as 0.
These are means of Dice alone, and not comparable with the scores of `spark3d.evaluation.metrics`.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from spark3d.data.geometry import resample
from spark3d.data.grid import Volume
from spark3d.evaluation.metrics import dice_per_label

ORGANS = "organs"
WITH_BACKGROUND = "with background"
ABSENT_ZERO = "organs, absent counts 0"
GRIDS = ("original grid", "resampled grid")

Variants = dict[str, float]


@dataclass(frozen=True)
class LegacyTable:
    """Name of a variant -> its mean over cases; `cases` holds those of every case."""

    means: Mapping[str, float]
    cases: Mapping[str, Variants]
    spacing_mm: tuple[float, ...] | None


def legacy_variants(
    prediction: Volume,
    reference: Volume,
    labels: Iterable[int],
    spacing_mm: Sequence[float] | None,
) -> Variants:
    """All variants of one case.

    Args:
        prediction: label map `(1, *size)` on the grid of the reference.
        reference: label map.
        labels: the organs, without the background.
        spacing_mm: of the resampled grid, to which both maps are moved; None leaves those out.
    """
    organs = list(labels)
    pairs = [(GRIDS[0], prediction, reference)]
    if spacing_mm is not None:
        moved = [resample(v, spacing_mm, label=True) for v in (prediction, reference)]
        pairs.append((GRIDS[1], moved[0], moved[1]))
    found: Variants = {}
    for grid, p, r in pairs:
        for name, value in _of_maps(p.array[0], r.array[0], organs).items():
            found[f"{name}, {grid}"] = value
    return found


def _of_maps(prediction: np.ndarray, reference: np.ndarray, organs: Sequence[int]) -> Variants:
    dice = dice_per_label(prediction, reference, [0, *organs])
    present = set(np.unique(reference).tolist())
    return {
        ORGANS: _mean([dice[k] for k in organs]),
        WITH_BACKGROUND: _mean([dice[k] for k in (0, *organs)]),
        ABSENT_ZERO: _mean([dice[k] if k in present else 0.0 for k in organs]),
    }


def legacy_table(
    cases: Mapping[str, Variants], spacing_mm: tuple[float, ...] | None
) -> LegacyTable:
    """Means over cases of every variant; cases without a value are left out."""
    names = list(next(iter(cases.values()), {}))
    means = {name: _mean([row[name] for row in cases.values()]) for name in names}
    return LegacyTable(means, cases, spacing_mm)


def _mean(values: Iterable[float]) -> float:
    known = [v for v in values if not math.isnan(v)]
    return sum(known) / len(known) if known else math.nan
