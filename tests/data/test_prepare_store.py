"""Preparing: voxels in their place, each case accounted for, and nothing done twice."""

import contextlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from datasets import decathlon, label_like, snapshot
from hypothesis import example, given, settings
from hypothesis import strategies as st
from nifti_files import DEFAULT, ct_like, rotation, signed_permutation, write_nifti

from spark3d.data import prepare as preparing
from spark3d.data.case import content_hash, guess_modality
from spark3d.data.geometry import resample_onto
from spark3d.data.io import read_volume
from spark3d.data.prepare import (
    PrepareReport,
    PrepareSpec,
    finalize,
    prepare,
    refuse_too_many,
)
from spark3d.data.record import sealed
from spark3d.data.sources import CaseSource, find_cases
from spark3d.data.store import Store, case_path
from spark3d.errors import ConfigError, DataError

SPEC = PrepareSpec(spacing_mm=(2.5, 2.0, 3.0))


@pytest.fixture
def source(tmp_path):
    return decathlon(tmp_path / "data")


def test_every_case_is_stored_with_its_section_and_label(source, tmp_path):
    seen = []
    report = prepare(
        find_cases(source), tmp_path / "s", SPEC, progress=lambda *args: seen.append(args)
    )
    assert report.total == len(report.written) == 6
    assert [done for done, _, _ in seen] == [1, 2, 3, 4, 5, 6]
    store = Store.open(tmp_path / "s")
    assert {r.section for r in store.cases} == {"training", "validation", "unlabelled"}
    assert sum(r.has_label for r in store.cases) == 4
    record = store.record("pt_0")
    assert record.spacing_mm == pytest.approx((2.5, 2.0, 3.0))
    assert record.labels == (1, 2)
    assert record.modality == "CT"
    points = record.class_coordinates
    label = store.read_label("pt_0")
    for value in (1, 2):
        assert len(points[value]) == (label == value).sum()
        assert (label[tuple(points[value].T)] == value).all()


def test_a_second_run_writes_nothing(source, tmp_path):
    prepare(find_cases(source), tmp_path / "s", SPEC)
    before = snapshot(tmp_path / "s")
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "s").rglob("*") if p.is_file()}
    report = prepare(find_cases(source), tmp_path / "s", SPEC)
    assert len(report.skipped) == report.total == 6
    assert snapshot(tmp_path / "s") == before
    times_after = {p: p.stat().st_mtime_ns for p in times if not p.name.startswith(".lock")}
    assert times_after == {p: t for p, t in times.items() if p in times_after}


def test_processes_give_the_same_store_as_none(source, tmp_path):
    prepare(find_cases(source), tmp_path / "one", SPEC)
    report = prepare(find_cases(source), tmp_path / "two", SPEC, workers=2)
    assert len(report.written) == 6
    assert snapshot(tmp_path / "one") == snapshot(tmp_path / "two")


def test_shares_and_their_end_give_the_same_cases_as_one_run(source, tmp_path):
    cases = find_cases(source)
    prepare(cases, tmp_path / "one", SPEC)
    prepare(cases, tmp_path / "parts", SPEC, shard=(0, 2))
    with pytest.raises(DataError, match="E-STORE-UNFINISHED"):
        Store.open(tmp_path / "parts")
    with pytest.raises(DataError, match=r"E-SHARDS.*\[1\] of 2"):
        finalize(tmp_path / "parts")
    prepare(cases, tmp_path / "parts", SPEC, shard=(1, 2))
    assert finalize(tmp_path / "parts") == 6
    shutil.rmtree(tmp_path / "parts" / "shards")
    assert snapshot(tmp_path / "one") == snapshot(tmp_path / "parts")


