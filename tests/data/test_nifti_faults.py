"""Every fault of a file or header is refused with its code, on one line, with a remedy."""

import gzip
import os

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nifti_files import (
    DEFAULT,
    both,
    codes,
    ct_like,
    datatype,
    dims,
    pixdim,
    put,
    rotation,
    sform,
    write_nifti,
)

from spark3d.data.io import read_label, read_volume
from spark3d.errors import DataError

SHEARED = DEFAULT.copy()
SHEARED[0, 1] = 0.4
SINGULAR = DEFAULT.copy()
SINGULAR[:3, 1] = SINGULAR[:3, 0]
TURNED = DEFAULT.copy()
TURNED[:3, :3] = rotation(5, 2) @ DEFAULT[:3, :3]
NAN_FORM = DEFAULT.copy()
NAN_FORM[1, 1] = np.nan

HEADERS = {
    "pixdim zero": (pixdim(1, 0), "E-PIXDIM"),
    "pixdim negative": (pixdim(0, -2), "E-PIXDIM"),
    "pixdim NaN": (pixdim(2, float("nan")), "E-PIXDIM"),
    "pixdim other than sform": (pixdim(0, 5), "E-GEOMETRY"),
    "qform other than sform": (sform(TURNED), "E-GEOMETRY"),
    "sheared": (both(sform(SHEARED), pixdim(1, float(np.hypot(0.4, 1.5)))), "E-AFFINE-SHEARED"),
    "singular": (sform(SINGULAR), "E-AFFINE-SINGULAR"),
    "NaN in the sform": (sform(NAN_FORM), "E-AFFINE-NAN"),
    "both codes 0": (codes(0, 0), "E-NO-GEOMETRY"),
    "spacing of half a metre": (
        both(sform(np.diag([500.0, 1.5, 3, 1])), pixdim(0, 500), codes(0, 1)),
        "E-SPACING",
    ),
    "unknown unit": (put("B", (123, 5)), "E-UNITS"),
    "absurd slope": (put("f", (112, 1e30)), "E-SLOPE"),
    "infinite slope": (put("f", (112, float("inf"))), "E-SLOPE"),
    "NaN intercept": (put("f", (112, 2), (116, float("nan"))), "E-SLOPE"),
    "complex": (datatype(32, 64), "E-DATATYPE"),
    "RGB": (datatype(128, 24), "E-DATATYPE"),
    "long double": (datatype(1536, 128), "E-DATATYPE"),
    "unknown type": (datatype(77, 16), "E-DATATYPE"),
    "no axes": (dims(), "E-DIMENSIONS"),
    "negative size": (dims(20, -18, 12), "E-DIMENSIONS"),
    "two axes": (dims(20, 18), "E-2D"),
    "one slice": (dims(20, 18, 1), "E-2D"),
    "five axes": (dims(20, 3, 3, 3, 2), "E-5D"),
    "four axes": (dims(20, 18, 4, 3), "E-4D"),
    "claims 32767^3": (dims(32767, 32767, 32767), "E-TRUNCATED"),
    "voxels before the header ends": (put("f", (108, 100)), "E-OFFSET"),
    "voxels nowhere": (put("f", (108, float("nan"))), "E-OFFSET"),
    "other signature": (put("B", (344, 65)), "E-NOT-NIFTI"),
    "pair of files": (put("B", (345, ord("i"))), "E-NOT-NIFTI"),
    "quaternion too long": (both(put("f", (256, 3)), codes(1, 0)), "E-QFORM"),
}


def refused(path, code, read=read_volume, **options):
    """The fault must come as one DataError: code, file, found, expected, remedy, on one line."""
    with pytest.raises(DataError) as caught:
        read(path, **options)
    text = str(caught.value)
    assert text.startswith(f"{code}: {path}: found ")
    assert "; expected " in text
    assert text.count(";") >= 2, "no remedy"
    assert "\n" not in text
    return text


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("name", HEADERS)
def test_a_wrong_header_is_refused(tmp_path, name, suffix):
    edit, code = HEADERS[name]
    refused(write_nifti(tmp_path / f"a{suffix}", edit=edit), code)


def damaged(kind, whole):
    half = len(whole) // 2
    flipped = bytearray(whole)
    flipped[half] ^= 8
    return {
        "cut in the middle": whole[:half],
        "cut before the checksum": whole[:-8],
        "checksum only cut": whole[:-2],
        "one bit flipped": bytes(flipped),
        "wrong checksum": whole[:-8] + bytes(8),
        "empty": b"",
        "error page": b"<html><body>404 Not Found</body></html>",
        "header alone": gzip.compress(gzip.decompress(whole)[:348]),
        "voxels missing": gzip.compress(gzip.decompress(whole)[:3000]),
    }[kind]


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        ("cut in the middle", "E-TRUNCATED"),
        ("cut before the checksum", "E-TRUNCATED"),
        ("checksum only cut", "E-TRUNCATED"),
        ("one bit flipped", "E-DAMAGED"),
        ("wrong checksum", "E-DAMAGED"),
        ("empty", "E-NOT-GZIP"),
        ("error page", "E-NOT-GZIP"),
        ("header alone", "E-TRUNCATED"),
        ("voxels missing", "E-TRUNCATED"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, kind, code):
    path = write_nifti(tmp_path / "a.nii.gz")
    path.write_bytes(damaged(kind, path.read_bytes()))
    refused(path, code)


