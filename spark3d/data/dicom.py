"""DICOM series: slices put in order by their positions, and refused where these make no grid.

Spacing between slices is that of ImagePositionPatient; SliceThickness is not read, as it is the
width of the beam. A tilted gantry makes a sheared grid, which is refused: straightening it
resamples every voxel, and that is for a converter, whose result can be looked at.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from spark3d.data.checks import check_affine, fault
from spark3d.data.dicom_slice import Slice, read_pixels, read_slice
from spark3d.data.grid import Affine
from spark3d.data.header import Header, check_budget, checked_shape
from spark3d.data.streams import MAX_BYTES, unreadable

ROUNDING_MM = 0.05
ROUNDING_SHARE = 0.02
SKEW = 1e-3


def read_series_header(paths: Sequence[Path]) -> Header:
    """The grid of a series, from the headers of all its slices.

    Raises:
        DataError: a slice that cannot be used, or slices that make no volume.
    """
    return _header(_ordered(paths))


def ordered_files(paths: Sequence[Path]) -> list[Path]:
    """The files of a series along the last axis of what `read_series` returns.

    Raises:
        DataError: as `read_series_header`.
    """
    return [one.path for one in _ordered(paths)]


def read_series(
    paths: Sequence[Path], max_bytes: int = MAX_BYTES
) -> tuple[Header, NDArray[np.generic]]:
    """Read header and voxels `(columns, rows, slices)`.

    Voxels are as stored where one slope and intercept hold for all slices, else physical.

    Raises:
        DataError: as `read_series_header`; pixels that are missing or damaged, too many of them.
    """
    slices = _ordered(paths)
    header = _header(slices)
    for one in slices:
        _check_size(one)
    check_budget(header.voxel_bytes, max_bytes, header.path)
    first, physical = read_pixels(slices[0])
    varying = len({(one.rescale, one.compressed) for one in slices}) > 1
    if varying or physical:
        header = Header(header.path, header.shape, header.dtype, header.affine, "LPS")
    kind = np.dtype(np.float64) if varying else first.dtype.newbyteorder("=")
    check_budget(len(slices) * first.size * kind.itemsize, max_bytes, header.path)
    stack = np.empty((len(slices), *first.shape), kind)
    for index, one in enumerate(slices):
        pixels, physical = read_pixels(one)
        if varying and not physical and one.rescale:
            pixels = pixels.astype(np.float64) * one.rescale[0] + one.rescale[1]
        if not np.can_cast(pixels.dtype, kind):
            raise fault(
                "E-DICOM-MIXED", header.path, f"slices decoded to {kind} and {pixels.dtype}",
                "one type of pixels", "fetch the series again from its source",
            )  # fmt: skip
        stack[index] = pixels
    return header, stack.transpose(2, 1, 0)


def _ordered(paths: Sequence[Path]) -> list[Slice]:
    """The slices along their normal, once they are known to be of one kind."""
    slices = [read_slice(path) for path in sorted(paths)]
    folder = slices[0].path.parent
    checked_shape([*slices[0].size, len(slices)], folder)
    _check_alike(slices, folder)
    without = sum(one.rescale is None for one in slices)
    if without and (slices[0].modality == "CT" or without < len(slices)):
        raise fault(
            "E-DICOM-RESCALE", folder, f"{without} of {len(slices)} slices without rescale slope "
            "and intercept", "them in every slice, as CT has no HU without",
            "fetch the series again from its source, or take it out",
        )  # fmt: skip
    normal = np.cross(*slices[0].axes)
    return sorted(slices, key=lambda one: float(one.position @ normal))


def _check_alike(slices: Sequence[Slice], folder: Path) -> None:
    """Refuse slices of several sizes, pixel spacings, orientations or kinds of pixels."""
    kinds = Counter((one.size, one.bits, one.signed, one.modality) for one in slices)
    unlike = {"size or kind of pixels": len(slices) - max(kinds.values())}
    for what, values in (
        ("pixel spacing", np.array([one.spacing_mm for one in slices])),
        ("orientation", np.array([one.axes.ravel() for one in slices])),
    ):
        away = np.abs(values - np.median(values, axis=0)).max(axis=1)
        unlike[what] = int((away > 1e-3).sum())
    for what, count in unlike.items():
        if count:
            raise fault(
                "E-DICOM-MIXED", folder, f"{count} of {len(slices)} slices of another {what}",
                "slices of one volume",
                "move localisers and other volumes into folders of their own",
            )  # fmt: skip


def _header(slices: Sequence[Slice]) -> Header:
    first = slices[0]
    folder = first.path.parent
    positions = np.array([one.position for one in slices])
    step = _step(slices, positions, folder)
    affine: Affine = np.eye(4)
    axes = np.median([one.axes for one in slices], axis=0)
    affine[:3, :2] = axes.T * np.median([one.spacing_mm for one in slices], axis=0)
    affine[:3, 2] = step
    affine[:3, 3] = positions[0]
    check_affine(affine, folder)
    kind = np.dtype(f"{'i' if first.signed else 'u'}{first.bits[0] // 8}")
    slope, intercept = first.rescale or (1.0, 0.0)
    return Header(folder, (*first.size, len(slices)), kind, affine, "LPS", slope, intercept)


def _step(
    slices: Sequence[Slice], positions: NDArray[np.float64], folder: Path
) -> NDArray[np.float64]:
    """The vector from slice to slice, one for all of them.

    Raises:
        DataError: slices in one place, gaps, uneven or sideways steps, a tilted gantry.
    """
    normal = np.cross(*slices[0].axes)
    depth = positions @ normal
    steps = np.diff(depth)
    _check_repeats(slices, depth, folder)
    usual = float(np.median(steps[steps < 1.5 * steps.min()]))  # gaps may outnumber the rest
    rounding = max(ROUNDING_MM, ROUNDING_SHARE * usual)
    wide = steps[steps > usual + 2 * rounding]
    whole = np.rint(wide / usual)
    if wide.size and (whole >= 2).all() and (np.abs(wide - whole * usual) <= 2 * rounding).all():
        raise fault(
            "E-DICOM-MISSING", folder, f"{int((whole - 1).sum())} slices missing in {wide.size} "
            f"gaps of up to {wide.max():g} mm among steps of {usual:g} mm", "every slice",
            "fetch the series again from its source",
        )  # fmt: skip
    step = (positions[-1] - positions[0]) / (len(slices) - 1)
    stray = positions - positions[0] - np.arange(len(slices))[:, None] * step
    if np.abs(stray @ normal).max() > rounding:
        raise fault(
            "E-DICOM-SPACING", folder, f"steps between slices from {steps.min():g} to "
            f"{steps.max():g} mm", "one step",
            "split the series where its step changes, or resample it with a converter",
        )  # fmt: skip
    if np.linalg.norm(stray, axis=1).max() > rounding:
        raise fault(
            "E-DICOM-SHIFT", folder, "slices that lie sideways of the line through the first and "
            "the last", "positions on one line", "split the series into its volumes",
        )  # fmt: skip
    straight = float(step @ normal)
    sideways = float(np.linalg.norm(step - straight * normal))
    if sideways > SKEW * straight:
        degrees = np.degrees(np.arctan2(sideways, straight))
        raise fault(
            "E-DICOM-TILT", folder, f"slices that shift by {sideways:.3g} mm for each "
            f"{straight:.3g} mm (a gantry tilted by {degrees:.1f}"
            " degrees)", "slices straight above each other",
            "convert the series with a tool that straightens it, e.g. dcm2niix",
        )  # fmt: skip
    return step


def _check_repeats(slices: Sequence[Slice], depth: NDArray[np.float64], folder: Path) -> None:
    """Refuse slices in one place: copies of a slice, or several volumes."""
    new = np.concatenate([[True], np.diff(depth) > 1e-4])
    counts = np.bincount(np.cumsum(new) - 1)
    if (counts == 1).all():
        return
    copies = len(slices) - len({one.instance for one in slices})
    if (counts == counts[0]).all() and not copies:
        raise fault(
            "E-DICOM-TWO-VOLUMES", folder, f"{counts[0]} slices at each of {len(counts)} places, "
            "under one series UID", "one volume per series",
            "split the series, e.g. by its acquisition or echo number",
        )  # fmt: skip
    raise fault(
        "E-DICOM-DUPLICATE", folder, f"{len(slices) - len(counts)} slices in the place of another "
        f"({copies} of them copies with the same UID)", "one slice in each place",
        "remove the copies, or split the series into its volumes",
    )  # fmt: skip


def _check_size(one: Slice) -> None:
    """Uncompressed pixels must fit into their file; nothing is read."""
    try:
        size = one.path.stat().st_size
    except OSError as error:
        raise unreadable(one.path, error) from None
    claimed = one.size[0] * one.size[1] * one.bits[0] // 8
    if not one.compressed and claimed > size:
        raise fault(
            "E-TRUNCATED", one.path, f"a header that claims {claimed} bytes in a file of {size}",
            "a file as large as its header says", "fetch the slice again",
        )  # fmt: skip
