"""Making one prepared case out of its files: read, resample, crop to the body, measure."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from spark3d.data.body import body_cells, body_mask, bounding_box, class_points, intensity_stats
from spark3d.data.checks import check_label_values, check_same_grid, fault
from spark3d.data.geometry import resample
from spark3d.data.grid import Volume, crop_affine, spacing_of
from spark3d.data.io import read_label, read_volume
from spark3d.data.nifti_header import Geometry
from spark3d.data.record import CaseRecord, IntensityStats
from spark3d.data.sources import CaseSource
from spark3d.data.writer import PreparedCase

STEPS, FEWEST = 65000, 250
"""Integers that a channel of another scale than HU is spread over, and the fewest of its body."""


@dataclass(frozen=True)
class PrepareSpec:
    """How cases are prepared.

    Attributes:
        spacing_mm: target mm per voxel in RAS+ order; None takes the median of the data.
        modality: "CT", "MR", or "auto" (CT where values are whole numbers and reach -500).
        geometry: which part of a contradictory header to trust, "agree" for none.
        fourth_axis: 4D files hold channels.
        nan_fill: value for NaN voxels; None refuses them.
        labels: name -> value of the classes that may occur; None allows any.
        margin: voxels kept around the body.
        chunk: voxels per axis of a chunk on disk, 64 or 32.
        max_gib: refuse files whose voxels take more memory than this.
    """

    spacing_mm: tuple[float, float, float] | None = None
    modality: str = "auto"
    geometry: Geometry = "agree"
    fourth_axis: bool = False
    nan_fill: float | None = None
    labels: dict[str, int] | None = None
    margin: int = 2
    chunk: int = 64
    max_gib: float = 8.0

    def settings(self) -> dict[str, Any]:
        """What is recorded in the store and must match when it is continued."""
        return json.loads(json.dumps(asdict(self)))


def prepare_case(case: CaseSource, spec: PrepareSpec) -> PreparedCase:
    """Read, orient, resample and crop one case; touches no store.

    Raises:
        DataError: anything of it cannot be trusted.
    """
    source = _read_channels(case, spec)
    label = _read_label(case, spec, source)
    content = content_hash(source.array)
    modality = spec.modality if spec.modality != "auto" else guess_modality(source.array)
    spacing = spec.spacing_mm or source.spacing_mm
    volume = resample(source, spacing)
    if label is not None:
        label = resample(label, spacing, label=True)
    body = body_mask(volume.array, modality)
    if not body.any():
        raise fault(
            "E-NO-BODY", case.id, "no voxel above the background", "a body in the volume",
            "take the case out, or state its modality with --modality",
        )  # fmt: skip
    wanted = body if label is None else body | (label.array[0] > 0)
    start, size = bounding_box(wanted, spec.margin)
    box = tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))
    voxels = volume.array[(slice(None), *box)]
    stored, scale, shift = quantise(voxels, modality, case.id)
    intensity = intensity_stats(voxels, body[box])
    check_steps(intensity, scale, case.id)
    classes = None if label is None else label.array[0][box]
    present = None if classes is None else tuple(int(v) for v in np.unique(classes) if v)
    record = CaseRecord(
        id=case.id,
        group=case.group,
        section=case.section,
        modality=modality,
        channels=len(voxels),
        size=size,
        spacing_mm=spacing_of(volume.affine),
        affine=crop_affine(volume.affine, start),
        source=source.source,
        scale=scale,
        shift=shift,
        content_hash=content,
        intensity=intensity,
        labels=present,
        sidecar_hash="",
        filled=source.filled,
        patient=case.patient,
    )
    points = {} if classes is None or present is None else class_points(classes, present)
    return PreparedCase(record, stored, classes, body_cells(body[box]), points)


def content_hash(array: NDArray[np.generic]) -> str:
    """Hash of voxels `(c, *size)` in RAS+ order by value and size, whatever their type or file."""
    digest = xxhash.xxh3_128(repr(array.shape).encode())
    for channel in array:
        digest.update(np.ascontiguousarray(channel, np.float32).data)
    return digest.hexdigest()


def guess_modality(array: NDArray[np.generic]) -> str:
    """ "CT" where all values are whole numbers and some reach -500 (air), else "MR"."""
    if array.min() > -500:
        return "MR"
    return "CT" if array.dtype.kind in "iu" or not np.any(array != np.rint(array)) else "MR"


def quantise(
    array: NDArray[np.generic], modality: str, case: str
) -> tuple[NDArray[np.int16], tuple[float, ...], tuple[float, ...]]:
    """Intensities `(c, *size)` as int16: whole HU for CT; else each channel over int16's range.

    Returns:
        The integers, and scale and shift of each channel: intensity = integer * scale + shift.

    Raises:
        DataError: CT values that int16 cannot hold; they are never wrapped.
    """
    if modality == "CT":
        low, high = float(array.min()), float(array.max())
        if low < -32768 or high > 32767:
            raise fault(
                "E-HU-RANGE", case, f"values from {low:g} to {high:g}",
                "HU between -32768 and 32767",
                "correct the volume, or state another modality with --modality MR",
            )  # fmt: skip
        return np.rint(array).astype(np.int16), (1.0,) * len(array), (0.0,) * len(array)
    stored, scales, shifts = np.empty(array.shape, np.int16), [], []
    for number, channel in enumerate(array):
        low, high = float(channel.min()), float(channel.max())
        scale = float(np.float32(max(high - low, 1e-30) / STEPS))
        shift = float(np.float32((high + low) / 2))
        spread = (channel.astype(np.float64) - shift) / scale
        stored[number] = np.clip(np.rint(spread), -32768, 32767).astype(np.int16)
        scales.append(scale)
        shifts.append(shift)
    return stored, tuple(scales), tuple(shifts)


def check_steps(stats: Sequence[IntensityStats], scales: Sequence[float], case: str) -> None:
    """Refuse a channel whose body falls on a few integers, as a few extreme voxels make it.

    Raises:
        DataError: E-EXTREMES.
    """
    for number, (channel, scale) in enumerate(zip(stats, scales, strict=True)):
        if scale != 1 and 0 < channel.high - channel.low < FEWEST * scale:
            raise fault(
                "E-EXTREMES", case,
                f"values from {channel.minimum:g} to {channel.maximum:g} in channel {number}, but "
                f"nearly all from {channel.low:g} to {channel.high:g}",
                f"a body over {FEWEST} or more of {STEPS} steps of the whole range",
                "clip the extreme voxels, or take the case out",
            )  # fmt: skip


def _read_channels(case: CaseSource, spec: PrepareSpec) -> Volume:
    max_bytes = int(spec.max_gib * 2**30)
    volumes = [
        read_volume(
            source,
            geometry=spec.geometry,
            channels=spec.fourth_axis,
            nan_fill=spec.nan_fill,
            max_bytes=max_bytes,
        )
        for source in case.sources
    ]
    first = volumes[0]
    for other in volumes[1:]:
        check_same_grid(first.source, other.source, case.id, "channel")
    array = np.concatenate([v.array for v in volumes]) if len(volumes) > 1 else first.array
    if array.min() == array.max():
        raise fault(
            "E-CONSTANT", case.id, f"the one value {array.min():g} everywhere", "an image",
            "take the case out",
        )  # fmt: skip
    return replace(first, array=array, filled=sum(v.filled for v in volumes))


def _read_label(case: CaseSource, spec: PrepareSpec, image: Volume) -> Volume | None:
    if case.label is None:
        return None
    label = read_label(case.label, geometry=spec.geometry, max_bytes=int(spec.max_gib * 2**30))
    check_same_grid(image.source, label.source, case.id)
    check_label_values(label.array, case.id, spec.labels.values() if spec.labels else None)
    return replace(label, affine=image.affine)
