"""NRRD headers, attached (`.nrrd`) or detached (`.nhdr`): sizes, type, coding and place in space.

Only the fields named here are looked at; comments and key/value pairs may name a patient. The
format: http://teem.sourceforge.net/nrrd/format.html.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np

from spark3d.data.checks import check_affine, fault
from spark3d.data.grid import Affine
from spark3d.data.header import Header, World, checked_shape
from spark3d.data.text_header import (
    Coding,
    Layout,
    bad_header,
    beside,
    numbers,
    text_lines,
    whole_numbers,
)

TYPES = {
    "i1": ("signed char", "int8", "int8_t"),
    "u1": ("uchar", "unsigned char", "uint8", "uint8_t"),
    "i2": ("short", "short int", "signed short", "signed short int", "int16", "int16_t"),
    "u2": ("ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t"),
    "i4": ("int", "signed int", "int32", "int32_t"),
    "u4": ("uint", "unsigned int", "uint32", "uint32_t"),
    "i8": ("longlong", "long long", "long long int", "signed long long", "int64", "int64_t"),
    "u8": ("ulonglong", "unsigned long long", "unsigned long long int", "uint64", "uint64_t"),
    "f4": ("float",),
    "f8": ("double",),
}
WORLDS: Mapping[str, World] = {
    "right-anterior-superior": "RAS",
    "ras": "RAS",
    "left-anterior-superior": "LAS",
    "las": "LAS",
    "left-posterior-superior": "LPS",
    "lps": "LPS",
}
CODINGS: Mapping[str, Coding] = {"raw": "raw", "gzip": "gzip", "gz": "gzip"}
COLOURS = ("rgb", "hsv", "xyz", "complex", "quaternion", "2d-", "3d-")


def parse_nrrd(path: Path, stream: BinaryIO) -> Layout:
    """What a header says.

    Raises:
        DataError: no NRRD file, a field that is absent, contradictory or not supported.
    """
    lines = text_lines(stream, path, last=lambda line: not line)
    if not lines[0].startswith("NRRD000"):
        raise fault(
            "E-NOT-NRRD", path, "no NRRD signature" if lines[0] else "an empty file",
            "a NRRD file", "copy it again from the original",
        )  # fmt: skip
    fields = _fields(lines[1:], path)
    sizes = whole_numbers(_needed(fields, "sizes", path), path, "sizes")
    spatial = _spatial_axes(fields, sizes, path)
    affine, world = _place(fields, spatial, path)
    others = [axis for axis in range(len(sizes)) if axis not in spatial]
    if len(others) > 1 or (others and others[0] not in (0, len(sizes) - 1)):
        raise fault(
            "E-5D", path, f"{len(sizes)} axes {tuple(sizes)}", "three, or four with channels",
            "split the file into volumes",
        )  # fmt: skip
    shape = checked_shape([sizes[axis] for axis in (*spatial, *others)], path)
    header = Header(path, shape, _dtype(fields, path), affine, world)
    coding = CODINGS.get(_needed(fields, "encoding", path).lower())
    if coding is None or any(fields.get(key, "0") != "0" for key in ("line skip", "byte skip")):
        raise fault(
            "E-ENCODING", path, "an encoding other than raw or gzip, or bytes to be skipped",
            "raw or gzip without skips", "write the volume anew with gzip encoding",
        )  # fmt: skip
    detached = fields.get("data file")
    data = path if detached is None else beside(path, detached)
    first = bool(others) and others[0] == 0 and len(shape) == 4
    return Layout(header, data, stream.tell() if detached is None else 0, coding, first)


def _fields(lines: list[str], path: Path) -> dict[str, str]:
    """`key: value`, without comments and `key:=value`; "spacedirections" is "space directions"."""
    found: dict[str, str] = {}
    for line in lines:
        key, colon, value = line.partition(":")
        if not colon or line.startswith("#") or value.startswith("="):
            continue
        name = ALIASES.get(key.strip().lower(), key.strip().lower())
        if name in found and name in KNOWN:
            raise bad_header(path, f"the field '{name}' twice")
        found[name] = value.strip()
    return found


ALIASES = {"datafile": "data file", "lineskip": "line skip", "byteskip": "byte skip"}
KNOWN = (
    "sizes", "type", "dimension", "encoding", "endian", "space", "space directions",
    "space origin", "space units", "kinds", "data file", "line skip", "byte skip",
)  # fmt: skip


def _needed(fields: Mapping[str, str], name: str, path: Path) -> str:
    if name not in fields:
        raise bad_header(path, f"no field '{name}'")
    return fields[name]


def _dtype(fields: Mapping[str, str], path: Path) -> np.dtype:
    name = _needed(fields, "type", path).lower()
    code = next((code for code, names in TYPES.items() if name in names), None)
    endian = fields.get("endian", "").lower()
    if code is None:
        raise fault(
            "E-DATATYPE", path, "a type of voxels that is not supported",
            "integers or floats of up to 64 bits", "convert it to int16 or float32",
        )  # fmt: skip
    if code[1] != "1" and endian not in ("little", "big"):
        raise bad_header(path, "no byte order")
    return np.dtype(code).newbyteorder(">" if endian == "big" else "<")


def _spatial_axes(fields: Mapping[str, str], sizes: list[int], path: Path) -> list[int]:
    """Axes with a direction in space; the others hold channels."""
    if fields.get("dimension") != str(len(sizes)) or not 1 <= len(sizes) <= 7:
        raise bad_header(path, "a dimension that is not the number of sizes")
    if any(kind.lower().startswith(COLOURS) for kind in fields.get("kinds", "").split()):
        raise fault(
            "E-DATATYPE", path, "colours, complex numbers or tensors", "one intensity per voxel",
            "convert it to a plain image",
        )  # fmt: skip
    if len(sizes) < 3:
        checked_shape(sizes, path)
    vectors = _vectors(fields, path)
    spatial = [axis for axis, vector in enumerate(vectors) if vector != "none"]
    if len(vectors) != len(sizes) or len(spatial) != 3:
        raise bad_header(path, "space directions that do not fit its sizes")
    return spatial


def _vectors(fields: Mapping[str, str], path: Path) -> list[str]:
    if "space directions" not in fields or fields.get("space", "").lower() not in WORLDS:
        raise fault(
            "E-NO-GEOMETRY", path, "no space directions in a space of right or left, anterior or "
            "posterior, superior", "a stated orientation",
            "write it with 'space: left-posterior-superior' and directions",
        )  # fmt: skip
    return fields["space directions"].replace(", ", ",").replace("( ", "(").split()


def _place(fields: Mapping[str, str], spatial: list[int], path: Path) -> tuple[Affine, World]:
    units = {unit.strip('"').lower() for unit in fields.get("space units", "mm").split()}
    if units != {"mm"}:
        raise fault("E-UNITS", path, "space units other than mm", "mm", "write the header anew")
    vectors = _vectors(fields, path)
    affine = np.eye(4)
    columns = [numbers(vectors[axis], path, "direction") for axis in spatial]
    columns.append(numbers(_needed(fields, "space origin", path), path, "space origin"))
    if any(len(column) != 3 for column in columns):
        raise bad_header(path, "directions or an origin that are not of three numbers")
    affine[:3] = np.array(columns).T
    check_affine(affine, path)
    return affine, WORLDS[fields["space"].lower()]
