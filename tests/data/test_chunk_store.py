"""The store: exact boxes, whole or absent cases, and no damage that goes unnoticed."""

import os
import pickle
import random

import blosc2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spark3d.data.chunks import ChunkedFile, _layout, encode
from spark3d.data.files import write_atomic
from spark3d.data.geometry import SourceGrid
from spark3d.data.record import CaseRecord, IntensityStats, case_path, read_record
from spark3d.data.store import PreparedCase, Store, StoreWriter, write_case
from spark3d.errors import ConfigError, DataError, EnvironmentProblem

SETTINGS = {"spacing_mm": [1.0, 1.0, 1.0], "labels": {"background": 0, "liver": 2}}
STATS = IntensityStats(-1000, 500, 10, 50, -900, 400)


def make_case(case_id, size=(70, 40, 33), seed=0, label=True, scale=1.0, shift=0.0):
    rng = np.random.default_rng(seed)
    voxels = rng.integers(-1000, 1000, (1, *size), dtype=np.int16)
    voxels[:, :30] = -1000
    classes = (rng.random(size) > 0.9).astype(np.uint8) * 2
    affine = np.diag([1.0, 1, 1, 1])
    record = CaseRecord(
        case_id, case_id, "training", "CT", 1, size, (1.0, 1.0, 1.0), affine,
        SourceGrid(size, affine), (scale,), (shift,), f"hash {seed}", (STATS,),
        (2,) if label else None, "",
    )  # fmt: skip
    cells = tuple(-(-n // 32) for n in size)
    points = {2: np.argwhere(classes == 2)[:50].astype(np.int32)} if label else {}
    body = rng.integers(0, 256, cells).astype(np.uint8)
    return PreparedCase(record, voxels, classes if label else None, body, points)


def make_store(folder, cases, side=32):
    with StoreWriter(folder, SETTINGS) as writer:
        for case in cases:
            write_case(folder, case, {}, side)
        writer.finish(case.record.id for case in cases)
    return Store.open(folder)


@given(
    size=st.tuples(*[st.integers(1, 80)] * 3),
    side=st.sampled_from([32, 64]),
    kind=st.sampled_from(["noise", "constant", "zero", "mixed"]),
    data=st.data(),
)
def test_every_box_comes_back_exactly(tmp_path_factory, size, side, kind, data):
    rng = np.random.default_rng(0)
    array = rng.integers(-2000, 2000, size, dtype=np.int16)
    if kind != "noise":
        array[: size[0] if kind != "mixed" else size[0] // 2] = 0 if kind == "zero" else -1000
    path = tmp_path_factory.mktemp("chunks") / "a.b2nd"
    content, frame = encode(array, side)
    path.write_bytes(content)
    start = tuple(data.draw(st.integers(0, n - 1)) for n in size)
    box = tuple(data.draw(st.integers(1, n - a)) for n, a in zip(size, start, strict=True))
    window = tuple(slice(a, a + n) for a, n in zip(start, box, strict=True))
    np.testing.assert_array_equal(ChunkedFile(path, frame, "a").read(start, box), array[window])
    assert encode(array, side)[0] == content, "the same array must give the same file"


def test_plain_blosc2_opens_the_same_file(tmp_path):
    array = make_case("a").voxels
    (tmp_path / "a.b2nd").write_bytes(encode(array)[0])
    np.testing.assert_array_equal(blosc2.open(str(tmp_path / "a.b2nd"), mode="r")[:], array)


@pytest.mark.parametrize(
    ("start", "size"),
    [
        ((0, 0, 0), (71, 1, 1)),
        ((-1, 0, 0), (3, 3, 3)),
        ((69, 0, 0), (2, 1, 1)),
        ((0, 0, 0), (0, 1, 1)),
    ],
)
def test_a_box_outside_the_case_is_refused(tmp_path, start, size):
    store = make_store(tmp_path / "s", [make_case("a")])
    with pytest.raises(ValueError, match="does not lie inside"):
        store.read("a", start, size)


def test_a_case_comes_back_in_physical_units_with_all_it_had(tmp_path):
    case = make_case("a", scale=0.5, shift=100.0)
    store = make_store(tmp_path / "s", [case, make_case("b", seed=1, label=False)])
    np.testing.assert_array_equal(store.read("a"), case.voxels * np.float32(0.5) + 100)
    np.testing.assert_array_equal(store.read_label("a"), case.label)
    np.testing.assert_array_equal(
        store.read_label("a", (3, 4, 5), (6, 7, 8)), case.label[3:9, 4:11, 5:13]
    )
    record = store.record("a")
    np.testing.assert_array_equal(record.class_coordinates[2], case.coordinates[2])
    np.testing.assert_allclose(record.body, case.body / 255, atol=1e-6)
    assert store.label_names == {2: "liver"}
    assert [r.id for r in store.cases] == ["a", "b"]
    assert not store.record("b").has_label
    with pytest.raises(ValueError, match="no label"):
        store.read_label("b")
    with pytest.raises(DataError, match="E-NO-CASE"):
        store.read("c")


def test_a_store_survives_the_way_to_a_worker(tmp_path):
    store = make_store(tmp_path / "s", [make_case("a")])
    store.read("a")
    copy = pickle.loads(pickle.dumps(store))
    np.testing.assert_array_equal(copy.read("a"), store.read("a"))
    assert copy.record("a").body.shape == (3, 2, 2)


def files_of(folder):
    return sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))


def read_all(folder):
    store = Store.open(folder)
    for record in store.cases:
        store.verify(record.id)


def test_every_flipped_bit_is_caught(tmp_path):
    make_store(tmp_path / "s", [make_case("a"), make_case("b", (20, 20, 20), 1)])
    paths, rng = files_of(tmp_path / "s"), random.Random(0)
    assert len(paths) == 2 + 2 * 4
    for trial in range(100):
        path = paths[trial % len(paths)]
        whole = path.read_bytes()
        spoilt = bytearray(whole)
        spoilt[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        path.write_bytes(spoilt)
        with pytest.raises(DataError, match="E-STORE"):
            read_all(tmp_path / "s")
        path.write_bytes(whole)
    read_all(tmp_path / "s")


@pytest.mark.parametrize("damage", ["delete", "cut", "empty", "grow"])
def test_every_file_that_is_gone_or_of_another_length_is_caught(tmp_path, damage):
    make_store(tmp_path / "s", [make_case("a"), make_case("b", seed=1)])
    for path in files_of(tmp_path / "s"):
        whole = path.read_bytes()
        if damage == "delete":
            path.unlink()
        else:
            path.write_bytes({"cut": whole[:-1], "empty": b"", "grow": whole + b"\0"}[damage])
        with pytest.raises(DataError, match="E-"):
            read_all(tmp_path / "s")
        path.write_bytes(whole)
    read_all(tmp_path / "s")


@pytest.mark.parametrize("suffix", [".b2nd", ".seg.b2nd", ".npz", ".json"])
def test_files_exchanged_between_two_cases_are_caught(tmp_path, suffix):
    make_store(tmp_path / "s", [make_case("a"), make_case("b", seed=1)])
    one, two = (case_path(tmp_path / "s", name, suffix) for name in "ab")
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)
    with pytest.raises(DataError, match="E-STORE-DAMAGED: case a"):
        Store.open(tmp_path / "s").verify("a")


def test_damage_names_the_case_and_the_chunk(tmp_path):
    make_store(tmp_path / "s", [make_case("a")])
    path = case_path(tmp_path / "s", "a", ".b2nd")
    frame = read_record(tmp_path / "s", "a")["files"]["image"]
    spoilt = bytearray(path.read_bytes())
    spoilt[frame["head"] + frame["data"] - 5] ^= 1
    path.write_bytes(spoilt)
    store = Store.open(tmp_path / "s")
    store.read("a", (0, 0, 0), (8, 8, 8))  # another chunk, intact
    with pytest.raises(
        DataError, match=r"case a: its chunk 11 was altered.*prepare this case again"
    ):
        store.read("a")


def test_a_file_cut_or_gone_after_it_was_opened_is_an_error_never_a_fill_value(tmp_path):
    store = make_store(tmp_path / "s", [make_case("a")])
    store.read("a", (0, 0, 0), (8, 8, 8))
    path = case_path(tmp_path / "s", "a", ".b2nd")
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(DataError, match=r"case a: its chunk \d+ cannot be read"):
        store.read("a")
    path.unlink()
    with pytest.raises(DataError, match=r"case a: its file cannot be read \(No such file"):
        store.read("a")


def test_a_store_that_is_absent_unfinished_or_of_another_format_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"E-NO-STORE.*spark3d prepare"):
        Store.open(tmp_path)
    with StoreWriter(tmp_path / "s", SETTINGS):
        write_case(tmp_path / "s", make_case("a"), {})
    with pytest.raises(DataError, match=r"E-STORE-UNFINISHED"):
        Store.open(tmp_path / "s")


