"""Volumes in from files and label maps out to files: the one place where axis order changes.

Inside the program arrays run in RAS+ order; a file keeps its own. Intensities are physical (HU for
CT): slope and intercept are applied here.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from spark3d.data.checks import fault
from spark3d.data.files import write_atomic
from spark3d.data.grid import Affine, SourceGrid, Volume, orient, restore
from spark3d.data.nifti import MAX_BYTES, encode_nifti, read_header, read_nifti
from spark3d.data.nifti_header import Geometry, NiftiHeader

__all__ = [
    "SourceGrid",
    "Volume",
    "read_grid",
    "read_label",
    "read_volume",
    "write_label",
    "write_volume",
]


def read_grid(path: Path, geometry: Geometry = "agree") -> SourceGrid:
    """The grid of a file from its header alone."""
    return read_header(Path(path), geometry).grid


def read_volume(
    path: Path,
    *,
    geometry: Geometry = "agree",
    channels: bool = False,
    nan_fill: float | None = None,
    max_bytes: int = MAX_BYTES,
) -> Volume:
    """Read a volume in RAS+ order with physical intensities.

    Args:
        path: a `.nii` or `.nii.gz` file.
        geometry: "agree" refuses a header whose sform, qform and voxel sizes contradict each
            other; "sform" or "qform" trusts that one.
        channels: accept a fourth axis as channels; otherwise a true 4D file is refused.
        nan_fill: value for NaN and infinite voxels; None refuses them.
        max_bytes: refuse files whose voxels take more memory than this.

    Returns:
        A volume `(c, *size)`: int16 or int32 where the intensities are whole numbers, else float32.

    Raises:
        DataError: with a code, the file, what was found and what to do.
    """
    header, raw = read_nifti(Path(path), geometry, max_bytes)
    if raw.ndim == 4 and not channels:
        raise fault(
            "E-4D", path, f"{raw.shape[3]} volumes in one file of shape {raw.shape}", "one volume",
            "say that the fourth axis holds channels, or split the file",
        )  # fmt: skip
    raw = raw[None] if raw.ndim == 3 else np.moveaxis(raw, 3, 0)
    raw, filled = _finite(raw, Path(path), nan_fill)
    array = _compact(_physical(raw, header), Path(path))
    oriented, affine = orient(array, header.affine)
    return Volume(np.ascontiguousarray(oriented), affine, header.grid, filled)


def read_label(path: Path, *, geometry: Geometry = "agree", max_bytes: int = MAX_BYTES) -> Volume:
    """Read a label map in RAS+ order: `(1, *size)`, uint8 if all classes are below 256, else int16.

    Raises:
        DataError: as `read_volume`; values that are not whole numbers in 0..32767.
    """
    header, raw = read_nifti(Path(path), geometry, max_bytes)
    if raw.ndim != 3:
        raise fault(
            "E-4D", path, f"a label of shape {raw.shape}", "one class number per voxel",
            "merge one-hot channels into one map",
        )  # fmt: skip
    values = _physical(_finite(raw, Path(path), None)[0][None], header)
    if values.dtype.kind == "f":
        whole = np.rint(values)
        if np.abs(values - whole).max() > 1e-4:
            raise fault(
                "E-LABEL-FLOAT", path, "label values that are not whole numbers",
                "whole numbers", "resample labels with nearest neighbour, not linearly",
            )  # fmt: skip
        values = whole
    low, high = values.min(), values.max()
    if low < 0 or high > 32767:
        raise fault(
            "E-LABEL-RANGE", path, f"label values from {low:g} to {high:g}", "0 to 32767",
            "map them to small numbers",
        )  # fmt: skip
    array = values.astype(np.uint8 if high < 256 else np.int16)
    oriented, affine = orient(array, header.affine)
    return Volume(np.ascontiguousarray(oriented), affine, header.grid)


def write_label(path: Path, labels: NDArray[np.integer], source: SourceGrid) -> None:
    """Write a label map in the source file's own axis order and affine, atomically.

    Args:
        path: target `.nii` or `.nii.gz`.
        labels: `(*size)` in RAS+ order on the source grid (see `SourceGrid.ras`).
        source: the grid of the image that was labelled.

    Raises:
        ValueError: `labels` is not on the source grid, or holds values outside 0..32767.
    """
    if labels.size and (labels.min() < 0 or labels.max() > 32767):
        raise ValueError(f"label values {labels.min()}..{labels.max()} do not lie in 0..32767")
    kind = np.uint8 if not labels.size or labels.max() < 256 else np.int16
    _write(path, restore(labels.astype(kind), source), source.affine)


def write_volume(path: Path, array: NDArray[np.generic], affine: Affine) -> None:
    """Write an array `(*size)` of int16, float32 or uint8 in the axis order of `affine`."""
    _write(path, array, affine)


def _write(path: Path, voxels: NDArray[np.generic], affine: Affine) -> None:
    path = Path(path)
    if not path.name.endswith((".nii", ".nii.gz")):
        raise ValueError(f"{path.name} must end in .nii or .nii.gz")
    write_atomic(path, encode_nifti(voxels, affine, path.name.endswith(".gz")))


def _physical(raw: NDArray[np.generic], header: NiftiHeader) -> NDArray[np.generic]:
    """Apply slope and intercept, exactly where both and the voxels are whole numbers."""
    slope, intercept = header.slope, header.intercept
    if slope == 1 and intercept == 0:
        return raw
    whole = raw.dtype.kind in "iu" and slope.is_integer() and intercept.is_integer()
    if whole and not _wide(raw, slope, intercept):
        return raw.astype(np.int64) * int(slope) + int(intercept)
    return raw.astype(np.float64) * slope + intercept


def _wide(raw: NDArray[np.generic], slope: float, intercept: float) -> bool:
    top = max(abs(float(raw.min())), abs(float(raw.max())))
    return top * abs(slope) + abs(intercept) > 2**62


def _finite(
    raw: NDArray[np.generic], path: Path, nan_fill: float | None
) -> tuple[NDArray[np.generic], int]:
    """Refuse or fill NaN and infinity; also how many voxels were filled."""
    if raw.dtype.kind != "f":
        return raw, 0
    bad = ~np.isfinite(raw)
    count = int(bad.sum())
    if not count:
        return raw, 0
    if nan_fill is None:
        raise fault(
            "E-NAN", path, f"{count} voxels that are NaN or infinite", "finite intensities",
            "pass --nan-fill VALUE to replace them",
        )  # fmt: skip
    return np.where(bad, np.asarray(nan_fill, raw.dtype), raw), count


def _compact(values: NDArray[np.generic], path: Path) -> NDArray[np.generic]:
    """The smallest of int16, int32 (whole numbers by type) and float32 that holds the values."""
    if values.dtype.kind in "iu":
        low, high = int(values.min()), int(values.max())
        for kind in (np.int16, np.int32):
            if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max:
                return values.astype(kind)
    elif values.dtype.kind == "f" and np.abs(values).max() < 1e30:
        return values.astype(np.float32)
    raise fault(
        "E-RANGE", path, f"intensities from {values.min():g} to {values.max():g}",
        "values that fit in 32 bits", "rescale the volume",
    )  # fmt: skip
