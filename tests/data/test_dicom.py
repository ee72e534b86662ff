"""DICOM series: what is accepted as it should be, and each fault with verdict and exit code."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from dicom_files import AFFINE, SERIES, SIZE, write_series
from nifti_files import ct_like
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
)

from spark3d.cli import main
from spark3d.data.io import read_grid, read_volume
from spark3d.data.sources import find
from spark3d.errors import DataError


def field(name, value, only=None):
    """Sets one field, of all slices or of some."""

    def edit(ds, k):
        if only is None or k in only:
            setattr(ds, name, value)

    return edit


def without(name, only=range(99)):
    """Leaves one field out."""

    def edit(ds, k):
        if k in only:
            delattr(ds, name)

    return edit


def moved(shift):
    """Moves slice k by `shift(k)` (LPS mm)."""

    def edit(ds, k):
        start = np.array([float(v) for v in ds.ImagePositionPatient])
        ds.ImagePositionPatient = [f"{v:.6g}" for v in start + shift(k)]

    return edit


def second_volume(ds, k):
    """Slices 4 to 7 lie where 0 to 3 do."""
    moved(lambda k: [0, 0, -12.0 if k > 3 else 0])(ds, k)


def scout(ds, k):
    if k == 2:
        ds.ImageOrientationPatient = [1, 0, 0, 0, 0, -1]


def frames(ds, k):
    ds.NumberOfFrames = 2
    ds.PixelData = ds.PixelData * 2


def table(ds, k):
    ds.ModalityLUTSequence = [Dataset()]


def colours(ds, k):
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 3, "RGB"


EDITS = {
    "uneven steps": (moved(lambda k: [0, 0, 0.4 * (k > 4)]), "E-DICOM-SPACING"),
    "growing steps": (moved(lambda k: [0, 0, 0.1 * k * k]), "E-DICOM-SPACING"),
    "one slice aside": (moved(lambda k: [5.0 * (k == 3), 0, 0]), "E-DICOM-SHIFT"),
    "gantry tilt": (moved(lambda k: [0, 0.6 * k, 0]), "E-DICOM-TILT"),
    "two volumes": (second_volume, "E-DICOM-TWO-VOLUMES"),
    "one slice twice": (moved(lambda k: [0, 0, 3.0 * (k == 3)]), "E-DICOM-DUPLICATE"),
    "localiser inside": (scout, "E-DICOM-MIXED"),
    "two pixel spacings": (field("PixelSpacing", [1.5, 1.9], [1]), "E-DICOM-MIXED"),
    "two modalities": (field("Modality", "MR", [1]), "E-DICOM-MIXED"),
    "inverted": (field("PhotometricInterpretation", "MONOCHROME1"), "E-DICOM-MONOCHROME1"),
    "colours": (colours, "E-DATATYPE"),
    "frames": (frames, "E-DICOM-FRAMES"),
    "12 of 16 bits, upper": (field("BitsStored", 12), "E-DATATYPE"),
    "1 bit": (field("BitsAllocated", 1), "E-DATATYPE"),
    "slope without intercept": (without("RescaleIntercept"), "E-DICOM-HEADER"),
    "absurd slope": (field("RescaleSlope", "1e8"), "E-SLOPE"),
    "table of intensities": (table, "E-DICOM-RESCALE"),
    "no position": (without("ImagePositionPatient"), "E-DICOM-HEADER"),
    "no orientation": (without("ImageOrientationPatient"), "E-DICOM-HEADER"),
    "no pixel spacing": (without("PixelSpacing"), "E-DICOM-HEADER"),
    "pixel spacing 0": (field("PixelSpacing", [0, 1]), "E-DICOM-HEADER"),
    "skewed orientation": (
        field("ImageOrientationPatient", [1, 0, 0, 0.5, 0.866, 0]),
        "E-DICOM-HEADER",
    ),
    "long orientation": (field("ImageOrientationPatient", [2, 0, 0, 0, 1, 0]), "E-DICOM-HEADER"),
    "more rows than pixels": (field("Rows", 13), "E-TRUNCATED"),
    "fewer rows than pixels": (field("Rows", 11), "E-DICOM-PIXELS"),
    "claims 65535^2": (lambda d, k: colossal(d), "E-TRUNCATED"),
}


def colossal(ds):
    ds.Rows = ds.Columns = 65535


def no_rescale(ds, k):
    del ds.RescaleSlope
    del ds.RescaleIntercept


def drop(*indices):
    return lambda paths: [paths[k].unlink() for k in indices]


def cut(paths):
    paths[3].write_bytes(paths[3].read_bytes()[:-40])


def cut_header(paths):
    paths[3].write_bytes(paths[3].read_bytes()[:300])


def lose(content=None, name="im.dcm", link="gone"):
    """Leaves of the first slice, an end of the volume, these bytes or a link to nothing."""

    def spoil(paths):
        paths[0].unlink()
        place = paths[0].with_name(name)
        place.symlink_to(link) if content is None else place.write_bytes(content)

    return spoil


def copy(paths):
    shutil.copy(paths[3], paths[3].with_name("copy.dcm"))


def copy_all(paths):
    shutil.copytree(paths[0].parent, paths[0].parent / "again")


def deflated(paths):
    for path in paths:
        ds = dcmread(path)
        ds.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
        ds.save_as(path)


FILES = {
    "a slice missing": (None, drop(3), "E-DICOM-MISSING"),
    "three slices missing": (None, drop(1, 4, 5), "E-DICOM-MISSING"),
    "a slice cut": (None, cut, "E-TRUNCATED"),
    "a header cut": (None, cut_header, "E-DICOM-"),
    "an end slice that leads nowhere": (None, lose(), "E-UNREADABLE"),
    "an end slice that leads to itself": (None, lose(name="im", link="im"), "E-UNREADABLE"),
    "an empty end slice": (None, lose(b""), "E-DICOM-HEADER"),
    "an empty end slice without a suffix": (None, lose(b"", "IM_0001"), "E-DICOM-HEADER"),
    "a short end slice": (None, lose(bytes(100)), "E-DICOM-HEADER"),
    "an end slice without its signature": (None, lose(bytes(900), "IM.DCM"), "E-DICOM-HEADER"),
    "a copy of a slice": (None, copy, "E-DICOM-DUPLICATE"),
    "the series twice": (None, copy_all, "E-DICOM-DUPLICATE"),
    "CT without rescale": (no_rescale, None, "E-DICOM-RESCALE"),
    "rescale in some slices": (
        lambda d, k: no_rescale(d, k) if k > 4 else None,
        None,
        "E-DICOM-RESCALE",
    ),
    "deflated": (None, deflated, "E-DICOM-SYNTAX"),
}
FAULTS = {name: (edit, None, code) for name, (edit, code) in EDITS.items()} | FILES


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_refused_by_name_with_exit_code_3(tmp_path, name, capfd):
    edit, spoil, code = FAULTS[name]
    paths = write_series(tmp_path / "in" / "DOE JANE", edit=edit)
    if spoil:
        spoil(paths)
    with pytest.raises(SystemExit) as left:
        main(
            ["prepare", "--data", str(tmp_path / "in"), "--out", str(tmp_path / "out"),
             "--workers", "0", "--spacing", "2"]
        )  # fmt: skip
    out, said = capfd.readouterr()
    assert left.value.code == 3, said
    assert said.startswith("error: E-TOO-MANY-BAD: ")
    assert said.count("\n") == 1
    reason = said.split("; E-", 1)[1]
    assert f"E-{reason}".startswith(code), said
    assert reason.split(": ", 1)[1].startswith("case-")
    assert ": found " in reason
    assert reason.count("; ") >= 2
    for secret in ("DOE", "JANE", SERIES):
        assert secret not in out + said


def test_a_sound_series_is_one_case_by_its_positions(tmp_path):
    paths = write_series(tmp_path / "series")
    volume = read_volume(paths)
    np.testing.assert_array_equal(volume.array[0][::-1, ::-1], ct_like(SIZE))
    np.testing.assert_allclose(volume.source.affine, AFFINE)
    assert volume.spacing_mm == pytest.approx((2, 1.5, 3)), "SliceThickness says 9.5"
    assert volume.array.dtype == np.int16
    assert read_grid(paths[::-1]).size == SIZE


def coded(syntax):
    """Writes slices in another uncompressed coding."""

    def edit(ds, k):
        ds.file_meta.TransferSyntaxUID = syntax
        if syntax == ExplicitVRBigEndian:
            ds.PixelData = np.frombuffer(ds.PixelData, "<i2").astype(">i2").tobytes()

    return edit


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRBigEndian])
def test_codings_read_alike(tmp_path, syntax):
    volume = read_volume(write_series(tmp_path / "a", edit=coded(syntax)))
    np.testing.assert_array_equal(volume.array[0][::-1, ::-1], ct_like(SIZE))


@pytest.mark.parametrize("kind", ["JPEG", "JPEG2000"])
def test_compressed_slices_read_alike(tmp_path, kind, capfd):
    paths = write_series(tmp_path / "a")
    expected = read_volume(paths)
    for path in paths:
        compress(path, kind)
    volume = read_volume(paths)
    np.testing.assert_array_equal(volume.array, expected.array)
    assert volume.array.dtype == expected.array.dtype
    np.testing.assert_allclose(volume.affine, expected.affine, atol=1e-6)
    assert capfd.readouterr() == ("", "")


def compress(path, kind):
    """Compress the pixels of a slice by GDCM, under the header it has."""
    ds = dcmread(path)
    stored = np.frombuffer(ds.PixelData, "<i2").reshape(1, ds.Rows, ds.Columns)
    writer = sitk.ImageFileWriter()
    writer.UseCompressionOn()
    writer.SetCompressor(kind)
    writer.SetFileName(str(path))
    writer.Execute(sitk.GetImageFromArray(stored.astype(np.uint16)))
    packed = dcmread(path)
    assert packed.file_meta.TransferSyntaxUID.is_compressed
    ds.file_meta.TransferSyntaxUID = packed.file_meta.TransferSyntaxUID
    for name in ("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation"):
        setattr(ds, name, packed[name].value)
    ds["PixelData"] = packed["PixelData"]
    ds.save_as(path)


def test_compressed_pixels_that_are_cut_or_none_are_refused(tmp_path, capfd):
    paths = write_series(tmp_path / "a")
    for path in paths:
        compress(path, "JPEG2000")
    whole = paths[2].read_bytes()
    for damaged in (whole[:-60], whole[:-200] + bytes(200)):
        paths[2].write_bytes(damaged)
        with pytest.raises(DataError, match=r"^E-(DAMAGED|DICOM-HEADER): "):
            read_volume(paths)
    assert str(tmp_path) not in capfd.readouterr().err


def test_a_rescale_that_varies_is_applied_slice_by_slice(tmp_path):
    def edit(ds, k):
        ds.RescaleSlope, ds.RescaleIntercept = str(1 + k % 3), str(-1024 - k)

    volume = read_volume(write_series(tmp_path, edit=edit))
    k = np.arange(SIZE[2])
    expected = (ct_like(SIZE) + 1024.0) * (1 + k % 3) - 1024 - k
    np.testing.assert_array_equal(volume.array[0][::-1, ::-1], expected)


def test_mr_needs_no_rescale(tmp_path):
    def edit(ds, k):
        no_rescale(ds, k)
        ds.Modality = "MR"

    volume = read_volume(write_series(tmp_path, edit=edit))
    np.testing.assert_array_equal(volume.array[0][::-1, ::-1], ct_like(SIZE) + 1024)


def test_bits_above_those_stored_are_ignored(tmp_path):
    def edit(ds, k):
        pixels = np.frombuffer(ds.PixelData, "<i2") & 0x0FFF
        ds.BitsStored, ds.HighBit = 12, 11
        ds.PixelData = (pixels | 0x4000).astype("<i2").tobytes()

    volume = read_volume(write_series(tmp_path, edit=edit))
    np.testing.assert_array_equal(volume.array[0][::-1, ::-1], ct_like(SIZE))


def test_positions_rounded_by_the_scanner_are_accepted(tmp_path):
    def edit(ds, k):
        x, y, z = (float(v) for v in ds.ImagePositionPatient)
        ds.ImagePositionPatient = [x, y, round(z + 0.02 * (k % 2), 2)]

    assert read_volume(write_series(tmp_path, edit=edit)).spacing_mm[2] == pytest.approx(
        3, abs=0.01
    )


def test_a_folder_of_everything(tmp_path):
    """Two series in one folder, a scout, a dose report, DICOMDIR, notes and a broken file."""
    root = tmp_path / "in"
    first = write_series(root / "study")
    other = f"{SERIES}.5"
    for path in write_series(tmp_path / "b", ct_like(SIZE, 1), series=other):
        shutil.copy(path, root / "study" / f"b{path.name}")
    local = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    write_series(root / "scout", ct_like((5, 5, 2)), series=f"{SERIES}.6",
                 edit=field("ImageType", local))  # fmt: skip
    report = write_series(root / "dose", ct_like((5, 5, 3)), series=f"{SERIES}.7")
    drop(1, 2)(report)
    ds = dcmread(first[0])
    for name in ("Rows", "Columns", "PixelData"):
        delattr(ds, name)
    ds.save_as(root / "DICOMDIR")
    (root / "notes.txt").write_text("read me")
    (root / "study" / "empty.txt").touch()
    (root / "study" / "gone.json").symlink_to("nowhere")
    (root / "elsewhere").mkdir()
    (root / "elsewhere" / "done").touch()
    (root / "study" / "broken").write_bytes(bytes(128) + b"DICM" + b"\x09" * 40)
    sitk.WriteImage(sitk.Image(5, 5, 5, sitk.sitkInt16), str(root / "vol.nii.gz"))
    sitk.WriteImage(sitk.Image(5, 5, 5, sitk.sitkInt16), str(root / "old.mha"))

    seen = []
    found = find(root, progress=lambda done, total: seen.append((done, total)))
    series = [case for case in found.cases if case.slices]
    assert sorted(len(case.slices) for case in series) == [1, 8, 8]
    assert {case.id for case in found.cases if not case.slices} == {"vol", "old"}
    assert all(case.id.startswith("case-") for case in series)
    assert len({case.group for case in series if len(case.slices) == 8}) == 1, "one patient"
    assert found.notices == (
        "passed over 1 DICOM files that hold no image (such as DICOMDIR or RTSTRUCT)",
        "passed over 1 DICOM series of a single image (scouts, dose reports)",
        "passed over 2 localiser slices",
        "passed over 4 files that are no volumes (2 .txt, 1 other, 1 .json)",
    )
    assert seen[-1][0] == seen[-1][1] == len(seen)
    arrays = {read_volume(case.slices).array.tobytes() for case in series if len(case.slices) > 1}
    assert len(arrays) == 2
    broken = next(case for case in series if len(case.slices) == 1)
    with pytest.raises(DataError, match=r"^E-DICOM-(HEADER|SYNTAX)"):
        read_volume(broken.slices)


def test_a_budget_holds_for_the_whole_series(tmp_path):
    paths = write_series(tmp_path)
    with pytest.raises(DataError, match=r"^E-TOO-LARGE"):
        read_volume(paths, max_bytes=14 * 12 * 8)


@pytest.mark.realdata
def test_real_series_agree_with_simpleitk(real_data):
    spacings = {"ct_jpeg2000_series": (0.9765625, 0.9765625, 2), "small_ct_series": (1, 1, 1)}
    for name, spacing in spacings.items():
        folder = real_data / "dicom" / name
        names = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder))[:4]
        volume = read_volume([Path(name) for name in names])
        assert volume.spacing_mm == pytest.approx(spacing), "SliceThickness of the first says 3"
        image = sitk.ReadImage(names)
        array = sitk.GetArrayFromImage(image).transpose(2, 1, 0)
        assert sorted(array.shape) == sorted(volume.array.shape[1:])
        assert array.sum(dtype=np.int64) == volume.array.sum(dtype=np.int64)
        corner = np.array(image.TransformIndexToPhysicalPoint((3, 5, 2))) * [-1, -1, 1]
        i, j, k = np.rint(np.linalg.solve(volume.affine, [*corner, 1]))[:3].astype(int)
        assert volume.array[0, i, j, k] == array[3, 5, 2]
    label = read_grid(real_data / "dicom" / "ct_jpeg2000_series_label.nii.gz")
    (case,) = find(real_data / "dicom" / "ct_jpeg2000_series").cases
    size, affine = read_grid(case.slices).ras()
    assert label.ras()[0] == size
    np.testing.assert_allclose(label.ras()[1], affine, atol=1e-3)