def test_an_uncompressed_file_that_ends_early_is_refused(tmp_path):
    path = write_nifti(tmp_path / "a.nii")
    path.write_bytes(path.read_bytes()[:-1])
    refused(path, "E-TRUNCATED")
    path.write_bytes(path.read_bytes()[:200])
    refused(path, "E-TRUNCATED")


def test_a_file_larger_than_the_budget_is_refused_before_it_is_read(tmp_path):
    path = write_nifti(tmp_path / "a.nii.gz", np.zeros((64, 64, 64), np.int16))
    refused(path, "E-TOO-LARGE", max_bytes=100_000)
    with pytest.raises(DataError, match=r"; crop it, or resample it to a larger spacing$"):
        read_volume(path, max_bytes=100_000)


def test_a_file_that_goes_on_after_its_voxels_is_refused(tmp_path):
    raw = write_nifti(tmp_path / "a.nii").read_bytes()
    path = tmp_path / "a.nii.gz"
    path.write_bytes(gzip.compress(raw + bytes(70 * 2**20), 1))
    refused(path, "E-TRAILING")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_voxel_that_is_no_number_is_refused(tmp_path, value):
    array = ct_like().astype(np.float32)
    array[1, 2, 3] = value
    assert "1 voxels" in refused(write_nifti(tmp_path / "a.nii", array), "E-NAN")


@pytest.mark.parametrize("value", [1e35, -1e35])
def test_values_that_fit_no_type_are_refused(tmp_path, value):
    array = ct_like().astype(np.float64)
    array[0, 0, 0] = value
    path = tmp_path / "a.nii"
    nib.save(nib.Nifti1Image(array, DEFAULT), path)
    refused(path, "E-RANGE")


def test_an_integer_beyond_32_bits_is_refused(tmp_path):
    array = ct_like().astype(np.int64)
    array[0, 0, 0] = 2**40
    path = tmp_path / "a.nii"
    nib.save(nib.Nifti1Image(array, DEFAULT, dtype=np.int64), path)
    refused(path, "E-RANGE")


def test_files_that_cannot_be_opened_are_refused(tmp_path):
    refused(tmp_path / "absent.nii.gz", "E-UNREADABLE")
    (tmp_path / "folder.nii").mkdir()
    refused(tmp_path / "folder.nii", "E-UNREADABLE")
    os.symlink(tmp_path / "loop.nii", tmp_path / "loop.nii")
    refused(tmp_path / "loop.nii", "E-UNREADABLE")


@pytest.mark.parametrize(
    ("value", "code"), [(0.5, "E-LABEL-FLOAT"), (-1, "E-LABEL-RANGE"), (40000, "E-LABEL-RANGE")]
)
def test_label_values_that_are_no_classes_are_refused(tmp_path, value, code):
    array = np.zeros((6, 6, 6), np.float32)
    array[2, 2, 2] = value
    refused(write_nifti(tmp_path / "a.nii", array), code, read_label)


def test_a_label_of_four_axes_is_refused(tmp_path):
    array = np.zeros((6, 6, 6, 2), np.uint8)
    refused(write_nifti(tmp_path / "a.nii", array), "E-4D", read_label)


def test_float_labels_with_whole_numbers_are_read(tmp_path):
    array = np.zeros((6, 6, 6), np.float32)
    array[2, 2, 2] = 7
    label = read_label(write_nifti(tmp_path / "a.nii", array)).array
    assert label.dtype == np.uint8
    assert label.max() == 7


def test_no_text_of_a_header_reaches_a_message(tmp_path):
    secret = b"DOE^JANE 19700101"

    def name(raw):
        raw[148 : 148 + len(secret)] = secret  # descrip
        raw[228 : 228 + len(secret)] = secret  # aux_file

    for fault in ("pixdim zero", "four axes", "absurd slope", "qform other than sform"):
        edit, code = HEADERS[fault]
        assert "DOE" not in refused(write_nifti(tmp_path / "a.nii", edit=both(edit, name)), code)


@settings(max_examples=150)
@given(places=st.lists(st.tuples(st.integers(0, 351), st.integers(0, 255)), min_size=1, max_size=6))
def test_any_header_is_read_or_refused_and_takes_no_more_than_the_budget(tmp_path_factory, places):
    path = tmp_path_factory.mktemp("fuzz") / "a.nii"
    write_nifti(path, edit=put("B", *places))
    try:
        volume = read_volume(path, max_bytes=2**20)
    except DataError:
        return
    assert volume.array.nbytes <= 2**23
    assert np.isfinite(volume.affine).all()
    unit = volume.affine[:3, :3] / np.linalg.norm(volume.affine[:3, :3], axis=0)
    np.testing.assert_allclose(unit.T @ unit, np.eye(3), atol=2e-3)


@settings(max_examples=100)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_in_a_compressed_file_changes_nothing_or_is_refused(
    tmp_path_factory, place, bit
):
    path = write_nifti(tmp_path_factory.mktemp("flip") / "a.nii.gz")
    good = read_volume(path)
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= 1 << bit
    path.write_bytes(data)
    try:
        volume = read_volume(path)
    except DataError:
        return
    np.testing.assert_array_equal(volume.array, good.array)
    np.testing.assert_array_equal(volume.affine, good.affine)
