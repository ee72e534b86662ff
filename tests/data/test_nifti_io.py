"""Volumes in and label maps out, held against nibabel; what is accepted beside the plain case."""

import gzip

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nifti_files import both, codes, ct_like, dims, put, rotation, signed_permutation, write_nifti

from spark3d.data.io import read_grid, read_label, read_volume, write_label, write_volume
from spark3d.errors import EnvironmentProblem

OBLIQUE = np.eye(4)
OBLIQUE[:3, :3] = (
    rotation(12, 0) @ signed_permutation((1, 0, 2), (-1, 1, -1)) * np.array([0.7, 0.8, 2.5])
)
OBLIQUE[:3, 3] = 31, -12, 400


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_a_volume_agrees_with_nibabel(tmp_path, name):
    path = write_nifti(tmp_path / name, affine=OBLIQUE)
    volume = read_volume(path)
    canonical = nib.as_closest_canonical(nib.load(path))
    np.testing.assert_array_equal(volume.array[0], np.asarray(canonical.dataobj))
    np.testing.assert_allclose(volume.affine, canonical.affine, atol=1e-5)
    assert volume.array.dtype == np.int16
    assert read_grid(path).size == volume.source.size == ct_like().shape


@pytest.mark.parametrize("kind", ["nifti2", "big_endian"])
def test_other_encodings_read_alike(tmp_path, kind):
    array, path = ct_like(), tmp_path / "a.nii.gz"
    if kind == "nifti2":
        nib.save(nib.Nifti2Image(array, OBLIQUE), path)
    else:
        header = nib.Nifti1Header(endianness=">")
        nib.save(nib.Nifti1Image(array, OBLIQUE, header), path)
    plain = read_volume(write_nifti(tmp_path / "b.nii", affine=OBLIQUE))
    volume = read_volume(path)
    np.testing.assert_array_equal(volume.array, plain.array)
    np.testing.assert_allclose(volume.affine, plain.affine, atol=1e-4)


@pytest.mark.parametrize(
    ("slope", "intercept", "kind"),
    [(1, -1024, np.int16), (2, 40000, np.int32), (0.5, 3, np.float32)],
)
def test_slope_and_intercept_are_applied(tmp_path, slope, intercept, kind):
    scale = put("f", (112, slope), (116, intercept))
    volume = read_volume(write_nifti(tmp_path / "a.nii", edit=scale))
    np.testing.assert_allclose(volume.array[0], ct_like() * float(slope) + intercept)
    assert volume.array.dtype == kind


@pytest.mark.parametrize(("unit", "factor"), [(1, 1000), (2, 1), (3, 0.001), (0, 1)])
def test_metres_and_micrometres_become_millimetres(tmp_path, unit, factor):
    affine = np.diag([2.0, 1.5, 3.0, 1.0])
    affine[:3] /= factor
    path = write_nifti(tmp_path / "a.nii", affine=affine, edit=put("B", (123, unit)))
    np.testing.assert_allclose(read_volume(path).spacing_mm, (2, 1.5, 3), rtol=1e-5)


def test_a_trailing_axis_of_one_is_dropped(tmp_path):
    path = write_nifti(tmp_path / "a.nii", edit=dims(20, 18, 12, 1))
    assert read_volume(path).array.shape == (1, 20, 18, 12)


def test_a_fourth_axis_is_channels_where_that_is_said(tmp_path):
    array = np.stack([ct_like(), ct_like(seed=1)], axis=3)
    volume = read_volume(write_nifti(tmp_path / "a.nii.gz", array), channels=True)
    np.testing.assert_array_equal(volume.array, np.moveaxis(array, 3, 0))


@pytest.mark.parametrize("form", ["sform", "qform"])
def test_a_geometry_that_is_named_is_trusted(tmp_path, form):
    moved = np.diag([2.0, 1.5, 3.0, 1.0])
    path = write_nifti(tmp_path / "a.nii", affine=OBLIQUE, edit=both(put("f", *_rows(moved))))
    expected = moved if form == "sform" else OBLIQUE
    grid = read_volume(path, geometry=form).source
    np.testing.assert_allclose(grid.affine, expected, atol=1e-4)


def _rows(affine):
    return [(280 + 4 * k, float(v)) for k, v in enumerate(affine[:3].ravel())]


def test_a_file_without_codes_is_read_by_its_voxel_sizes_when_told(tmp_path):
    path = write_nifti(tmp_path / "a.nii", edit=codes(0, 0))
    assert read_volume(path, geometry="qform").spacing_mm == pytest.approx((2, 1.5, 3))


def test_nan_is_filled_when_told(tmp_path):
    array = ct_like().astype(np.float32)
    array[3, 4, 5] = np.nan
    array[3, 4, 6] = np.inf
    volume = read_volume(write_nifti(tmp_path / "a.nii", array), nan_fill=-1000)
    assert volume.array[0, 3, 4, 5] == volume.array[0, 3, 4, 6] == -1000
    assert volume.filled == 2