def test_a_second_writer_and_other_settings_are_refused(tmp_path):
    second = StoreWriter(tmp_path / "s", SETTINGS)
    with (
        StoreWriter(tmp_path / "s", SETTINGS),
        pytest.raises(EnvironmentProblem, match="another process"),
    ):
        second.__enter__()
    with pytest.raises(ConfigError, match=r"other settings \(spacing_mm\)"):
        StoreWriter(tmp_path / "s", {**SETTINGS, "spacing_mm": [2, 2, 2]}).__enter__()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not empty"):
        StoreWriter(tmp_path / "full", SETTINGS).__enter__()


@pytest.mark.parametrize("name", ["../up", "a/b", "", ".hidden", "ä", "a b", "x" * 200])
def test_names_that_are_no_ids_never_become_paths(tmp_path, name):
    with pytest.raises(ValueError, match="no case id"):
        case_path(tmp_path, name, ".json")


def test_a_frame_laid_out_in_another_way_is_refused_when_it_is_written():
    """The bytes of chunks are found by the frame's own fields, which must agree with the chunks."""
    content, frame = encode(np.random.default_rng(0).integers(0, 999, (70, 40, 33), np.int16), 32)
    head, spans = _layout(content)
    assert head == frame.head
    assert spans[0][0] == head
    assert sum(length for _, length in spans) == frame.data
    for offset in (14, 46, frame.head + 12):
        other = bytearray(content)
        other[offset] ^= 1
        with pytest.raises(RuntimeError, match=r"blosc2 4\.x"):
            _layout(bytes(other))


@pytest.mark.parametrize("harm", ["flip", "cut", "more"])
def test_what_the_disk_made_of_a_file_is_read_back_before_it_counts(tmp_path, monkeypatch, harm):
    """Any difference is an error, the earlier file is whole, and nothing else is left."""
    path, data = tmp_path / "a.b2nd", bytes(range(256)) * 3000
    write_atomic(path, data)

    def harmed(handle):
        if harm == "more":
            os.lseek(handle, 0, os.SEEK_END)
            os.write(handle, b"x")
        elif harm == "cut":
            os.ftruncate(handle, len(data) - 1)
        else:
            os.pwrite(handle, b"\xff", len(data) // 2)

    monkeypatch.setattr(os, "fsync", harmed)
    with pytest.raises(EnvironmentProblem, match=r"read back differs from what was written"):
        write_atomic(path, bytes(len(data)))
    assert path.read_bytes() == data
    assert [p.name for p in tmp_path.iterdir()] == ["a.b2nd"]