def test_only_what_changed_is_prepared_again(source, tmp_path):
    prepare(find_cases(source), tmp_path / "s", SPEC)
    before = snapshot(tmp_path / "s")
    os.utime(source / "imagesTr" / "pt_0.nii.gz")  # another time, the same content
    assert prepare(find_cases(source), tmp_path / "s", SPEC).written == []
    write_nifti(source / "imagesTr" / "pt_1.nii.gz", ct_like(seed=77))
    case_path(tmp_path / "s", "pt_2", ".b2nd").unlink()
    assert prepare(find_cases(source), tmp_path / "s", SPEC).written == ["pt_1", "pt_2"]
    after = snapshot(tmp_path / "s")
    changed = {name for name in before if before[name] != after[name]}
    assert {"pt_1" in n or n == "index.json" for n in changed} == {True}


def test_a_voxel_hash_sees_voxels_and_labels_and_not_the_copy_they_came_from(source, tmp_path):
    def hashes(name):
        prepare(find_cases(source), tmp_path / name, SPEC)
        store = Store.open(tmp_path / name)
        return {record.id: store.voxel_hash(record.id) for record in store.cases}

    before = hashes("one")
    assert len(set(before.values())) == 6
    for file in source.glob("*Tr/*.nii.gz"):
        os.utime(file)
    assert hashes("copy") == before
    corrected = label_like()
    corrected[5:8] = np.where(corrected[5:8], 2, 0)
    write_nifti(source / "labelsTr" / "pt_0.nii.gz", corrected)
    write_nifti(source / "imagesTr" / "pt_1.nii.gz", ct_like(seed=77))
    after = hashes("one")
    assert {case for case in before if before[case] != after[case]} == {"pt_0", "pt_1"}


def test_other_settings_are_refused(source, tmp_path):
    prepare(find_cases(source), tmp_path / "s", SPEC)
    with pytest.raises(ConfigError, match="spacing_mm"):
        prepare(find_cases(source), tmp_path / "s", PrepareSpec(spacing_mm=(1, 1, 1)))


def test_the_automatic_spacing_is_the_median_and_stays(tmp_path):
    for n, z in enumerate((2.0, 3.0, 5.0)):
        write_nifti(tmp_path / "d" / f"{n}.nii", ct_like(seed=n), np.diag([2, 2, z, 1]))
    report = prepare(find_cases(tmp_path / "d"), tmp_path / "s")
    assert report.spacing_mm == (2, 2, 3)
    write_nifti(tmp_path / "d" / "3.nii", ct_like(seed=9), np.diag([2, 2, 5.0, 1]))
    again = prepare(find_cases(tmp_path / "d"), tmp_path / "s")
    assert (again.spacing_mm, again.written, len(again.skipped)) == ((2, 2, 3), ["3"], 3)


@pytest.mark.parametrize(
    ("array", "code"),
    [
        (np.full((20, 18, 12), 7, np.int16), "E-CONSTANT"),
        (np.where(ct_like() > -900, -700, -1000).astype(np.int16), "E-NO-BODY"),
        (np.where(ct_like() > -900, 40000, -1000).astype(np.int32), "E-HU-RANGE"),
    ],
)
def test_volumes_without_an_image_are_left_out_by_name(source, tmp_path, array, code):
    write_nifti(source / "imagesUn" / "un_1.nii.gz", array)
    report = prepare(find_cases(source), tmp_path / "s", SPEC, max_bad=1)
    assert list(report.failed) == ["un_1"]
    assert report.failed["un_1"].startswith(f"{code}: un_1")
    assert report.total == 6 == len(report.written) + 1
    assert len(Store.open(tmp_path / "s")) == 5


def test_bad_cases_are_counted_and_stop_the_store_unless_accepted(source, tmp_path):
    (source / "imagesTr" / "pt_1.nii.gz").write_bytes(b"")
    write_nifti(source / "labelsTr" / "pt_2.nii.gz", label_like(), np.diag([2, 1.5, 9, 1]))
    with pytest.raises(DataError, match=r"E-TOO-MANY-BAD.*--max-bad 2") as caught:
        prepare(find_cases(source), tmp_path / "s", SPEC)
    assert "E-NOT-GZIP" in str(caught.value)
    assert "E-LABEL-AFFINE: pt_2" in str(caught.value)
    with pytest.raises(DataError, match="E-STORE-UNFINISHED"):
        Store.open(tmp_path / "s")

    report = prepare(find_cases(source), tmp_path / "s", SPEC, max_bad=2)
    assert (len(report.skipped), sorted(report.failed), report.written) == (4, ["pt_1", "pt_2"], [])
    account = json.loads((tmp_path / "s" / "report" / "prepare.json").read_text())
    assert account["total"] == 6 == len(account["kept"]) + len(account["failed"])
    assert str(source) not in json.dumps(account)


