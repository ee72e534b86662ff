"""Whatever the bytes, a reader returns a sound volume within its budget or refuses the file."""

import os
import resource
import zlib
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from dicom_files import write_series
from hypothesis import given, settings
from hypothesis import strategies as st
from nifti_files import ct_like, write_nifti

from spark3d.data.checks import corner_distance_mm
from spark3d.data.io import read_volume
from spark3d.data.sources import find
from spark3d.errors import DataError

SIZE = (9, 8, 6)
BUDGET = 2**20
ROOM_KIB = 2**18  # 256 MiB, for what the libraries load at their first use
MANY = 2000
KINDS = ("dicom", "nrrd", "packed nrrd", "mha", "packed mha")
FIELDS = st.sampled_from(
    ["sizes", "DimSize", "type", "ElementType", "space directions", "TransformMatrix", "encoding",
     "ElementSpacing", "space origin", "Offset", "NDims", "dimension", "space", "endian", "kinds",
     "CompressedData", "ElementDataFile", "ElementNumberOfChannels", "data file", "HeaderSize"]
)  # fmt: skip
VALUES = st.one_of(
    st.text(st.characters(max_codepoint=255), max_size=24),
    st.lists(st.integers(-(2**70), 2**70), max_size=5).map(lambda v: " ".join(map(str, v))),
    st.lists(st.floats(), max_size=9).map(lambda v: " ".join(map(str, v))),
    st.sampled_from(["32767 32767 32767", "99999 99999 99999", "(1,0,0) (0,1,0) (0,0,1e-9)", "../x",
                     "LIST", "gzip", "True", "9 8 6 1", "none", "-1", "/dev/zero", "a%d 1 9 1"]),
)  # fmt: skip


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """One volume in every format: the files of each."""
    folder = tmp_path_factory.mktemp("sound")
    image = sitk.GetImageFromArray(ct_like(SIZE).transpose(2, 1, 0).copy())
    files = {"dicom": write_series(folder / "dicom", ct_like(SIZE))}
    for kind in KINDS[1:]:
        path = folder / f"{kind.replace(' ', '_')}.{kind.split()[-1]}"
        sitk.WriteImage(image, str(path), kind.startswith("packed"))
        files[kind] = [path]
    return files


