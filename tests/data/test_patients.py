"""Patients across stores, by keyed hashes: seen in pre-training, held out in fine-tuning."""

import json
from dataclasses import replace

import numpy as np
import pytest
from dicom_files import write_series
from nifti_files import write_nifti

from spark3d.commands.splitting import SplitCases, check_overlap
from spark3d.data.case_list import read_case_list, write_case_list
from spark3d.data.prepare import PrepareSpec, prepare
from spark3d.data.privacy import key_mark, patient_hash
from spark3d.data.sources import CaseSource, find
from spark3d.data.store import Store
from spark3d.errors import DataError
from spark3d.weights.passport import Passport

NUMBER = "4711815"


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("SPARK3D_ID_KEY", "a long secret of this hospital")


def test_a_patient_is_a_keyed_hash_that_compares_under_one_key_only():
    one, same, other = (patient_hash(NUMBER, key) for key in (b"key", b"key", b"yek"))
    assert one == same != other
    assert key_mark(one) != key_mark(other)
    assert key_mark(one) == key_mark(patient_hash("another", b"key"))
    assert one != patient_hash("another", b"key")
    assert NUMBER not in one
    assert key_mark("") == ""


def series_of(root, name, patient, series):
    def edit(ds, k):
        ds.PatientID = patient

    write_series(root / name, edit=edit, series=f"1.2.826.0.1.3680043.8.498.11.{series}")


def test_series_of_one_patient_in_two_stores_have_one_hash(tmp_path):
    """From a folder, from its list of cases, and in another store; never the number itself."""
    series_of(tmp_path / "a", "first", NUMBER, 1)
    series_of(tmp_path / "b", "later", NUMBER, 2)
    series_of(tmp_path / "b", "other", "9", 3)
    write_case_list(tmp_path / "list.json", find(tmp_path / "a"))
    (one,) = find(tmp_path / "a").cases
    (again,) = find(tmp_path / "list.json").cases
    assert one.patient == again.patient
    prepare(find(tmp_path / "b").cases, tmp_path / "s", PrepareSpec((2, 2, 3)))
    hashes = {record.patient for record in Store.open(tmp_path / "s").cases}
    assert len(hashes) == 2
    assert one.patient in hashes
    assert all(NUMBER.encode() not in p.read_bytes() for p in (tmp_path / "s").rglob("*.json"))


def test_slices_of_a_list_that_are_gone_are_reported(tmp_path):
    series_of(tmp_path / "a", "first", NUMBER, 1)
    write_case_list(tmp_path / "l.json", find(tmp_path / "a"))
    slices = read_case_list(tmp_path / "l.json").cases[0].slices
    for path in slices[2:4]:
        path.unlink()
    with pytest.raises(DataError, match=r"E-MISSING-FILE: .* 2 listed files absent"):
        find(tmp_path / "l.json")


def test_a_pattern_states_patients_and_a_case_alone_states_none(tmp_path):
    for name in ("p1_a", "p1_b", "p2"):
        write_nifti(tmp_path / "d" / f"{name}.nii")
    stated = {case.id: case.patient for case in find(tmp_path / "d", r"^(p\d)").cases}
    assert stated["p1_a"] == stated["p1_b"] != stated["p2"]
    assert stated["p2"], "its id is its patient's"
    assert {case.patient for case in find(tmp_path / "d").cases} == {""}
    write_case_list(tmp_path / "l.json", find(tmp_path / "d"))
    assert {case.stated for case in read_case_list(tmp_path / "l.json").cases} == {False}


def test_a_store_is_brought_up_to_date_once_patients_are_stated(tmp_path):
    for name in ("p1_a", "p2_a"):
        write_nifti(tmp_path / "d" / f"{name}.nii")
    spec = PrepareSpec((2, 2, 3))
    prepare(find(tmp_path / "d").cases, tmp_path / "s", spec)
    assert all('"patient"' not in p.read_text() for p in (tmp_path / "s").rglob("*.json"))
    cases = find(tmp_path / "d", r"^(p\d)").cases
    assert len(prepare(cases, tmp_path / "s", spec).written) == 2
    assert prepare(cases, tmp_path / "s", spec).written == []


@pytest.fixture
def parts(tmp_path):
    """Training, validation and test of one case each, of the patients 1, 2 and 3."""
    for n in (1, 2, 3):
        write_nifti(tmp_path / "d" / f"p{n}_x.nii", affine=np.diag([2.0, 1.5, 2 + n, 1]))
    prepare(find(tmp_path / "d", r"^(p\d)").cases, tmp_path / "s", PrepareSpec((2, 2, 3)))
    one, two, three = Store.open(tmp_path / "s").cases
    records = [replace(r, content_hash=str(n)) for n, r in enumerate((one, two, three))]
    return SplitCases((records[0],), (records[1],), (records[2],))


def passport(*patients, volumes=(), key="a long secret of this hospital"):
    hashes = tuple(patient_hash(name, key.encode()) for name in patients)
    return Passport("n", 3, 1, content_hashes=volumes, patient_hashes=hashes)


@pytest.mark.parametrize(
    ("patients", "said"),
    [
        (("p2",), "1 validation volumes are of patients seen in pre-training: p2_x; pre-train"),
        (("p3",), "1 test volumes are of patients seen in pre-training: p3_x; pre-train"),
    ],
)
def test_a_patient_seen_in_pretraining_is_refused_unless_allowed(parts, patients, said, caplog):
    with pytest.raises(DataError, match=f"^E-LEAK-PATIENT: {said}.*, or pass --allow-overlap$"):
        check_overlap(parts, passport("p1", *patients), allow=False)
    told = check_overlap(parts, passport("p1", *patients), allow=True)
    assert said in told["allowed"][0]
    assert said in caplog.text
    assert told["patients"]["training"] == [1, 1]
    assert told["patients"]["validation"] == [int("p2" in patients), 1]


def test_the_same_volume_is_told_once(parts):
    with pytest.raises(DataError) as caught:
        check_overlap(parts, passport("p2", volumes=("1",)), allow=False)
    assert str(caught.value).startswith("1 validation volumes were seen in pre-training: p2_x;")
    assert "E-LEAK-PATIENT" not in str(caught.value)


def test_patients_of_the_training_part_may_have_been_seen(parts):
    told = check_overlap(parts, passport("p1"), allow=False)
    assert told["allowed"] == []
    assert told["patients"] == {"training": [1, 1], "validation": [0, 1], "test": [0, 1]}


def test_hashes_of_another_key_are_not_compared_in_silence(parts, caplog):
    told = check_overlap(parts, passport("p2", key="of another hospital"), allow=False)
    assert told["patients"]["validation"] == [0, 0]
    assert "the patients of 1 of 1 validation volumes cannot be compared" in caplog.text
    assert "SPARK3D_ID_KEY" in caplog.text


def test_a_passport_without_patients_is_read_and_says_nothing_of_them(parts, caplog):
    old = json.loads(Passport("n", 3, 1, content_hashes=("9",)).to_json())
    del old["patient_hashes"]
    read = Passport.from_json(json.dumps(old))
    assert read.patient_hashes == ()
    assert "patients" not in check_overlap(parts, read, allow=False)
    assert "compared" not in caplog.text


def test_a_group_given_in_python_states_the_patient(tmp_path):
    path = write_nifti(tmp_path / "a.nii")
    prepare([CaseSource("a", path, group="P")], tmp_path / "s", PrepareSpec((2, 2, 3)))
    (record,) = Store.open(tmp_path / "s").cases
    assert record.patient == patient_hash("P", b"a long secret of this hospital")