@pytest.mark.parametrize(
    ("plain", "labelled", "bad_plain", "bad_labelled", "accepted"),
    [(100, 0, 1, 0, True), (99, 0, 1, 0, False), (250, 9, 2, 0, True), (250, 9, 0, 1, False)],
)
def test_one_unlabelled_case_in_a_hundred_may_be_bad_and_no_labelled_one(
    plain, labelled, bad_plain, bad_labelled, accepted
):
    cases = [CaseSource(f"u{n}", Path("x")) for n in range(plain)]
    cases += [CaseSource(f"l{n}", Path("x"), Path("y")) for n in range(labelled)]
    failed = [f"u{n}" for n in range(bad_plain)] + [f"l{n}" for n in range(bad_labelled)]
    report = PrepareReport(failed=dict.fromkeys(failed, "E-NAN"))
    with contextlib.nullcontext() if accepted else pytest.raises(DataError, match="E-TOO-MANY"):
        refuse_too_many(report, cases, None, Path("out"))


@settings(max_examples=30, deadline=None)
@given(
    plain=st.sampled_from([3, 120, 250]),
    labelled=st.integers(0, 4),
    bad=st.sets(st.integers(0, 253), max_size=4),
    n_shares=st.integers(1, 5),
    max_bad=st.none() | st.integers(0, 4),
)
@example(plain=120, labelled=0, bad={7}, n_shares=5, max_bad=None)
@example(plain=3, labelled=0, bad={0, 1}, n_shares=5, max_bad=1)
def test_shares_accept_as_many_bad_cases_as_one_run(
    tmp_path_factory, plain, labelled, bad, n_shares, max_bad
):
    folder = tmp_path_factory.mktemp("shares")
    image, label = folder / "i.nii", folder / "l.nii"
    image.touch()
    label.touch()
    cases = [CaseSource(f"l{n}", image, label) for n in range(labelled)]
    cases += [CaseSource(f"u{n}", image) for n in range(plain)]
    failing = {case.id for n, case in enumerate(cases) if n in bad}

    def accepted(*steps):
        try:
            for step in steps:
                step()
        except DataError:
            return False
        return True

    def share(n):
        return lambda: prepare(cases, folder / "s", SPEC, max_bad=max_bad, shard=(n, n_shares))

    with pytest.MonkeyPatch.context() as patch:  # nothing is read or stored
        patch.setattr(
            preparing, "run_jobs",
            lambda jobs, *_: [(job, "E-NAN" if job.case.id in failing else None) for job in jobs],
        )  # fmt: skip
        patch.setattr(preparing, "_duplicates", lambda *_: [])
        patch.setattr(preparing, "_end", lambda *_: None)
        whole = accepted(lambda: prepare(cases, folder / "w", SPEC, max_bad=max_bad))
        parts = [share(n) for n in range(n_shares)]
        assert accepted(*parts, lambda: finalize(folder / "s", max_bad)) == whole


