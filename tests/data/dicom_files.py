"""DICOM series for the tests, sound or with one thing made wrong."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from nifti_files import DEFAULT, ct_like
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian
from pydicom.valuerep import format_number_as_ds

SERIES = "1.2.826.0.1.3680043.8.498.11.7"
CT = "1.2.840.10008.5.1.4.1.1.2"
Edit = Callable[[Dataset, int], None]
SIZE = (14, 12, 8)
AFFINE = DEFAULT @ np.diag([-1, -1, 1, 1])
"""Of a usual axial series: rows to the patient's left, columns to the back, slices upwards."""


def write_series(
    folder: Path,
    array: np.ndarray | None = None,
    affine: np.ndarray = AFFINE,
    edit: Edit | None = None,
    series: str = SERIES,
    slope: float = 1.0,
    intercept: float = -1024.0,
) -> list[Path]:
    """Write the slices of `(columns, rows, slices)`; `affine` is to RAS, as elsewhere.

    `edit` changes slice k, its UIDs included, before it is written.
    """
    array = ct_like(SIZE) if array is None else array
    folder.mkdir(parents=True, exist_ok=True)
    lps = np.diag([-1, -1, 1, 1]) @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    paths = []
    for k in range(array.shape[2]):
        stored = np.rint((array[..., k].T - intercept) / slope).astype(np.int16)
        ds = one_slice(stored, series, k)
        ds.ImagePositionPatient = [format_number_as_ds(float(v)) for v in (lps @ [0, 0, k, 1])[:3]]
        axes = (lps[:3, :2] / spacing[:2]).T.ravel()
        ds.ImageOrientationPatient = [format_number_as_ds(float(v)) for v in axes]
        ds.PixelSpacing = [format_number_as_ds(float(spacing[axis])) for axis in (1, 0)]
        ds.SliceThickness = "9.5"
        ds.RescaleSlope, ds.RescaleIntercept = str(slope), str(intercept)
        if edit:
            edit(ds, k)
        # names that do not follow the order in space
        path = folder / f"im{(k * 5) % 97:03d}.dcm"
        ds.save_as(path, enforce_file_format=True)
        paths.append(path)
    return paths


def one_slice(stored: np.ndarray, series: str, k: int) -> Dataset:
    """A CT slice without a place in space."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = CT
    meta.MediaStorageSOPInstanceUID = f"{series}.{k + 1}"
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds = Dataset()
    ds.file_meta, ds.preamble = meta, bytes(128)
    ds.SOPClassUID, ds.SOPInstanceUID = CT, f"{series}.{k + 1}"
    ds.SeriesInstanceUID, ds.StudyInstanceUID = series, f"{series}.9"
    ds.Modality, ds.PatientID = "CT", "P1"
    ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    ds.InstanceNumber = k + 1
    ds.Rows, ds.Columns = stored.shape
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 1
    ds.PixelData = stored.astype("<i2").tobytes()
    return ds