def read_or_refuse(source):
    """A volume that keeps its promises, or None if the file was refused as it should be."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        volume = read_volume(source, max_bytes=BUDGET)
    except DataError as error:
        text = str(error)
        assert text.startswith("E-")
        assert text.count("; ") >= 2
        assert text.isprintable(), "bytes of a header were quoted"
        return None
    finally:
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert grown < ROOM_KIB
    assert volume.array.nbytes <= 8 * BUDGET
    assert np.isfinite(volume.affine).all()
    unit = volume.affine[:3, :3] / np.linalg.norm(volume.affine[:3, :3], axis=0)
    np.testing.assert_allclose(unit.T @ unit, np.eye(3), atol=2e-3)
    return volume


def check_bytes(files, kind, folder, index, places):
    """Change some bytes of one file of a copy and read it."""
    copies = []
    for path in files:
        copies.append(folder / path.name)
        copies[-1].write_bytes(path.read_bytes())
    victim = copies[index % len(copies)]
    data = bytearray(victim.read_bytes())
    for place, value in places:
        data[int(place * len(data))] = value
    victim.write_bytes(data)
    read_or_refuse(copies if kind == "dicom" else victim)


PLACES = st.lists(
    st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=6
)


@pytest.mark.parametrize("kind", KINDS)
@given(index=st.integers(0, 5), places=PLACES)
def test_changed_bytes(sound, tmp_path_factory, kind, index, places):
    check_bytes(sound[kind], kind, tmp_path_factory.mktemp("f"), index, places)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=MANY)
@given(index=st.integers(0, 5), places=PLACES)
def test_many_changed_bytes(sound, tmp_path_factory, kind, index, places):
    check_bytes(sound[kind], kind, tmp_path_factory.mktemp("f"), index, places)


def check_field(path, folder, field, value):
    """Write a header with one more or another field and read it."""
    between = ": " if path.suffix == ".nrrd" else " = "
    raw = path.read_bytes()
    end = b"\n\n" if path.suffix == ".nrrd" else b"LOCAL\n"
    head, body = raw.split(end, 1)
    lines = [line for line in head.split(b"\n") if not line.startswith(field.encode())]
    lines.insert(1, f"{field}{between}{value}".encode("latin-1").replace(b"\n", b" "))
    target = folder / path.name
    target.write_bytes(b"\n".join(lines) + end + body)
    read_or_refuse(target)


@pytest.mark.parametrize("kind", KINDS[1:])
@given(field=FIELDS, value=VALUES)
def test_any_value_of_any_field(sound, tmp_path_factory, kind, field, value):
    check_field(sound[kind][0], tmp_path_factory.mktemp("f"), field, value)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS[1:])
@settings(max_examples=MANY)
@given(field=FIELDS, value=VALUES)
def test_many_values_of_fields(sound, tmp_path_factory, kind, field, value):
    check_field(sound[kind][0], tmp_path_factory.mktemp("f"), field, value)


DICOM_VALUES = {
    "ImagePositionPatient": st.lists(st.floats(-1e10, 1e10), max_size=4),
    "ImageOrientationPatient": st.lists(st.floats(-2, 2), min_size=5, max_size=7),
    "PixelSpacing": st.lists(st.floats(-1, 1e6), max_size=3),
    "Rows": st.integers(0, 65535),
    "Columns": st.integers(0, 65535),
    "BitsAllocated": st.integers(0, 65535),
    "BitsStored": st.integers(0, 65535),
    "HighBit": st.integers(0, 65535),
    "PixelRepresentation": st.integers(0, 3),
    "SamplesPerPixel": st.integers(0, 65535),
    "NumberOfFrames": st.integers(-(2**31), 2**31 - 1),
    "RescaleSlope": st.floats(-1e30, 1e30),
    "RescaleIntercept": st.floats(-1e30, 1e30),
    "PhotometricInterpretation": st.sampled_from(["MONOCHROME1", "RGB", "", "PALETTE COLOR"]),
}


@given(data=st.data(), only=st.integers(0, 5), every=st.booleans())
def test_any_value_of_a_field_of_a_slice(tmp_path_factory, data, only, every):
    name = data.draw(st.sampled_from(sorted(DICOM_VALUES)))
    value = data.draw(DICOM_VALUES[name])

    def edit(ds, k):
        if every or k == only:
            numbers = isinstance(value, list)
            text = [f"{v:.8g}" for v in value] if numbers else value
            setattr(ds, name, f"{value:.8g}" if isinstance(value, float) else text)

    folder = tmp_path_factory.mktemp("f")
    volume = read_or_refuse(write_series(folder, ct_like(SIZE), edit=edit))
    if volume is not None and name == "ImagePositionPatient" and not every:
        good = read_volume(write_series(folder, ct_like(SIZE)))
        away = corner_distance_mm(SIZE, volume.source.affine, good.source.affine)
        assert away < 0.5, "one slice moved, and nothing was noticed"


@given(text=st.binary(max_size=400), suffix=st.sampled_from([".nrrd", ".nhdr", ".mha", ".mhd"]))
def test_any_bytes_at_all(tmp_path_factory, text, suffix):
    path = tmp_path_factory.mktemp("f") / f"a{suffix}"
    path.write_bytes(text)
    assert read_or_refuse(path) is None


@given(text=st.binary(max_size=400))
def test_any_bytes_after_the_signature_of_dicom(tmp_path_factory, text):
    folder = tmp_path_factory.mktemp("f")
    (folder / "a").write_bytes(bytes(128) + b"DICM" + text)
    (folder / "vol.nii.gz").write_bytes(b"")
    cases = [case for case in find(folder).cases if case.slices]
    assert all(read_or_refuse(case.slices) is None for case in cases)


def test_a_bomb_is_not_unpacked(sound, tmp_path):
    path = sound["packed mha"][0]
    head = path.read_bytes().split(b"LOCAL\n")[0] + b"LOCAL\n"
    head = head.replace(b"DimSize = 9 8 6", b"DimSize = 2000 2000 2000")
    target = tmp_path / "a.mha"
    target.write_bytes(head + zlib.compress(bytes(2**26)))
    assert read_or_refuse(target) is None


REAL = ("trunk_ct/example_ct_sm.nii.gz", "msd_hippocampus/imagesTr", "dicom/small_ct_series")


def check_flips(folder, real_data, count):
    """Flip single bits of real files: the same volume, or a refusal."""
    rng = np.random.default_rng(0)
    for name in REAL:
        place = real_data / name
        if place.name == "imagesTr":
            place = min(place.glob("*.nii.gz"), key=lambda path: path.stat().st_size)
        paths = sorted(place.iterdir()) if place.is_dir() else [place]
        source = paths if place.is_dir() else paths[0]
        good = read_volume(source)
        victim = paths[len(paths) // 2]
        whole = victim.read_bytes()
        copy = folder / victim.name
        changed = [copy if path == victim else path for path in paths]
        for _ in range(count):
            data = bytearray(whole)
            data[rng.integers(len(data) if not place.is_dir() else 4000)] ^= 1 << rng.integers(8)
            copy.write_bytes(data)
            try:
                volume = read_volume(changed if place.is_dir() else copy)
            except DataError:
                continue
            away = corner_distance_mm(good.source.size, volume.source.affine, good.source.affine)
            assert volume.source.size == good.source.size
            if not place.is_dir():  # slices have no checksum: their places are tested, not pixels
                np.testing.assert_array_equal(volume.array, good.array)
                assert away < 1e-6
            os.remove(copy)


@pytest.mark.realdata
def test_flipped_bits_of_real_files(real_data, tmp_path):
    check_flips(tmp_path, real_data, 10)


@pytest.mark.slow
@pytest.mark.realdata
def test_many_flipped_bits_of_real_files(real_data, tmp_path):
    check_flips(tmp_path, real_data, 300)


def test_a_sound_file_passes_the_same_checks(sound, tmp_path):
    for kind, paths in sound.items():
        assert read_or_refuse(paths if kind == "dicom" else paths[0]) is not None
    assert read_or_refuse(write_nifti(tmp_path / "a.nii.gz")) is not None
