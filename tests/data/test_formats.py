"""One volume in every format reads to the same array and affine, also as SimpleITK wrote it."""

import zlib

import numpy as np
import pytest
import SimpleITK as sitk
from dicom_files import AFFINE, write_series
from hypothesis import given, settings
from hypothesis import strategies as st
from nifti_files import ct_like, rotation, signed_permutation, write_nifti

from spark3d.data.io import data_files, read_grid, read_volume
from spark3d.errors import DataError

LPS = np.diag([-1.0, -1, 1, 1])


def as_itk(array, affine):
    """The volume for SimpleITK, which works in LPS."""
    image = sitk.GetImageFromArray(np.ascontiguousarray(array.transpose(2, 1, 0)))
    matrix = (LPS @ affine)[:3]
    spacing = np.linalg.norm(matrix[:, :3], axis=0)
    image.SetSpacing([float(s) for s in spacing])
    image.SetDirection([float(v) for v in (matrix[:, :3] / spacing).ravel()])
    image.SetOrigin([float(v) for v in matrix[:, 3]])
    return image


def write_all(folder, array, affine):
    """The volume in every format, compressed and not."""
    sources = {
        "nii.gz": write_nifti(folder / "a.nii.gz", array, affine),
        "dicom": write_series(folder / "series", array, affine),
    }
    for suffix, packed in (("nrrd", False), ("nhdr", True), ("mha", True), ("mhd", False)):
        path = folder / f"b.{suffix}"
        sitk.WriteImage(as_itk(array, affine), str(path), packed)
        sources[suffix] = path
    sources["packed nrrd"] = folder / "c.nrrd"
    sitk.WriteImage(as_itk(array, affine), str(sources["packed nrrd"]), True)
    return sources


@settings(max_examples=6)
@given(
    order=st.permutations([0, 1, 2]),
    sign=st.tuples(*[st.sampled_from([-1, 1])] * 3),
    tilt=st.floats(-14, 14),
)
def test_every_format_reads_alike(tmp_path_factory, order, sign, tilt):
    affine = np.eye(4)
    affine[:3, :3] = rotation(tilt, 0) @ signed_permutation(tuple(order), sign) * [0.75, 1.5, 3.25]
    affine[:3, 3] = -12.5, 30, 110.25
    array = ct_like((9, 8, 6))
    sources = write_all(tmp_path_factory.mktemp("f"), array, affine)
    volumes = {name: read_volume(source) for name, source in sources.items()}
    first = volumes["nii.gz"]
    assert first.array.dtype == np.int16
    for name, volume in volumes.items():
        np.testing.assert_array_equal(volume.array, first.array, err_msg=name)
        np.testing.assert_allclose(volume.affine, first.affine, atol=1e-4, err_msg=name)
        np.testing.assert_allclose(volume.spacing_mm, first.spacing_mm, rtol=1e-5, err_msg=name)
        assert read_grid(sources[name]).size == volume.source.size


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.int32, np.float32, np.float64])
@pytest.mark.parametrize("suffix", ["nrrd", "mha"])
def test_types_are_kept(tmp_path, kind, suffix):
    array = (ct_like((6, 5, 4)) % 200).astype(kind)
    path = tmp_path / f"a.{suffix}"
    sitk.WriteImage(as_itk(array, AFFINE), str(path), True)
    volume = read_volume(path)
    np.testing.assert_array_equal(volume.array[0][::-1, ::-1], array)
    assert volume.array.dtype == (np.float32 if np.dtype(kind).kind == "f" else np.int16)


@pytest.mark.parametrize("suffix", ["nrrd", "mha"])
def test_channels_are_found_where_they_lie(tmp_path, suffix):
    parts = [ct_like((6, 5, 4), seed) for seed in range(2)]
    image = sitk.Compose(*(as_itk(part, AFFINE) for part in parts))
    path = tmp_path / f"a.{suffix}"
    sitk.WriteImage(image, str(path))
    volume = read_volume(path, channels=True)
    np.testing.assert_array_equal(volume.array[:, ::-1, ::-1], np.stack(parts))
    with pytest.raises(DataError, match=r"^E-4D"):
        read_volume(path)


