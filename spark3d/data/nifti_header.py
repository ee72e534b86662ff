"""NIfTI headers: what they say, and the contradictions for which a file is refused.

Where sform, qform and voxel sizes disagree, common readers each pick a silent winner, and not the
same one; here the user is asked.
"""

import math
from pathlib import Path
from typing import Literal

import numpy as np
from nibabel.nifti1 import Nifti1Header
from nibabel.nifti2 import Nifti2Header
from nibabel.spatialimages import HeaderDataError

from spark3d.data.checks import check_affine, corner_distance_mm, fault
from spark3d.data.grid import Affine, spacing_of
from spark3d.data.header import Header, checked_shape

Geometry = Literal["agree", "sform", "qform"]
UNIT_MM = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}
NOT_INTENSITIES = {32: "complex", 1792: "complex", 2048: "complex", 128: "RGB", 2304: "RGBA"}


def header_length(block: bytes, order: Literal["<", ">"]) -> int:
    return int(np.frombuffer(block, f"{order}i4", 1)[0])


def parse_header(block: bytes, path: Path, geometry: Geometry) -> Header:
    sizes = {header_length(block, "<"), header_length(block, ">")}
    kind, length = (Nifti2Header, 540) if 540 in sizes else (Nifti1Header, 348)
    magic = block[4:8] if length == 540 else block[344:348]
    if length not in sizes or magic[:3] not in (b"n+1", b"n+2"):
        raise fault(
            "E-NOT-NIFTI", path, "no NIfTI signature", "a single-file NIfTI (.nii, .nii.gz)",
            "convert the file to NIfTI",
        )  # fmt: skip
    order = "<" if header_length(block, "<") == length else ">"
    header = kind(block[:length], endianness=order, check=False)
    shape = _checked_shape(header, path)
    slope, intercept = _checked_scale(header, path)
    offset = float(header["vox_offset"])
    if not (math.isfinite(offset) and length + 4 <= offset <= 2**31):
        raise fault(
            "E-OFFSET", path, f"voxels said to start at byte {offset:g}", f"{length + 4} or more",
            "write the volume anew",
        )  # fmt: skip
    affine = _affine(header, shape, path, geometry)
    dtype = header.get_data_dtype().newbyteorder(order)
    return Header(path, shape, dtype, affine, "RAS", slope, intercept, int(offset))


def _checked_shape(header: Nifti1Header, path: Path) -> tuple[int, ...]:
    code = int(header["datatype"])
    if code in NOT_INTENSITIES:
        raise fault(
            "E-DATATYPE", path, f"{NOT_INTENSITIES[code]} voxels", "one intensity per voxel",
            "convert it to a plain image",
        )  # fmt: skip
    try:
        dtype = header.get_data_dtype()
    except (HeaderDataError, KeyError):
        dtype = np.dtype(np.void)
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        raise fault(
            "E-DATATYPE", path, f"the data type code {code}", "integers or floats of up to 64 bits",
            "convert it to int16 or float32",
        )  # fmt: skip
    ndim = int(header["dim"][0])
    shape = [int(n) for n in header["dim"][1 : ndim + 1]] if 1 <= ndim <= 7 else []
    return checked_shape(shape, path)


def _checked_scale(header: Nifti1Header, path: Path) -> tuple[float, float]:
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    if slope == 0 or math.isnan(slope):
        return 1.0, 0.0
    sane = math.isfinite(intercept) and 1e-12 <= abs(slope) <= 1e6 and abs(intercept) <= 1e9
    if not sane:
        raise fault(
            "E-SLOPE", path, f"intensities scaled by {slope:g} and shifted by {intercept:g}",
            "a factor between 1e-12 and 1e6", "write the volume anew with the right scl_slope",
        )  # fmt: skip
    return slope, intercept


def _affine(header: Nifti1Header, shape: tuple[int, ...], path: Path, geometry: Geometry) -> Affine:
    pixdim = np.array([float(size) for size in header["pixdim"][1:4]])
    if not (np.isfinite(pixdim).all() and (pixdim > 0).all()):
        raise fault(
            "E-PIXDIM", path, f"the voxel sizes {pixdim.tolist()}", "three positive numbers",
            "write the header anew",
        )  # fmt: skip
    has_s, has_q = int(header["sform_code"]) > 0, int(header["qform_code"]) > 0
    if geometry == "agree" and not (has_s or has_q):
        raise fault(
            "E-NO-GEOMETRY", path, "neither sform nor qform set", "a stated orientation",
            "pass --geometry qform to trust the voxel sizes and axis order as they stand",
        )  # fmt: skip
    form = "sform" if geometry == "sform" or (geometry == "agree" and has_s) else "qform"
    stored = _form(header, form, path)
    unit = int(header["xyzt_units"]) % 8
    if unit not in UNIT_MM:
        raise fault(
            "E-UNITS", path, f"the spatial unit code {unit}", "mm, m or um", "write the header anew"
        )
    affine = stored.copy()
    affine[:3] *= UNIT_MM[unit]
    check_affine(affine, path)
    if geometry == "agree" and has_s:
        _check_agreement(header, stored, shape, has_q, path)
    return affine


def _form(header: Nifti1Header, form: str, path: Path) -> Affine:
    if form == "sform":
        fields = ("srow_x", "srow_y", "srow_z")
    else:
        fields = ("quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z")
    if not all(np.isfinite(header[name]).all() for name in fields):
        raise fault(
            "E-AFFINE-NAN", path, f"a {form} with NaN or infinite entries", "finite numbers",
            "write the header anew from the original series",
        )  # fmt: skip
    if form == "sform":
        return np.asarray(header.get_sform(), np.float64)
    if header["pixdim"][0] == 0:  # the standard reads it as 1
        header["pixdim"][0] = 1
    try:
        return np.asarray(header.get_qform(), np.float64)
    except (HeaderDataError, ValueError):
        raise fault(
            "E-QFORM", path, "a quaternion or pixdim[0] that makes no rotation",
            "a unit quaternion", "pass --geometry sform if the sform is right",
        ) from None  # fmt: skip


def _check_agreement(
    header: Nifti1Header, sform: Affine, shape: tuple[int, ...], has_q: bool, path: Path
) -> None:
    """Hold the sform against the voxel sizes and, where set, the qform (to a tenth of a voxel)."""
    spacing = np.asarray(spacing_of(sform))
    pixdim = np.asarray(header["pixdim"][1:4], np.float64)
    if not np.allclose(pixdim, spacing, rtol=1e-2):
        raise fault(
            "E-GEOMETRY", path, f"voxel sizes {pixdim.round(4).tolist()} but an sform of "
            f"{spacing.round(4).tolist()}", "one spacing",
            "pass --geometry sform or --geometry qform to say which is right",
        )  # fmt: skip
    if not has_q:
        return
    distance = corner_distance_mm(shape[:3], sform, _form(header, "qform", path))
    if distance > 0.1 * spacing.min():
        raise fault(
            "E-GEOMETRY", path, f"qform and sform {distance:.3g} mm apart at a corner",
            "one geometry", "pass --geometry sform or --geometry qform to say which is right",
        )  # fmt: skip
