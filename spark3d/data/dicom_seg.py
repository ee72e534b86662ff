"""DICOM-SEG out: a label map as a segmentation object that refers to the slices of its series.

Such a file carries the patient's and the study's identity of its series, as the standard asks, so
that it can go back to where the series came from. None of it is shown or logged.
"""

import logging
import re
import warnings
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset, dcmread
from pydicom.sr.codedict import codes

from spark3d import __version__
from spark3d.data.checks import fault
from spark3d.data.dicom import ordered_files
from spark3d.data.files import write_atomic
from spark3d.data.grid import SourceGrid, restore
from spark3d.errors import EnvironmentProblem

try:
    import highdicom  # pyright: ignore[reportMissingImports]
except ImportError:
    highdicom = None

logging.getLogger("highdicom").disabled = True  # as pydicom's: it may quote values of fields

NEEDED = ("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID")
EMPTY_ALLOWED = (
    "PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID",
    "StudyDate", "StudyTime",
)  # fmt: skip
"""Fields that every segmentation has and that may be empty, as they often are after removal."""
SERIES_NUMBER = 300
SNOMED: Mapping[str, Any] = MappingProxyType(
    {
        "spleen": codes.SCT.Spleen,
        "kidney": codes.SCT.Kidney,
        "gallbladder": codes.SCT.Gallbladder,
        "esophagus": codes.SCT.Esophagus,
        "oesophagus": codes.SCT.Esophagus,
        "liver": codes.SCT.Liver,
        "stomach": codes.SCT.Stomach,
        "aorta": codes.SCT.Aorta,
        "inferior vena cava": codes.SCT.InferiorVenaCava,
        "pancreas": codes.SCT.Pancreas,
        "adrenal gland": codes.SCT.AdrenalGland,
        "brainstem": codes.SCT.BrainStem,
        "spinal cord": codes.SCT.SpinalCord,
        "parotid": codes.SCT.ParotidGland,
        "parotid gland": codes.SCT.ParotidGland,
        "mandible": codes.SCT.Mandible,
        "left atrium": codes.SCT.LeftAtrium,
        "prostate": codes.SCT.Prostate,
    }
)
"""Codes of organs by name; other labels get a code of our own, and their name."""


def check_dicom_seg() -> None:
    """Raises EnvironmentProblem where the package that writes segmentations is not installed."""
    if highdicom is None:
        raise EnvironmentProblem(
            "DICOM-SEG needs the package highdicom: pip install 'spark3d[dicom-seg]', or leave out "
            "--format dicom-seg"
        )


def write_dicom_seg(
    path: Path,
    labels: NDArray[np.integer],
    source: SourceGrid,
    slices: Sequence[Path],
    names: Mapping[int, str],
    model: str,
) -> None:
    """Write a label map as binary segments on the slices of its series, atomically.

    Segment `n` is the n-th of `names`. Slices on which a segment has no voxel are left out, as is
    usual; a label map without any foreground is written on all of them.

    Args:
        path: target `.dcm`.
        labels: `(*size)` in RAS+ order on the source grid (see `SourceGrid.ras`).
        source: the grid of the series.
        slices: its files, in any order.
        names: name of every foreground label.
        model: what tells which network it was, such as the hash of its weights.

    Raises:
        EnvironmentProblem: highdicom is not installed.
        DataError: slices whose headers a segmentation cannot refer to.
    """
    check_dicom_seg()
    ordered = ordered_files(slices)
    folder = ordered[0].parent
    numbers = np.zeros(max(names) + 1, np.uint8 if len(names) < 256 else np.uint16)
    for number, label in enumerate(sorted(names), start=1):
        numbers[label] = number
    frames = numbers[restore(labels, source).astype(np.uint16).transpose(2, 1, 0)]
    headers = [_header(file, folder) for file in ordered]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = _segmentation(headers, frames, names, model)
            buffer = BytesIO()
            made.save_as(buffer, enforce_file_format=True)
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # which may quote a header
        raise fault(
            "E-DICOM-SEG", folder, f"headers that no segmentation can refer to "
            f"({type(error).__name__})", "those of a CT or MR series as a scanner writes them",
            "predict to NIfTI instead: leave out --format dicom-seg",
        ) from None  # fmt: skip
    write_atomic(path, buffer.getvalue())


def _header(file: Path, folder: Path) -> Dataset:
    """All fields of a slice but its pixels."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = dcmread(file, stop_before_pixels=True)
        lacking = [name for name in (*NEEDED, "FrameOfReferenceUID") if not found.get(name)]
        for name in EMPTY_ALLOWED:
            if name not in found:
                setattr(found, name, None)
    if lacking:
        raise fault(
            "E-DICOM-SEG", folder, f"slices without {', '.join(lacking)}",
            "it in every slice, as a segmentation refers to it",
            "fetch the series again from its source, or leave out --format dicom-seg",
        )  # fmt: skip
    return found


def _segmentation(
    headers: Sequence[Dataset], frames: NDArray[np.integer], names: Mapping[int, str], model: str
) -> Dataset:
    assert highdicom is not None
    by = highdicom.AlgorithmIdentificationSequence(
        name="spark3d", version=__version__, family=codes.DCM.ArtificialIntelligence
    )
    segments = [
        highdicom.seg.SegmentDescription(
            segment_number=number,
            segment_label=names[label][:64],
            segmented_property_category=codes.SCT.AnatomicalStructure,
            segmented_property_type=code_of(names[label], label),
            algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm_identification=by,
        )
        for number, label in enumerate(sorted(names), start=1)
    ]
    return highdicom.seg.Segmentation(
        source_images=headers,
        pixel_array=frames,
        segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=segments,
        series_instance_uid=highdicom.UID(),
        series_number=SERIES_NUMBER,
        sop_instance_uid=highdicom.UID(),
        instance_number=1,
        manufacturer="spark3d",
        manufacturer_model_name="spark3d",
        software_versions=__version__,
        device_serial_number=model[:64] or "unknown",
        omit_empty_frames=bool(frames.any()),
        series_description="Segmentation by spark3d",
    )


def code_of(name: str, label: int) -> Any:
    """The SNOMED code of an organ, its side aside; a code of our own for other names."""
    words = [w for w in re.split("[^a-z]+", name.lower()) if w and w not in ("left", "right")]
    known = SNOMED.get(" ".join(words))
    if known is not None:
        return known
    assert highdicom is not None
    return highdicom.sr.CodedConcept(str(label), "99SPARK3D", name[:64])
