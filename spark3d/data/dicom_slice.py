"""One DICOM file: the fields of its header that are used, and its pixels.

No other field is decoded, none is kept but numbers, and nothing of a header is quoted in a message:
a header names the patient in dozens of places. UIDs and the patient's id serve to group slices
within one call, and leave it as keyed hashes only.
"""

import logging
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray
from pydicom import Dataset, dcmread
from pydicom.filereader import read_file_meta_info

from spark3d.data.checks import fault
from spark3d.data.streams import opened_raw, pull
from spark3d.errors import DataError

logging.getLogger("pydicom").disabled = True  # it quotes values of fields

PLAIN = {
    "1.2.840.10008.1.2": "<",
    "1.2.840.10008.1.2.1": "<",
    "1.2.840.10008.1.2.2": ">",
}
COMPRESSED = (
    "1.2.840.10008.1.2.4.50",  # JPEG baseline
    "1.2.840.10008.1.2.4.51",
    "1.2.840.10008.1.2.4.57",  # JPEG lossless
    "1.2.840.10008.1.2.4.70",
    "1.2.840.10008.1.2.4.80",  # JPEG-LS
    "1.2.840.10008.1.2.4.81",
    "1.2.840.10008.1.2.4.90",  # JPEG 2000
    "1.2.840.10008.1.2.4.91",
    "1.2.840.10008.1.2.5",  # run lengths
)
GROUPING = (
    "SOPInstanceUID", "SeriesInstanceUID", "PatientID", "Modality", "ImageType",
)  # fmt: skip
NUMBERS = (
    "Rows", "Columns", "SamplesPerPixel", "NumberOfFrames", "BitsAllocated", "BitsStored",
    "HighBit", "PixelRepresentation", "PhotometricInterpretation", "ImagePositionPatient",
    "ImageOrientationPatient", "PixelSpacing", "RescaleSlope", "RescaleIntercept",
    "ModalityLUTSequence",
)  # fmt: skip
DICM_AT = 128


@dataclass(frozen=True)
class Grouping:
    """What tells to which series a file belongs; texts of the header, never to be shown.

    `localiser`, `has_image` and `frames` (several in one file) say what kind of image it is.
    """

    instance: str
    series: str
    patient: str
    modality: str
    localiser: bool
    has_image: bool
    frames: bool


@dataclass(frozen=True)
class Slice:
    """What is used of one file of a series.

    Attributes:
        path: the file.
        instance: its UID, to tell copies of one slice from two slices in one place.
        size: columns, rows.
        position: centre of the first pixel, LPS mm.
        axes: unit vectors along a row and along a column, LPS, `(2, 3)`.
        spacing_mm: from column to column, from row to row.
        bits: allocated, stored.
        signed: stored values have a sign.
        rescale: slope and intercept; None where the file states neither.
        modality: CT, MR, ...
        syntax: UID of the transfer syntax.
    """

    path: Path
    instance: str
    size: tuple[int, int]
    position: NDArray[np.float64]
    axes: NDArray[np.float64]
    spacing_mm: tuple[float, float]
    bits: tuple[int, int]
    signed: bool
    rescale: tuple[float, float] | None
    modality: str
    syntax: str

    @property
    def compressed(self) -> bool:
        """Whether its pixels need a decoder."""
        return self.syntax in COMPRESSED


def is_dicom(path: Path) -> bool:
    """Whether the file has the signature of DICOM.

    Raises:
        DataError: it cannot be read.
    """
    with opened_raw(path) as stream:
        return pull(stream, DICM_AT + 4, path)[DICM_AT:] == b"DICM"


def read_grouping(path: Path) -> Grouping:
    """The fields by which files are sorted into series.

    Raises:
        DataError: the header cannot be parsed.
    """
    fields, _ = _read(path, (*GROUPING, "Rows", "Columns", "NumberOfFrames"))
    return Grouping(
        _text(fields, "SOPInstanceUID"),
        _text(fields, "SeriesInstanceUID"),
        _text(fields, "PatientID"),
        _text(fields, "Modality"),
        "LOCALIZER" in _text(fields, "ImageType").upper(),
        "Rows" in fields and "Columns" in fields,
        _text(fields, "NumberOfFrames") not in ("", "0", "1"),
    )