def test_spaces_of_nrrd_and_big_endian_voxels(tmp_path):
    array = ct_like((6, 5, 4))
    read = {}
    for space, turn in (
        ("left-posterior-superior", (-1, -1, 1)),
        ("LAS", (-1, 1, 1)),
        ("right-anterior-superior", (1, 1, 1)),
    ):
        matrix = np.diag(turn) @ AFFINE[:3]
        columns = ["(" + ",".join(f"{v:g}" for v in column) + ")" for column in matrix.T]
        lines = [
            "NRRD0004", "# DOE^JANE", "type: short", "dimension: 3", f"space: {space}",
            "sizes: 6 5 4", "space directions: " + " ".join(columns[:3]),
            "endian: big", "encoding: raw", f"space origin: {columns[3]}", "name:=DOE^JANE", "", "",
        ]  # fmt: skip
        path = tmp_path / f"{turn[1]}.nrrd"
        path.write_bytes("\n".join(lines).encode() + array.astype(">i2").tobytes(order="F"))
        read[space] = read_volume(path)
    for volume in read.values():
        np.testing.assert_array_equal(volume.array[0][::-1, ::-1], array)
        np.testing.assert_allclose(volume.source.affine, AFFINE)


def test_a_detached_header_brings_its_voxels(tmp_path):
    """Whatever its suffix: those of attached ones allow it too."""
    for written, suffix in (("nhdr", "nhdr"), ("mhd", "mhd"), ("nhdr", "nrrd"), ("mhd", "mha")):
        path = tmp_path / f"a.{written}"
        sitk.WriteImage(as_itk(ct_like((6, 5, 4)), AFFINE), str(path))
        path = path.rename(path.with_suffix(f".{suffix}"))
        own, body = data_files(path)
        assert own == path
        assert body.stat().st_size == 6 * 5 * 4 * 2
        body.unlink()
        assert data_files(path) == (path,)
        with pytest.raises(DataError, match=r"^E-UNREADABLE"):
            read_volume(path)
    for suffix in ("nrrd", "mha"):
        path = tmp_path / f"attached.{suffix}"
        sitk.WriteImage(as_itk(ct_like((6, 5, 4)), AFFINE), str(path))
        assert data_files(path) == (path,)


def test_a_large_packed_volume_is_read_in_pieces(tmp_path):
    array = np.random.default_rng(0).integers(-1000, 1000, (130, 120, 110)).astype(np.int16)
    sitk.WriteImage(as_itk(array, AFFINE), str(tmp_path / "a.mha"), True)
    np.testing.assert_array_equal(read_volume(tmp_path / "a.mha").array[0][::-1, ::-1], array)


# ---- faults ----


def nrrd(tmp_path, **changes):
    return changed(tmp_path / "a.nrrd", ": ", changes)


def mha(tmp_path, **changes):
    return changed(tmp_path / "a.mha", " = ", changes)


def changed(path, between, changes):
    """A sound file with some fields set (or, with None, left out)."""
    sitk.WriteImage(as_itk(ct_like((6, 5, 4)), AFFINE), str(path))
    end = b"\n\n" if path.suffix == ".nrrd" else b"LOCAL\n"
    head, body = path.read_bytes().split(end, 1)
    fields = dict(line.split(between, 1) for line in head.decode().splitlines() if between in line)
    signature = head.decode().splitlines()[0] + "\n" if path.suffix == ".nrrd" else ""
    fields.update({key.replace("_", " "): value for key, value in changes.items()})
    if path.suffix == ".mha":
        fields["ElementDataFile"] = fields.pop("ElementDataFile") or "LOCAL"
    text = "\n".join(f"{k}{between}{v}" for k, v in fields.items() if v is not None)
    end = b"\n\n" if path.suffix == ".nrrd" else b"\n"
    path.write_bytes((signature + text).encode() + end + body)
    return path


