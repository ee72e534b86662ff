"""Scores of one label map against its reference, per organ, in mm on the grid of the reference.

Definitions. The surface of an organ is its voxels with a face on something else (scipy's
`binary_erosion`, as MONAI); distances run from each surface voxel to the nearest one of the other
surface, both ways. Overlap and surfaces are those of MONAI (`monai.metrics`).

- `dice`: 2 |P and R| / (|P| + |R|).
- `nsd`: share of both surfaces within a stated tolerance of the other (normalised surface Dice).
- `hd95_mm`: the larger of the two directed 95th percentiles of the distances.
- `asd_mm`: mean of the distances of both surfaces together (average symmetric surface distance).
- `volume_error`: (|P| - |R|) / |R|, signed, a ratio.

Absent organs. In neither map: every score is NaN and leaves the means. Missed or invented (in one
map only): `dice` and `nsd` are 0, the distances are the diagonal of the volume in mm, the largest
there can be, so that a miss costs and means stay finite; `volume_error` is -1 for a missed organ
and NaN for an invented one, which has no reference volume.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from monai.metrics.utils import get_mask_edges, get_surface_distance
from scipy.ndimage import find_objects

METRICS = ("dice", "nsd", "hd95_mm", "asd_mm", "volume_error")
"""The names of the scores, in the order of `OrganScores`."""

ABSENT_RULE = (
    "absent in both: not scored; missed or invented: Dice and NSD 0, distances = diagonal of the "
    "volume; volume error -1 when missed, not scored when invented"
)

Box = tuple[slice, ...]


@dataclass(frozen=True)
class OrganScores:
    """Scores of one organ in one case; see the module for definitions and for absent organs."""

    dice: float
    nsd: float
    hd95_mm: float
    asd_mm: float
    volume_error: float


def score_case(
    prediction: np.ndarray,
    reference: np.ndarray,
    labels: Mapping[int, str],
    spacing_mm: Sequence[float],
    tolerance_mm: float | Mapping[str, float] = 2.0,
) -> dict[str, OrganScores]:
    """Score every organ of one case; organs come in the order of `labels`.

    Args:
        prediction: integer label map `(*size)`, 2D or 3D.
        reference: integer label map of the same shape.
        labels: label -> name of the organ, without the background.
        spacing_mm: mm per voxel along each axis of the maps.
        tolerance_mm: distance up to which two surfaces count as the same in `nsd`, or one for every
            organ by its name.
    """
    _same_shape(prediction, reference)
    if len(spacing_mm) != prediction.ndim:
        raise ValueError(f"spacing_mm={tuple(spacing_mm)} does not fit shape {prediction.shape}")
    predicted, present = _boxes(prediction, labels), _boxes(reference, labels)
    diagonal = math.hypot(*(n * s for n, s in zip(prediction.shape, spacing_mm, strict=True)))
    scores = {}
    for label, name in labels.items():
        p, r = predicted[label], present[label]
        if p is None or r is None:
            scores[name] = _absent(p is not None, r is not None, diagonal)
        else:
            box = tuple(
                slice(min(a.start, b.start), max(a.stop, b.stop)) for a, b in zip(p, r, strict=True)
            )
            within = tolerance_mm[name] if isinstance(tolerance_mm, Mapping) else tolerance_mm
            scores[name] = _score_organ(
                prediction[box] == label, reference[box] == label, spacing_mm, within
            )
    return scores


def dice_per_label(
    prediction: np.ndarray, reference: np.ndarray, labels: Iterable[int]
) -> dict[int, float]:
    """Dice of each label by counting voxels once: fast enough for validation during training.

    NaN where the label is in neither map, 0 where it is in one only.

    Args:
        prediction: integer label map `(*size)`.
        reference: integer label map of the same shape; no label is negative.
        labels: the labels to score.
    """
    _same_shape(prediction, reference)
    wanted = list(labels)
    top = 1 + max([*wanted, int(prediction.max(initial=0)), int(reference.max(initial=0))])
    predicted = np.bincount(prediction.ravel(), minlength=top)
    present = np.bincount(reference.ravel(), minlength=top)
    both = np.bincount(reference[prediction == reference].ravel(), minlength=top)
    total = predicted + present
    return {k: float(2 * both[k] / total[k]) if total[k] else math.nan for k in wanted}


def _score_organ(
    prediction: np.ndarray, reference: np.ndarray, spacing_mm: Sequence[float], tolerance_mm: float
) -> OrganScores:
    """Scores of two binary maps, neither of them empty, cropped to their common box."""
    volumes = int(prediction.sum()), int(reference.sum())
    surfaces = get_mask_edges(prediction, reference)
    each = [
        np.asarray(get_surface_distance(start, goal, spacing=[float(s) for s in spacing_mm]))
        for start, goal in (surfaces, surfaces[::-1])
    ]
    both = np.concatenate(each)
    return OrganScores(
        dice=2 * int((prediction & reference).sum()) / sum(volumes),
        nsd=float((both <= tolerance_mm).mean()),
        hd95_mm=float(max(np.percentile(d, 95) for d in each)),
        asd_mm=float(both.mean()),
        volume_error=(volumes[0] - volumes[1]) / volumes[1],
    )


def _absent(is_predicted: bool, is_present: bool, diagonal: float) -> OrganScores:
    if not is_predicted and not is_present:
        return OrganScores(math.nan, math.nan, math.nan, math.nan, math.nan)
    return OrganScores(0.0, 0.0, diagonal, diagonal, -1.0 if is_present else math.nan)


def _boxes(labels: np.ndarray, wanted: Iterable[int]) -> dict[int, Box | None]:
    """The bounding box of every wanted label (None where absent), from one pass over the map."""
    wanted = list(wanted)
    found = find_objects(labels, max_label=max(wanted, default=0))
    return {label: found[label - 1] for label in wanted}


def _same_shape(prediction: np.ndarray, reference: np.ndarray) -> None:
    if prediction.shape != reference.shape:
        raise ValueError(
            f"a prediction of shape {prediction.shape} cannot be scored against a reference of "
            f"shape {reference.shape}; bring both to one grid"
        )