@given(
    slope=st.sampled_from([1, 0.5, 2, -3]),
    intercept=st.integers(-2000, 2000),
    fill=st.integers(-3000, 3000),
    kind=st.sampled_from([np.float32, np.float64]),
)
def test_nan_is_filled_with_the_physical_value(tmp_path_factory, slope, intercept, fill, kind):
    """Not with one that slope and intercept then change; the other voxels are as ever."""
    array = ct_like((6, 5, 4)).astype(kind)
    array[1, 2, 3], array[0, 0, 0] = np.nan, -np.inf
    path = tmp_path_factory.getbasetemp() / "fill.nii"
    write_nifti(path, array, edit=put("f", (112, slope), (116, intercept)))
    volume = read_volume(path, nan_fill=fill)
    expected = np.where(np.isfinite(array), array * slope + intercept, fill)
    np.testing.assert_allclose(volume.array[0], expected, rtol=1e-6)
    assert volume.filled == 2


@given(
    order=st.permutations([0, 1, 2]),
    sign=st.tuples(*[st.sampled_from([-1, 1])] * 3),
    tilt=st.floats(-15, 15),
    top=st.sampled_from([5, 255, 300]),
)
def test_a_label_returns_to_the_file_it_was_made_for(tmp_path_factory, order, sign, tilt, top):
    folder = tmp_path_factory.mktemp("label")
    affine = np.eye(4)
    affine[:3, :3] = rotation(tilt, 1) @ signed_permutation(tuple(order), sign) * [0.7, 0.9, 2.0]
    affine[:3, 3] = -101.25, 33, 512
    image = write_nifti(folder / "image.nii.gz", affine=affine)
    label = np.random.default_rng(0).integers(0, top + 1, ct_like().shape).astype(np.int16)
    label[0, 0, 0] = top
    volume = read_volume(image)
    in_ras = read_label(write_nifti(folder / "label.nii.gz", label, affine)).array[0]
    write_label(folder / "out.nii.gz", in_ras, volume.source)

    written, original = nib.load(folder / "out.nii.gz"), nib.load(image)
    np.testing.assert_array_equal(np.asarray(written.dataobj), label)
    np.testing.assert_array_equal(written.affine, original.affine)
    assert written.get_data_dtype() == (np.uint8 if top < 256 else np.int16)
    assert read_grid(folder / "out.nii.gz").size == volume.source.size


def test_writing_is_repeatable_and_leaves_nothing_else(tmp_path):
    for name in ("a.nii.gz", "b.nii.gz"):
        write_volume(tmp_path / name, ct_like(), OBLIQUE)
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.nii.gz", "b.nii.gz"]


def test_labels_outside_their_range_or_grid_are_refused(tmp_path):
    source = read_grid(write_nifti(tmp_path / "a.nii"))
    with pytest.raises(ValueError, match=r"0\.\.32767"):
        write_label(tmp_path / "b.nii", np.full((20, 18, 12), -1), source)
    with pytest.raises(ValueError, match="not on the source grid"):
        write_label(tmp_path / "b.nii", np.zeros((20, 18, 13), np.uint8), source)
    with pytest.raises(ValueError, match=r"\.nii"):
        write_label(tmp_path / "b.png", np.zeros((20, 18, 12), np.uint8), source)
    assert not (tmp_path / "b.nii").exists()


def test_a_folder_that_is_absent_is_a_problem_of_the_environment(tmp_path):
    with pytest.raises(EnvironmentProblem, match="check the folder"):
        write_volume(tmp_path / "nowhere" / "a.nii", ct_like(), OBLIQUE)


@pytest.mark.realdata
def test_real_volumes_agree_with_nibabel(real_data):
    paths = sorted(real_data.glob("openkbp/imagesTr/*.nii.gz"))[:3]
    paths += sorted(real_data.glob("msd_hippocampus/*Tr/*.nii.gz"))[::60]
    paths += sorted(real_data.glob("trunk_ct/example*.nii.gz"))
    assert len(paths) > 6
    for path in paths:
        volume = read_volume(path)
        canonical = nib.as_closest_canonical(nib.load(path))
        np.testing.assert_array_equal(volume.array[0], np.asarray(canonical.dataobj))
        np.testing.assert_allclose(volume.affine, canonical.affine, atol=1e-4)


def test_gzip_members_and_trailing_bytes_are_read(tmp_path):
    path = write_nifti(tmp_path / "a.nii")
    raw = path.read_bytes()
    parts = gzip.compress(raw[:5000]) + gzip.compress(raw[5000:] + bytes(512))
    (tmp_path / "b.nii.gz").write_bytes(parts)
    np.testing.assert_array_equal(read_volume(tmp_path / "b.nii.gz").array, read_volume(path).array)