NRRD_FAULTS = {
    "E-NO-GEOMETRY": [{"space": None}, {"space_directions": None}, {"space": "scanner-xyz"}],
    "E-DATATYPE": [{"type": "block"}, {"kinds": "RGB-color domain domain"}],
    "E-ENCODING": [{"encoding": "bzip2"}, {"byte skip": "4"}, {"line skip": "1"}],
    "E-HEADER": [
        {"sizes": "6 5"}, {"dimension": "2"}, {"sizes": "6 x 4"}, {"sizes": "6 5 4.5"},
        {"endian": None}, {"data_file": "../a.raw"}, {"data_file": "LIST"[:0]},
        {"space_origin": "(0,0)"}, {"space_origin": None}, {"encoding": None}, {"type": None},
        {"space_directions": "(1,0,0) (0,1,0) none"},
    ],
    "E-UNREADABLE": [{"data_file": "absent.raw"}],
    "E-UNITS": [{"space_units": '"m" "m" "m"'}],
    "E-DIMENSIONS": [{"sizes": "6 -5 4"}, {"sizes": "6 0 4"}],
    "E-2D": [{"sizes": "6 5 1"}],
    "E-TRUNCATED": [{"sizes": "6 5 400"}, {"sizes": "32767 32767 32767"}],
    "E-TRAILING": [{"sizes": "6 5 3"}],
    "E-AFFINE-SINGULAR": [{"space_directions": "(1,0,0) (1,0,0) (0,0,1)"}],
    "E-AFFINE-SHEARED": [{"space_directions": "(1,0,0) (0.2,1,0) (0,0,1)"}],
    "E-SPACING": [{"space_directions": "(1e3,0,0) (0,1,0) (0,0,1)"}],
}  # fmt: skip
MHA_FAULTS = {
    "E-NO-GEOMETRY": [{"TransformMatrix": None}, {"Offset": None}, {"ElementSpacing": None}],
    "E-DATATYPE": [{"ElementType": "MET_STRING"}],
    "E-NOT-METAIMAGE": [{"NDims": None}],
    "E-HEADER": [
        {"NDims": "4"}, {"DimSize": None}, {"BinaryData": "False"}, {"ElementSpacing": "1 2"},
        {"ElementDataFile": "LIST"}, {"ElementDataFile": "/etc/passwd"},
        {"ElementDataFile": "a%03d.raw 1 3 1"}, {"Offset": "0 0 nan"},
        {"ElementSpacing": "inf 1 1"},
    ],
    "E-UNITS": [{"DistanceUnits": "um"}],
    "E-PIXDIM": [{"ElementSpacing": "1 0 1"}, {"ElementSpacing": "1 -2 1"}],
    "E-GEOMETRY": [{"TransformMatrix": "2 0 0 0 1 0 0 0 1"}],
    "E-AFFINE-SHEARED": [{"TransformMatrix": "1 0 0 0.6 0.8 0 0 0 1"}],
    "E-TRUNCATED": [{"DimSize": "6 5 400"}, {"DimSize": "30000 30000 30000"}],
    "E-TRAILING": [{"DimSize": "6 5 3"}],
    "E-DIMENSIONS": [{"DimSize": "6 0 4"}],
    "E-2D": [{"DimSize": "6 5 1"}],
    "E-4D": [{"ElementNumberOfChannels": "2", "DimSize": "3 5 4"}],
    "E-DAMAGED": [{"CompressedData": "True"}],
}  # fmt: skip


@pytest.mark.parametrize(
    ("make", "code", "change"),
    [(nrrd, code, c) for code, changes in NRRD_FAULTS.items() for c in changes]
    + [(mha, code, c) for code, changes in MHA_FAULTS.items() for c in changes],
)
def test_a_wrong_field_is_refused(tmp_path, make, code, change):
    path = make(tmp_path)
    read_volume(path)
    path = make(tmp_path, **change)
    with pytest.raises(
        DataError, match=f"^{code}: [^\n]*: found [^\n]*; expected [^\n]*; "
    ) as said:
        read_volume(path)
    assert "etc" not in str(said.value)


@pytest.mark.parametrize("suffix", ["nrrd", "mha"])
@pytest.mark.parametrize("kind", ["empty", "cut", "flipped", "checksum", "page", "endless"])
def test_a_damaged_file_is_refused(tmp_path, suffix, kind):
    path = tmp_path / f"a.{suffix}"
    sitk.WriteImage(as_itk(ct_like((20, 18, 12)), AFFINE), str(path), True)
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[-len(whole) // 4] ^= 16
    path.write_bytes(
        {
            "empty": b"", "cut": whole[:-30], "flipped": bytes(flipped), "checksum": whole[:-2],
            "page": b"<html>404</html>", "endless": whole[:20] + b"#" * 70000,
        }[kind]
    )  # fmt: skip
    with pytest.raises(DataError, match=r"^E-(TRUNCATED|DAMAGED|HEADER|NOT-[A-Z]*): "):
        read_volume(path)


def test_a_file_that_inflates_beyond_its_claim_is_refused(tmp_path):
    path = mha(tmp_path, CompressedData="True")
    head = path.read_bytes().split(b"LOCAL\n")[0] + b"LOCAL\n"
    path.write_bytes(head + zlib.compress(bytes(2**24)))
    with pytest.raises(DataError, match=r"^E-TRAILING"):
        read_volume(path)
