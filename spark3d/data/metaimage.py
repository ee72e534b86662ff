"""MetaImage headers, attached (`.mha`) or detached (`.mhd`): sizes, type, coding, place in space.

Only the fields named here are looked at. The format: https://itk.org/Wiki/ITK/MetaIO.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np

from spark3d.data.checks import check_affine, fault
from spark3d.data.grid import Affine
from spark3d.data.header import Header, checked_shape
from spark3d.data.text_header import (
    Layout,
    bad_header,
    beside,
    numbers,
    text_lines,
    whole_numbers,
)

TYPES = {
    "MET_CHAR": "i1",
    "MET_UCHAR": "u1",
    "MET_SHORT": "i2",
    "MET_USHORT": "u2",
    "MET_INT": "i4",
    "MET_UINT": "u4",
    "MET_LONG": "i4",
    "MET_ULONG": "u4",
    "MET_LONG_LONG": "i8",
    "MET_ULONG_LONG": "u8",
    "MET_FLOAT": "f4",
    "MET_DOUBLE": "f8",
}
ALIASES = {
    "Origin": "Offset",
    "Position": "Offset",
    "Rotation": "TransformMatrix",
    "Orientation": "TransformMatrix",
    "ElementByteOrderMSB": "BinaryDataByteOrderMSB",
}
KNOWN = (
    "NDims", "DimSize", "ElementType", "ElementSpacing", "TransformMatrix", "Offset",
    "BinaryData", "BinaryDataByteOrderMSB", "CompressedData", "ElementNumberOfChannels",
    "HeaderSize", "DistanceUnits", "ElementDataFile",
)  # fmt: skip


def parse_metaimage(path: Path, stream: BinaryIO) -> Layout:
    """What a header says.

    Raises:
        DataError: no MetaImage file, a field that is absent, contradictory or not supported.
    """
    lines = text_lines(stream, path, last=lambda line: line.startswith("ElementDataFile"))
    fields = _fields(lines, path)
    if "ElementDataFile" not in fields or "NDims" not in fields:
        raise fault(
            "E-NOT-METAIMAGE", path, "no MetaImage header" if lines[0] else "an empty file",
            "a MetaImage file", "copy it again from the original",
        )  # fmt: skip
    sizes = whole_numbers(_needed(fields, "DimSize", path), path, "DimSize")
    if fields["NDims"] != str(len(sizes)):
        raise bad_header(path, "an NDims that is not the number of sizes")
    channels = whole_numbers(fields.get("ElementNumberOfChannels", "1"), path, "channel count")
    if len(channels) != 1 or (len(sizes) > 3 and set(sizes[3:]) != {1}):
        raise fault(
            "E-4D", path, f"volumes over time {tuple(sizes)}", "one volume",
            "split the file into volumes",
        )  # fmt: skip
    shape = checked_shape([*checked_shape(sizes, path), channels[0]], path)
    header = Header(path, shape, _dtype(fields, path), _place(fields, len(sizes), path), "LPS")
    local = fields["ElementDataFile"].upper() == "LOCAL"
    if not local and (fields["ElementDataFile"].startswith("LIST") or "%" in lines[-1]):
        raise bad_header(path, "its voxels spread over several files")
    data = path if local else beside(path, fields["ElementDataFile"])
    before = stream.tell() if local else _skip(fields, path)
    coding = "zlib" if _true(fields, "CompressedData") else "raw"
    return Layout(header, data, before, coding, len(shape) == 4)


def _fields(lines: list[str], path: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    for line in lines:
        key, equals, value = line.partition("=")
        name = ALIASES.get(key.strip(), key.strip())
        if not equals or name not in KNOWN:
            continue
        if name in found and found[name] != value.strip():
            raise bad_header(path, f"the field '{name}' twice")
        found[name] = value.strip()
    return found


def _needed(fields: Mapping[str, str], name: str, path: Path) -> str:
    if name not in fields:
        raise bad_header(path, f"no field '{name}'")
    return fields[name]


def _true(fields: Mapping[str, str], name: str) -> bool:
    return fields.get(name, "").lower() in ("true", "1")


def _skip(fields: Mapping[str, str], path: Path) -> int:
    skip = whole_numbers(fields.get("HeaderSize", "0"), path, "HeaderSize")
    if len(skip) != 1 or skip[0] < -1:
        raise bad_header(path, "a HeaderSize that is no number of bytes")
    return skip[0]


def _dtype(fields: Mapping[str, str], path: Path) -> np.dtype:
    name = _needed(fields, "ElementType", path)
    if name not in TYPES:
        raise fault(
            "E-DATATYPE", path, "a type of voxels that is not supported",
            "integers or floats of up to 64 bits", "convert it to int16 or float32",
        )  # fmt: skip
    if fields.get("BinaryData", "True").lower() not in ("true", "1"):
        raise bad_header(path, "its voxels written as text")
    order = ">" if _true(fields, "BinaryDataByteOrderMSB") else "<"
    return np.dtype(TYPES[name]).newbyteorder(order)


def _place(fields: Mapping[str, str], ndim: int, path: Path) -> Affine:
    if not {"TransformMatrix", "Offset", "ElementSpacing"} <= fields.keys():
        raise fault(
            "E-NO-GEOMETRY", path, "no TransformMatrix, Offset or ElementSpacing",
            "a stated orientation", "write the volume anew with all three",
        )  # fmt: skip
    if fields.get("DistanceUnits", "mm") not in ("mm", "?"):
        raise fault("E-UNITS", path, "distances in units other than mm", "mm", "convert them")
    spacing = numbers(fields["ElementSpacing"], path, "ElementSpacing")
    offset = numbers(fields["Offset"], path, "Offset")
    turn = numbers(fields["TransformMatrix"], path, "TransformMatrix")
    if len(spacing) != ndim or len(offset) != ndim or len(turn) != ndim**2:
        raise bad_header(path, "a place in space of another number of axes")
    if min(spacing) <= 0:
        raise fault(
            "E-PIXDIM", path, f"the voxel sizes {spacing}", "positive numbers",
            "write the header anew",
        )  # fmt: skip
    rotation = np.array(turn).reshape(ndim, ndim).T[:3, :3]
    if np.abs(np.linalg.norm(rotation, axis=0) - 1).max() > 1e-3:
        raise fault(
            "E-GEOMETRY", path, "a TransformMatrix whose axes are not of length 1",
            "unit vectors beside the ElementSpacing", "write the header anew",
        )  # fmt: skip
    affine = np.eye(4)
    affine[:3, :3] = rotation * spacing[:3]
    affine[:3, 3] = offset[:3]
    check_affine(affine, path)
    return affine
