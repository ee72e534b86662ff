"""Label maps as DICOM-SEG: on the slices of the series, read back as they were written."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from dicom_files import SERIES, write_series
from known_scans import ball, odd_affine, write_nifti
from pydicom import dcmread

from spark3d.commands.evaluate import evaluate_command
from spark3d.commands.predict import predict_command
from spark3d.data import dicom_seg
from spark3d.errors import ConfigError, DataError, EnvironmentProblem

MODEL = Path("model.safetensors")
PATIENT = "Doe^Jane"

needs_highdicom = pytest.mark.skipif(
    dicom_seg.highdicom is None, reason="needs the extra dicom-seg (highdicom)"
)


def place(ds, k: int) -> None:
    ds.FrameOfReferenceUID, ds.PatientName = f"{SERIES}.77", PATIENT


@pytest.fixture
def series(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A series of a ball in a body, its files in no order, axes to the left and the back."""
    monkeypatch.setenv("SPARK3D_ID_KEY", "secret")
    image, _ = ball()
    affine = np.diag([-1.5, -1.0, 2.0, 1.0])
    affine[:3, 3] = (20, 30, -40)
    write_series(tmp_path / "scan", np.rint(image), affine, place, intercept=0.0)
    return tmp_path / "scan"


@needs_highdicom
def test_the_same_labels_lie_on_the_same_slices(series, segmenter, tmp_path, caplog, capsys):
    from highdicom.seg import segread

    segmenter()
    nifti = predict_command(MODEL, series, tmp_path / "nifti")
    out = predict_command(MODEL, series, tmp_path / "seg", format="dicom-seg")
    (file,) = out.glob("*.dcm")
    assert file.name.startswith("case-")
    expected = nib.load(nifti / f"{file.stem}.nii.gz")
    labels = np.asarray(expected.dataobj)
    assert set(np.unique(labels)) == {0, 1, 2}

    seg = segread(file)
    assert [seg.get_segment_description(n).segment_label for n in (1, 2)] == ["ball", "body"]
    to_voxel = np.linalg.inv(np.diag([-1, -1, 1, 1]) @ expected.affine)
    shown = 0
    for path in series.iterdir():
        header = dcmread(path, stop_before_pixels=True)
        k = round(float((to_voxel @ [*header.ImagePositionPatient, 1])[2]))
        found = seg.get_pixels_by_source_instance(
            [header.SOPInstanceUID], combine_segments=True, ignore_spatial_locations=True,
            assert_missing_frames_are_empty=True,
        )  # fmt: skip
        np.testing.assert_array_equal(found[0].T, labels[:, :, k])
        shown += bool(found.any())
    assert shown > 5
    assert str(seg.PatientName) == PATIENT  # it belongs to the patient's study
    said = caplog.text + "".join(capsys.readouterr()) + (out / "predict.json").read_text()
    assert "Doe" not in said
    assert SERIES not in said


@needs_highdicom
def test_a_finished_one_is_kept_and_cannot_be_scored(series, segmenter, tmp_path):
    segmenter()
    out = predict_command(MODEL, series, tmp_path / "seg", format="dicom-seg")
    (file,) = out.glob("*.dcm")
    written = file.read_bytes()
    network = segmenter()
    predict_command(MODEL, series, out, format="dicom-seg")
    assert network.windows == 0
    assert file.read_bytes() == written
    assert json.loads((out / "predict.json").read_text())["settings"]["format"] == "dicom-seg"
    with pytest.raises(ConfigError, match="other settings"):
        predict_command(MODEL, series, out)
    with pytest.raises(DataError, match="predict without --format dicom-seg to score"):
        evaluate_command(out, out, tmp_path / "scores")


@needs_highdicom
@pytest.mark.parametrize("lacking", ["FrameOfReferenceUID", "StudyInstanceUID"])
def test_a_series_that_cannot_be_referred_to_is_told(segmenter, tmp_path, monkeypatch, lacking):
    def edit(ds, k: int) -> None:
        place(ds, k)
        delattr(ds, lacking)

    monkeypatch.setenv("SPARK3D_ID_KEY", "secret")
    write_series(tmp_path / "scan", np.rint(ball()[0]), edit=edit, intercept=0.0)
    segmenter()
    with pytest.raises(DataError, match=f"E-DICOM-SEG: .*slices without {lacking}") as caught:
        predict_command(MODEL, tmp_path / "scan", tmp_path / "out", format="dicom-seg")
    assert "Doe" not in str(caught.value)
    assert [f.name for f in (tmp_path / "out").iterdir()] == ["predict.json"]


@needs_highdicom
def test_a_map_without_foreground_is_written_whole(series, tmp_path):
    from highdicom.seg import segread

    from spark3d.data.io import read_grid

    files = tuple(series.iterdir())
    grid = read_grid(files)
    empty = np.zeros(grid.ras()[0], np.uint8)
    dicom_seg.write_dicom_seg(tmp_path / "e.dcm", empty, grid, files, {1: "liver"}, "0" * 64)
    seg = segread(tmp_path / "e.dcm")
    assert seg.NumberOfFrames == len(files)
    assert not seg.pixel_array.any()


@needs_highdicom
@pytest.mark.parametrize(
    ("name", "meaning", "scheme"),
    [
        ("spleen", "Spleen", "SCT"),
        ("right_kidney", "Kidney", "SCT"),
        ("Left adrenal gland", "Adrenal gland", "SCT"),
        ("inferior_vena_cava", "Inferior vena cava", "SCT"),
        ("tumour", "tumour", "99SPARK3D"),
    ],
)
def test_organs_have_their_codes(name, meaning, scheme):
    code = dicom_seg.code_of(name, 3)
    assert (code.meaning, code.scheme_designator) == (meaning, scheme)


def test_without_its_package_nothing_is_begun(segmenter, tmp_path, monkeypatch, scans):
    monkeypatch.setattr(dicom_seg, "highdicom", None)
    segmenter()
    with pytest.raises(EnvironmentProblem, match=r"pip install 'spark3d\[dicom-seg\]'"):
        predict_command(MODEL, scans, tmp_path / "out", format="dicom-seg")
    assert not (tmp_path / "out").exists()


@needs_highdicom
def test_volumes_that_are_no_series_are_refused_before_any_work(segmenter, tmp_path):
    write_nifti(tmp_path / "scans" / "a.nii.gz", ball()[0], odd_affine())
    segmenter()
    with pytest.raises(ConfigError, match=r"1 of 1 volumes are not \(a\): leave it out"):
        predict_command(MODEL, tmp_path / "scans", tmp_path / "out", format="dicom-seg")
    assert not (tmp_path / "out").exists()