def read_slice(path: Path) -> Slice:
    """The fields that say what the pixels are and where they lie.

    Raises:
        DataError: the header cannot be parsed, or is not that of one slice of intensities.
    """
    fields, syntax = _read(path, (*GROUPING, *NUMBERS))
    _check_kind(fields, path)
    rows, columns = (_whole(fields, name, path) for name in ("Rows", "Columns"))
    allocated, stored = _bits(fields, path)
    position = np.array(_numbers(fields, "ImagePositionPatient", 3, path))
    axes = np.array(_numbers(fields, "ImageOrientationPatient", 6, path)).reshape(2, 3)
    lengths = np.linalg.norm(axes, axis=1)
    if np.abs(lengths - 1).max() > 1e-3 or abs(float(axes[0] @ axes[1])) > 1e-3:
        raise _bad(path, "an orientation that is not made of two unit vectors at a right angle")
    down, across = _numbers(fields, "PixelSpacing", 2, path)
    if min(rows, columns) < 1 or min(down, across) <= 0:
        raise _bad(path, f"{columns} x {rows} pixels of {across:g} x {down:g} mm")
    return Slice(
        path,
        _text(fields, "SOPInstanceUID"),
        (columns, rows),
        position,
        axes / lengths[:, None],
        (across, down),
        (allocated, stored),
        bool(_whole(fields, "PixelRepresentation", path)),
        _rescale(fields, path),
        _text(fields, "Modality"),
        syntax,
    )


def read_pixels(one: Slice) -> tuple[NDArray[np.generic], bool]:
    """The pixels `(rows, columns)` of a slice.

    Returns:
        The values, and whether they are physical already (the decoder of compressed files applies
        slope and intercept itself) or as stored.

    Raises:
        DataError: fewer pixels than the header claims, or pixels that cannot be decoded.
    """
    if one.compressed:
        return _decompressed(one), True
    columns, rows = one.size
    expected = rows * columns * one.bits[0] // 8
    data = _parsed(one.path, lambda: dcmread(one.path, specific_tags=["PixelData"]))
    found = data.get("PixelData", b"") if isinstance(data, Dataset) else b""
    count = len(found) if isinstance(found, bytes) else 0
    if count not in (expected, expected + expected % 2):
        raise fault(
            "E-TRUNCATED" if count < expected else "E-DICOM-PIXELS", one.path,
            f"{count} bytes of pixels", f"the {expected} that its header claims",
            "fetch the slice again",
        )  # fmt: skip
    kind = np.dtype(f"{PLAIN[one.syntax]}{'i' if one.signed else 'u'}{one.bits[0] // 8}")
    pixels = np.frombuffer(found, kind, rows * columns).reshape(rows, columns)
    unused = one.bits[0] - one.bits[1]
    if not unused:
        return pixels, False
    native = pixels.astype(kind.newbyteorder("="))
    return (native << unused) >> unused, False  # drops overlays, spreads the sign


def _decompressed(one: Slice) -> NDArray[np.generic]:
    """Pixels by GDCM; its warnings are muted, as they quote the file."""
    _parsed(one.path, lambda: dcmread(one.path, specific_tags=["PixelData"]))
    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(str(one.path))
    shown = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        pixels = sitk.GetArrayFromImage(reader.Execute())
    except (RuntimeError, MemoryError):
        raise fault(
            "E-DAMAGED", one.path, "compressed pixels that cannot be decoded", "an intact file",
            "fetch the slice again",
        ) from None  # fmt: skip
    finally:
        sitk.ProcessObject.SetGlobalWarningDisplay(shown)
    if pixels.shape != (1, one.size[1], one.size[0]):
        raise fault(
            "E-DAMAGED", one.path, f"decoded pixels of shape {pixels.shape}",
            f"one slice of {one.size[0]} x {one.size[1]}", "fetch the slice again",
        )  # fmt: skip
    return pixels[0]