@given(data=st.data(), before=st.integers(1, 5), n_shares=st.integers(1, 5))
def test_shares_of_another_count_or_list_do_not_count(tmp_path_factory, data, before, n_shares):
    """A count that was given up is no dead end; a case that came meanwhile is not lost."""
    folder = tmp_path_factory.mktemp("shares")
    image = folder / "a.nii"
    image.touch()
    cases = [CaseSource(f"u{n}", image) for n in range(9)]
    late = data.draw(st.sets(st.integers(0, n_shares - 1), min_size=1))
    with pytest.MonkeyPatch.context() as patch:  # nothing is read or stored
        patch.setattr(preparing, "run_jobs", lambda jobs, *_: [(job, None) for job in jobs])
        patch.setattr(preparing, "_duplicates", lambda *_: [])
        patch.setattr(preparing, "_end", lambda *_: None)
        for n in data.draw(st.sets(st.integers(0, before - 1))):
            prepare(cases, folder / "s", SPEC, shard=(n, before))
        for n in range(n_shares):
            prepare(cases[: 8 + (n in late)], folder / "s", SPEC, shard=(n, n_shares))
        if len(late) < n_shares:
            with pytest.raises(DataError, match=r"E-SHARDS.*\(8 or 9 cases\).*every share again"):
                finalize(folder / "s")
            for n in range(n_shares):
                prepare(cases, folder / "s", SPEC, shard=(n, n_shares))
        assert finalize(folder / "s") == 9


def test_shares_of_an_earlier_version_are_run_again(source, tmp_path):
    """Their outcome does not tell how many labelled cases they had."""
    cases = find_cases(source)
    prepare(cases, tmp_path / "s", SPEC, shard=(0, 1))
    path = tmp_path / "s" / "shards" / "0-of-1.json"
    outcome = json.loads(path.read_text())
    path.write_bytes(sealed({k: v for k, v in outcome.items() if "labelled" not in k}))
    with pytest.raises(DataError, match=r"E-SHARDS.*run every share again"):
        finalize(tmp_path / "s")
    assert prepare(cases, tmp_path / "s", SPEC, shard=(0, 1)).written == []
    assert finalize(tmp_path / "s") == 6


def test_the_same_voxels_in_two_cases_are_reported(source, tmp_path):
    shutil.copy(source / "imagesTr" / "pt_0.nii.gz", source / "imagesUn" / "un_0.nii.gz")
    assert prepare(find_cases(source), tmp_path / "s", SPEC).duplicates == [["pt_0", "un_0"]]


def test_labels_outside_the_declared_are_left_out(source, tmp_path):
    spec = PrepareSpec(spacing_mm=SPEC.spacing_mm, labels={"background": 0, "liver": 1})
    with pytest.raises(DataError, match="E-LABEL-RANGE"):
        prepare(find_cases(source), tmp_path / "s", spec)


@pytest.mark.parametrize("tilt", [0, 17])
def test_stored_voxels_lie_where_they_were_and_labels_go_back(tmp_path, tilt):
    affine = np.eye(4)
    turn = rotation(tilt, 1) @ signed_permutation((2, 0, 1), (-1, 1, -1))
    affine[:3, :3] = turn * [1.1, 0.9, 1.4]
    affine[:3, 3] = 40, -60, 25
    size = (40, 44, 36)
    image, label = ct_like(size), np.zeros(size, np.uint8)
    label[10:30, 12:32, 10:28] = 1
    write_nifti(tmp_path / "i.nii", image, affine)
    write_nifti(tmp_path / "l.nii", label, affine)
    case = CaseSource("c", tmp_path / "i.nii", tmp_path / "l.nii")
    prepare([case], tmp_path / "s", PrepareSpec(spacing_mm=(1.5, 1.5, 2.0)))
    store = Store.open(tmp_path / "s")
    record = store.record("c")

    stored = store.read_label("c")
    centre = record.affine @ [*np.argwhere(stored).mean(0), 1]
    np.testing.assert_allclose(centre, affine @ [*np.argwhere(label).mean(0), 1], atol=0.3)
    assert np.prod(record.size) < 0.8 * np.prod(size), "air around the body is stored"
    back = resample_onto(stored, record.affine, record.source.size, record.source.affine, True)
    assert back.shape == size
    assert 2 * (back & label).sum() / (back.sum() + label.sum()) > 0.9


