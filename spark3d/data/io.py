"""Volumes in from files and label maps out to files: the one place where axis order changes.

Inside the program arrays run in RAS+ order; a file keeps its own. Intensities are physical (HU for
CT): slope and intercept are applied here, for every format alike.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from spark3d.data.checks import fault
from spark3d.data.dicom import read_series, read_series_header
from spark3d.data.files import write_atomic
from spark3d.data.grid import Affine, SourceGrid, Volume, orient, restore, spacing_of
from spark3d.data.header import Header
from spark3d.data.metaimage import parse_metaimage
from spark3d.data.nifti import encode_nifti, read_header, read_nifti
from spark3d.data.nifti_header import Geometry
from spark3d.data.nrrd import parse_nrrd
from spark3d.data.streams import MAX_BYTES
from spark3d.data.text_header import read_body, read_layout
from spark3d.errors import DataError

__all__ = [
    "Source",
    "SourceGrid",
    "Volume",
    "data_files",
    "read_extent",
    "read_grid",
    "read_label",
    "read_volume",
    "stem",
    "write_label",
    "write_volume",
]

Source = Path | Sequence[Path]
"""One file, or the slices of a DICOM series in any order."""
TEXT_HEADERS = {
    ".nrrd": parse_nrrd,
    ".nhdr": parse_nrrd,
    ".mha": parse_metaimage,
    ".mhd": parse_metaimage,
}
SUFFIXES = (".nii.gz", ".nii", *TEXT_HEADERS)
TO_RAS = {"RAS": (1, 1, 1, 1), "LAS": (-1, 1, 1, 1), "LPS": (-1, -1, 1, 1)}


def stem(path: Path) -> str:
    """The name of a volume's file without its suffix, `.nii.gz` as a whole."""
    suffix = next((s for s in SUFFIXES if path.name.endswith(s)), "")
    return path.name.removesuffix(suffix)


def data_files(source: Source) -> tuple[Path, ...]:
    """Every file a volume is made of; with a detached header the file of its voxels, if there.

    A header that cannot be read stands alone; reading the volume will say what is wrong with it.
    """
    if not isinstance(source, Path):
        return tuple(source)
    if source.suffix not in TEXT_HEADERS:
        return (source,)
    try:
        body = read_layout(source, TEXT_HEADERS[source.suffix]).data
    except DataError:
        return (source,)
    return (source, body) if body != source and body.is_file() else (source,)


def read_grid(source: Source, geometry: Geometry = "agree") -> SourceGrid:
    """The grid of a volume from its headers alone."""
    header = _header(source, geometry)
    return SourceGrid(header.shape[:3], header.affine)


def read_extent(
    source: Source, geometry: Geometry = "agree"
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Sizes and spacing in mm in the order of the file, channels last, from its headers alone."""
    header = _header(source, geometry)
    return header.shape, spacing_of(header.affine)


def _header(source: Source, geometry: Geometry) -> Header:
    source = Path(source) if isinstance(source, str) else source
    if not isinstance(source, Path):
        return _in_ras(read_series_header(source))
    if source.suffix in TEXT_HEADERS:
        return _in_ras(read_layout(source, TEXT_HEADERS[source.suffix]).header)
    return _in_ras(read_header(source, geometry))


def _read(source: Source, geometry: Geometry, max_bytes: int) -> tuple[Header, NDArray[np.generic]]:
    """Header, its affine to RAS, and stored voxels in the order of the file."""
    source = Path(source) if isinstance(source, str) else source
    if not isinstance(source, Path):
        header, raw = read_series(source, max_bytes)
    elif source.suffix in TEXT_HEADERS:
        header, raw = read_body(source, TEXT_HEADERS[source.suffix], max_bytes)
    else:
        header, raw = read_nifti(source, geometry, max_bytes)
    return _in_ras(header), raw


def _in_ras(header: Header) -> Header:
    return replace(header, affine=np.diag(TO_RAS[header.world]) @ header.affine, world="RAS")


def read_volume(
    source: Source,
    *,
    geometry: Geometry = "agree",
    channels: bool = False,
    nan_fill: float | None = None,
    max_bytes: int = MAX_BYTES,
) -> Volume:
    """Read a volume in RAS+ order with physical intensities.

    Args:
        source: a `.nii`, `.nii.gz`, `.nrrd`, `.nhdr`, `.mha` or `.mhd` file, or the files of one
            DICOM series.
        geometry: "agree" refuses a NIfTI header whose sform, qform and voxel sizes contradict each
            other; "sform" or "qform" trusts that one.
        channels: accept a fourth axis as channels; otherwise a true 4D file is refused.
        nan_fill: physical intensity of NaN and infinite voxels; None refuses them.
        max_bytes: refuse files whose voxels take more memory than this.

    Returns:
        A volume `(c, *size)`: int16 or int32 where the intensities are whole numbers, else float32.

    Raises:
        DataError: with a code, the file, what was found and what to do.
    """
    header, raw = _read(source, geometry, max_bytes)
    path = header.path
    if raw.ndim == 4 and not channels:
        raise fault(
            "E-4D", path, f"{raw.shape[3]} volumes in one file of shape {raw.shape}", "one volume",
            'split the file; if they are channels, list several under "modality" in a Decathlon '
            'dataset.json, or set "fourth_axis": true in a list of cases',
        )  # fmt: skip
    raw = raw[None] if raw.ndim == 3 else np.moveaxis(raw, 3, 0)
    raw, bad = _finite(raw, path, refuse=nan_fill is None)
    values = _physical(raw, header)
    if bad is not None and nan_fill is not None:
        values[bad] = nan_fill
    array = _compact(values, path)
    oriented, affine = orient(array, header.affine)
    grid = SourceGrid(header.shape[:3], header.affine)
    filled = 0 if bad is None else int(bad.sum())
    return Volume(np.ascontiguousarray(oriented), affine, grid, filled)


def read_label(path: Path, *, geometry: Geometry = "agree", max_bytes: int = MAX_BYTES) -> Volume:
    """Read a label map in RAS+ order: `(1, *size)`, uint8 if all classes are below 256, else int16.

    Raises:
        DataError: as `read_volume`; values that are not whole numbers in 0..32767.
    """
    header, raw = _read(Path(path), geometry, max_bytes)
    if raw.ndim != 3:
        raise fault(
            "E-4D", path, f"a label of shape {raw.shape}", "one class number per voxel",
            "merge one-hot channels into one map",
        )  # fmt: skip
    values = _physical(_finite(raw, Path(path), refuse=True)[0][None], header)
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
    grid = SourceGrid(header.shape[:3], header.affine)
    return Volume(np.ascontiguousarray(oriented), affine, grid)


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


def _physical(raw: NDArray[np.generic], header: Header) -> NDArray[np.generic]:
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
    raw: NDArray[np.generic], path: Path, refuse: bool
) -> tuple[NDArray[np.generic], NDArray[np.bool_] | None]:
    """Refuse NaN and infinity, or put 0 in their place and tell where they were."""
    if raw.dtype.kind != "f":
        return raw, None
    bad = ~np.isfinite(raw)
    count = int(bad.sum())
    if not count:
        return raw, None
    if refuse:
        raise fault(
            "E-NAN", path, f"{count} voxels that are NaN or infinite", "finite intensities",
            "pass --nan-fill VALUE to replace them",
        )  # fmt: skip
    return np.where(bad, np.zeros((), raw.dtype), raw), bad


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