def _read(path: Path, names: tuple[str, ...]) -> tuple[dict[str, Any], str]:
    """The values of some fields that are present and not empty, and the transfer syntax."""
    if not is_dicom(path):
        raise _bad(path, "no DICOM signature")

    def parse() -> tuple[dict[str, Any], str]:
        syntax = str(read_file_meta_info(path).get("TransferSyntaxUID", ""))
        if syntax not in PLAIN and syntax not in COMPRESSED:
            return {}, syntax
        found = dcmread(path, stop_before_pixels=True, specific_tags=list(names))
        return {
            name: found.get(name) for name in names if found.get(name) not in (None, "")
        }, syntax

    fields, syntax = _parsed(path, parse)
    if syntax not in PLAIN and syntax not in COMPRESSED:
        raise fault(
            "E-DICOM-SYNTAX", path, "a transfer syntax that is not supported",
            "uncompressed, JPEG, JPEG-LS, JPEG 2000 or run-length coded slices",
            "convert the series to uncompressed DICOM or to NIfTI",
        )  # fmt: skip
    return fields, syntax


def _parsed(path: Path, parse: Callable[[], Any]) -> Any:
    """What a parse returns; the library raises whatever its code met, and quotes values."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return parse()
    except Exception:
        raise _bad(path, "a header that cannot be parsed") from None


def _check_kind(fields: dict[str, Any], path: Path) -> None:
    if _whole(fields, "NumberOfFrames", path, 1) != 1:
        raise fault(
            "E-DICOM-FRAMES", path, "several frames in one file", "one file per slice",
            "convert it to NIfTI, e.g. with dcm2niix",
        )  # fmt: skip
    kind = _text(fields, "PhotometricInterpretation")
    if _whole(fields, "SamplesPerPixel", path) != 1 or kind not in ("MONOCHROME1", "MONOCHROME2"):
        raise fault("E-DATATYPE", path, "colours", "one intensity per pixel", "take the series out")
    if kind == "MONOCHROME1":
        raise fault(
            "E-DICOM-MONOCHROME1", path, "inverted intensities (MONOCHROME1)", "MONOCHROME2",
            "invert the values and write the series anew, or take it out",
        )  # fmt: skip
    if "ModalityLUTSequence" in fields:
        raise fault(
            "E-DICOM-RESCALE", path, "a table in place of rescale slope and intercept",
            "a slope and an intercept", "convert the series with the software of its scanner",
        )  # fmt: skip


def _bits(fields: dict[str, Any], path: Path) -> tuple[int, int]:
    allocated, stored = (_whole(fields, n, path) for n in ("BitsAllocated", "BitsStored"))
    high = _whole(fields, "HighBit", path, stored - 1)
    if allocated not in (8, 16, 32) or not 1 <= stored <= allocated or high != stored - 1:
        raise fault(
            "E-DATATYPE", path, f"{stored} bits up to bit {high} of {allocated}",
            "the lower bits of 8, 16 or 32", "convert it to int16 or float32",
        )  # fmt: skip
    return allocated, stored


def _rescale(fields: dict[str, Any], path: Path) -> tuple[float, float] | None:
    if "RescaleSlope" not in fields and "RescaleIntercept" not in fields:
        return None
    (slope,) = _numbers(fields, "RescaleSlope", 1, path)
    (intercept,) = _numbers(fields, "RescaleIntercept", 1, path)
    if not (1e-12 <= abs(slope) <= 1e6 and abs(intercept) <= 1e9):
        raise fault(
            "E-SLOPE", path, f"intensities scaled by {slope:g} and shifted by {intercept:g}",
            "a factor between 1e-12 and 1e6", "correct RescaleSlope and RescaleIntercept",
        )  # fmt: skip
    return slope, intercept


def _numbers(fields: dict[str, Any], name: str, count: int, path: Path) -> list[float]:
    try:
        value = fields[name]
        values = [float(v) for v in ([value] if count == 1 else value)]
    except (KeyError, TypeError, ValueError):
        values = []
    if len(values) != count or not all(math.isfinite(v) and abs(v) < 1e9 for v in values):
        raise _bad(path, f"no {name} of {count} finite numbers")
    return values


def _whole(fields: dict[str, Any], name: str, path: Path, default: int | None = None) -> int:
    if name not in fields and default is not None:
        return default
    value = _numbers(fields, name, 1, path)[0]
    if not value.is_integer():
        raise _bad(path, f"a {name} that is no whole number")
    return int(value)


def _text(fields: dict[str, Any], name: str) -> str:
    value = fields.get(name, "")
    return "\\".join(map(str, value)) if isinstance(value, list) else str(value).strip()


def _bad(path: Path, found: str) -> DataError:
    return fault(
        "E-DICOM-HEADER", path, found, "the header of one slice of a CT or MR series",
        "fetch the file again, or take it out of the folder",
    )  # fmt: skip