def test_air_is_cropped_but_no_label_is_cut(tmp_path):
    image, label = ct_like(), np.zeros((20, 18, 12), np.uint8)
    label[0, 0, 0] = 1  # outside the body
    write_nifti(tmp_path / "i.nii", image)
    write_nifti(tmp_path / "l.nii", label)
    case = CaseSource("c", tmp_path / "i.nii", tmp_path / "l.nii")
    spec = PrepareSpec(spacing_mm=(2, 1.5, 3), margin=0)
    prepare([case], tmp_path / "s", spec)
    store = Store.open(tmp_path / "s")
    assert store.record("c").size == (17, 15, 10)
    assert store.read_label("c").sum() == 1
    body = store.record("c").body
    assert body[0, 0, 0] == pytest.approx(14 * 12 * 8 / (17 * 15 * 10), abs=0.01)


def test_several_files_and_a_fourth_axis_are_channels(tmp_path):
    one, two = ct_like(), ct_like(seed=1)
    write_nifti(tmp_path / "a.nii", one)
    write_nifti(tmp_path / "b.nii", two)
    write_nifti(tmp_path / "ab.nii", np.stack([one, two], 3))
    cases = [
        CaseSource("files", tmp_path / "a.nii", more_channels=(tmp_path / "b.nii",)),
        CaseSource("axis", tmp_path / "ab.nii"),
    ]
    spec = PrepareSpec(spacing_mm=(2, 1.5, 3), fourth_axis=True)
    prepare(cases, tmp_path / "s", spec)
    store = Store.open(tmp_path / "s")
    assert store.record("axis").channels == 2
    np.testing.assert_array_equal(store.read("axis"), store.read("files"))
    write_nifti(tmp_path / "b.nii", two[:-1])
    with pytest.raises(DataError, match="E-CHANNEL-SIZE"):
        prepare(cases[:1], tmp_path / "t", spec)


def test_the_content_hash_sees_voxels_only(tmp_path):
    array = ct_like()
    flipped = DEFAULT @ np.diag([-1.0, 1, 1, 1])
    paths = [
        write_nifti(tmp_path / "a.nii", array),
        write_nifti(tmp_path / "b.nii.gz", array.astype(np.float32), np.diag([5, 1, 1, 1])),
        write_nifti(tmp_path / "c.nii", array[::-1], flipped),
    ]
    hashes = [content_hash(read_volume(path).array) for path in paths]
    assert len(set(hashes)) == 1
    assert content_hash(array[None, ::-1]) != hashes[0]


def test_ct_is_recognised_by_whole_numbers_that_reach_air():
    assert guess_modality(ct_like()[None]) == "CT"
    assert guess_modality(ct_like()[None].astype(np.float32)) == "CT"
    assert guess_modality(ct_like()[None] + 0.5) == "MR"
    assert guess_modality(np.abs(ct_like())[None]) == "MR"


def test_filled_voxels_are_counted_in_the_record(source, tmp_path):
    array = ct_like().astype(np.float32)
    array[4, 4, :3] = np.nan
    write_nifti(source / "imagesUn" / "un_1.nii.gz", array)
    with pytest.raises(DataError, match="E-NAN"):
        prepare(find_cases(source), tmp_path / "s", SPEC, max_bad=0)
    prepare(find_cases(source), tmp_path / "t", PrepareSpec((2.5, 2.0, 3.0), nan_fill=-1000))
    filled = {r.id: r.filled for r in Store.open(tmp_path / "t").cases}
    assert filled["un_1"] == 3
    assert sum(filled.values()) == 3


@pytest.mark.realdata
def test_real_cases_go_there_and_back(real_data, tmp_path):
    cases = [c for c in find_cases(real_data / "openkbp") if c.section == "validation"][:3]
    prepare(cases, tmp_path / "s", PrepareSpec(spacing_mm=(4, 4, 3)))
    store = Store.open(tmp_path / "s")
    for case in cases:
        record = store.record(case.id)
        label = read_volume(case.label).array[0]
        size, affine = record.source.ras()
        back = resample_onto(store.read_label(case.id), record.affine, size, affine, True)
        assert record.labels == (1, 2, 3, 4, 5)
        agree = ((back > 0) & (label > 0)).sum() * 2 / ((back > 0).sum() + (label > 0).sum())
        assert agree > 0.88
