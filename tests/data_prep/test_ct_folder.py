"""Trees of scans as they are downloaded, in miniature, and one list of cases out of all of them."""

import json
from pathlib import Path

import numpy as np
import pytest
from dicom_files import write_series
from hypothesis import given
from hypothesis import strategies as st
from nifti_files import DEFAULT, ct_like, write_nifti
from rich.console import Console
from scripts import script
from test_msd import SIZE, label_like

from data_prep.ct_folder import main
from spark3d.commands.prepare import prepare_command
from spark3d.data.case_list import read_case_list
from spark3d.data.folders import place
from spark3d.data.io import read_volume
from spark3d.data.sources import find
from spark3d.data.store import Store
from spark3d.errors import DataError

CONFIG, DATA = 2, 3
UID = "1.3.6.1.4.1.14519.5.2.1.6279.6001.{}"


def tcia(root: Path) -> Path:
    """Collection/patient/study/series/1-001.dcm, with a licence and a list beside."""
    for patient, number in (("LIDC-IDRI-0001", 1), ("LIDC-IDRI-0002", 2)):
        study = root / "LIDC-IDRI" / patient / "01-01-2000-NA-NA-30178"

        def of_patient(ds, k, patient=patient):
            ds.PatientID = ds.PatientName = patient

        for part in range(number):
            series = study / f"3000566.00000{part}-NA-03192"
            uid = UID.format(f"{number}.{part}")
            array = ct_like((14, 12, 8), seed=10 * number + part)
            write_series(series, array, series=uid, edit=of_patient)
            (series / "LICENSE").write_text("Attribution 3.0")
    (root / "metadata.csv").write_text("Series UID,Collection\n")
    return root


def luna(root: Path) -> Path:
    """subset0/UID.mhd with its .raw, lung masks of the same names, lists of nodules."""
    head = (
        "ObjectType = Image\nNDims = 3\nBinaryData = True\nBinaryDataByteOrderMSB = False\n"
        "CompressedData = False\nTransformMatrix = 1 0 0 0 1 0 0 0 1\nOffset = -20 -10 -30\n"
        "CenterOfRotation = 0 0 0\nAnatomicalOrientation = RAI\nElementSpacing = 2 1.5 3\n"
        "DimSize = 12 10 8\nElementType = MET_SHORT\nElementDataFile = {}.raw\n"
    )
    for folder in ("subset0", "seg-lungs-LUNA16"):
        (root / folder).mkdir(parents=True)
        for n in (1, 2):
            name = UID.format(100 + n)
            (root / folder / f"{name}.mhd").write_text(head.format(name))
            voxels = ct_like(SIZE, seed=50 + n)
            (root / folder / f"{name}.raw").write_bytes(voxels.tobytes(order="F"))
    (root / "annotations.csv").write_text("seriesuid,coordX\n")
    return root


def flare(root: Path) -> Path:
    for n in (1, 2, 3):
        write_nifti(root / "images" / f"FLARE22_Tr_{n:04d}_0000.nii.gz", ct_like(SIZE, 60 + n))
        write_nifti(root / "labels" / f"FLARE22_Tr_{n:04d}.nii.gz", label_like())
    return root


def amos(root: Path) -> Path:
    """With `dataset.json`, CT and MR under one modality, labels of three parts."""
    lists: dict[str, list] = {"training": [], "validation": [], "test": []}
    cases = ((1, "Tr"), (507, "Tr"), (8, "Va"), (9, "Ts"))
    for number, part in cases:
        name = f"amos_{number:04d}.nii.gz"
        write_nifti(root / f"images{part}" / name, ct_like(SIZE, 70 + number))
        entry = {"image": f"./images{part}/{name}"}
        if part != "Ts":
            write_nifti(root / f"labels{part}" / name, label_like())
            entry["label"] = f"./labels{part}/{name}"
        lists[{"Tr": "training", "Va": "validation", "Ts": "test"}[part]].append(entry)
    labels = {"0": "background", "1": "spleen", "2": "right kidney"}
    data = {"name": "AMOS", "modality": {"0": "CT"}, "labels": labels, "numValidation": 1, **lists}
    (root / "dataset.json").write_text(json.dumps(data))
    return root


def totalsegmentator(root: Path) -> Path:
    for n in (0, 11):
        write_nifti(root / f"s{n:04d}" / "ct.nii.gz", ct_like(SIZE, 80 + n))
        for organ in ("liver", "spleen"):
            write_nifti(root / f"s{n:04d}" / "segmentations" / f"{organ}.nii.gz", label_like())
    (root / "meta.csv").write_text("image_id;age;gender\ns0000;60;m\n")
    return root


TREES = {"tcia": tcia, "luna": luna, "flare": flare, "amos": amos, "totalseg": totalsegmentator}
IDS = {
    "flare": ["FLARE22_Tr_0001", "FLARE22_Tr_0002", "FLARE22_Tr_0003"],
    "amos": ["amos_0001", "amos_0008", "amos_0009", "amos_0507"],
    "totalseg": ["s0000", "s0011"],
}


@pytest.fixture
def trees(tmp_path: Path) -> dict[str, Path]:
    """All five."""
    return {name: make(tmp_path / name) for name, make in TREES.items()}


@pytest.mark.parametrize(("name", "count", "patients"), [
    ("tcia", 3, 2), ("luna", 2, 2), ("flare", 3, 3), ("amos", 4, 4), ("totalseg", 2, 2),
])  # fmt: skip
def test_one_tree(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, count: int, patients: int
) -> None:
    root = TREES[name](tmp_path / name)
    before = sorted(root.rglob("*"))
    said = script(main, capsys, root, "--out", tmp_path / "cases.json")
    assert f"{count} cases of {patients} patients" in said
    found = find(tmp_path / "cases.json")
    assert found.layout == "list"
    ids = [case.id for case in found.cases]
    assert ids == IDS.get(name, ids)
    assert not [i for i in ids if "LIDC" in i or "1.3.6" in i]
    if name != "amos":
        assert {case.section for case in found.cases} == {"unlabelled"}
        assert not any(case.label for case in found.cases)
    assert sorted(root.rglob("*")) == before


def test_all_trees_make_one_store(
    trees: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "lists" / "cases.json"
    said = script(main, capsys, *trees.values(), "--skip", "amos_05*", "--out", out)
    assert "13 cases of 12 patients" in said
    assert "left out 1 cases by --skip" in said
    assert "labels are left out: the folders declare different ones" in said
    report = prepare_command(out, tmp_path / "store", workers=0, modality="CT",
                             console=Console(quiet=True))  # fmt: skip
    assert report is not None
    assert (len(report.kept), report.failed) == (13, {})
    store = Store.open(tmp_path / "store")
    assert {r.section for r in store.cases} == {"unlabelled", "validation", "test"}
    assert {r.modality for r in store.cases} == {"CT"}
    assert len({r.group for r in store.cases}) == 12
    kept = "".join(p.read_text("latin-1") for p in (tmp_path / "store").rglob("*.json"))
    assert "LIDC" not in kept
    assert UID.format(101) not in kept


def test_labels_of_one_data_set_stay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script(main, capsys, amos(tmp_path / "amos"), "--out", tmp_path / "c.json")
    found = find(tmp_path / "c.json")
    assert found.labels == {"background": 0, "spleen": 1, "right kidney": 2}
    assert [c.section for c in found.cases] == ["training", "validation", "test", "training"]
    assert [c.label is not None for c in found.cases] == [True, True, False, True]
    assert found.modality == "CT"


def test_equal_names_in_two_folders_are_told_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for n, folder in enumerate(("one", "two")):
        write_nifti(tmp_path / folder / "scan.nii.gz", ct_like(SIZE, n))
        write_nifti(tmp_path / folder / f"own{n}.nii.gz", ct_like(SIZE, 5 + n))
    script(main, capsys, tmp_path / "one", tmp_path / "two", "--out", tmp_path / "c.json")
    cases = find(tmp_path / "c.json").cases
    assert [c.id for c in cases] == ["one__scan", "own0", "own1", "two__scan"]
    assert all(c.group == c.id for c in cases)


def test_links_to_files_without_a_suffix_stay_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As DVC and the Hugging Face cache lay them out; a header finds its voxels."""
    scans, blobs = luna(tmp_path / "luna") / "subset0", tmp_path / "blobs"
    write_nifti(scans / "a.nii.gz", ct_like(SIZE))
    blobs.mkdir()
    for number, path in enumerate(sorted(scans.iterdir())):
        path.rename(blobs / f"{number:08x}")
        path.symlink_to(blobs / f"{number:08x}")
    monkeypatch.chdir(tmp_path)
    script(main, capsys, "luna", "--out", tmp_path / "lists" / "c.json")
    cases = find(tmp_path / "lists" / "c.json").cases
    assert {case.image for case in cases} == {*scans.glob("*.mhd"), *scans.glob("*.gz")}
    for case in cases:
        assert read_volume(case.image).array.size == np.prod(SIZE)


def test_a_list_written_by_hand(tmp_path: Path) -> None:
    write_nifti(tmp_path / "scans" / "a.nii.gz", ct_like(SIZE))
    write_nifti(tmp_path / "scans" / "b.nii.gz", ct_like(SIZE, 1))
    entries = [
        {"id": "a", "image": "scans/a.nii.gz", "patient": "p"},
        {"id": "b", "image": str(tmp_path / "scans" / "b.nii.gz"), "section": "test"},
    ]
    (tmp_path / "l.json").write_text(json.dumps({"format": "spark3d cases 1", "cases": entries}))
    a, b = find(tmp_path / "l.json").cases
    assert (a.group, a.section, b.group, b.section) == ("p", "unlabelled", "b", "test")


def test_channels_of_4d_files_are_said_in_the_list(tmp_path: Path) -> None:
    """The ways that the refusal of a 4D file names; there is no option for it."""
    write_nifti(tmp_path / "a.nii.gz", np.stack([ct_like(SIZE), ct_like(SIZE, 1)], -1))
    with pytest.raises(DataError, match=r'E-4D: .*"modality" in a .*"fourth_axis": true in a list'):
        read_volume(tmp_path / "a.nii.gz")
    content = {"format": "spark3d cases 1", "cases": [{"id": "a", "image": "a.nii.gz"}]}
    (tmp_path / "l.json").write_text(json.dumps({**content, "fourth_axis": True}))
    prepare_command(tmp_path / "l.json", tmp_path / "store", workers=0, console=Console(quiet=True))
    assert [record.channels for record in Store.open(tmp_path / "store").cases] == [2]


@given(section=st.sampled_from(["val", "Test", "unlabeled", "train", "", "Doe, Jane"]) | st.text())
def test_only_the_sections_that_exist_are_taken(
    tmp_path_factory: pytest.TempPathFactory, section: str
) -> None:
    """Cases meant for validation or test would be trained on, under any other name for it."""
    path = tmp_path_factory.mktemp("lists") / "l.json"
    known = ("training", "validation", "test", "unlabelled")
    cases = [{"id": one, "image": "a.nii", "section": one} for one in known]
    content = {"format": "spark3d cases 1", "cases": cases}
    path.write_text(json.dumps(content))
    assert tuple(case.section for case in read_case_list(path).cases) == known
    if section not in known:
        cases.append({"id": "b", "image": "a.nii", "section": section})
        path.write_text(json.dumps(content))
        with pytest.raises(DataError, match=r"^E-CASE-LIST: .*one of training, validation, test, "):
            read_case_list(path)


@pytest.mark.parametrize(
    "content",
    [
        "no JSON", "[]", "{}", '{"format": "other", "cases": []}',
        '{"format": "spark3d cases 1", "cases": [{"id": 1, "image": "a.nii"}]}',
        '{"format": "spark3d cases 1", "cases": [{"id": "a"}]}',
        '{"format": "spark3d cases 1", "cases": [{"id": "a", "image": "a", "lable": "b"}]}',
    ],
)  # fmt: skip
def test_other_files_are_no_lists(tmp_path: Path, content: str) -> None:
    (tmp_path / "l.json").write_text(content)
    with pytest.raises(DataError, match=r"^E-CASE-LIST: [^\n]*; expected [^\n]*; [^\n]+$"):
        read_case_list(tmp_path / "l.json")


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["scans"], CONFIG, "required: --out"),
        (["--out", "c.json"], CONFIG, "required: folders"),
        (["scans", "--out", "old.json"], CONFIG, "old.json exists"),
        (["nowhere", "--out", "c.json"], DATA, "E-NO-FOLDER"),
        (["empty", "--out", "c.json"], DATA, "E-NO-CASES"),
        (["scans", "--skip", "*", "--out", "c.json"], DATA, "E-NO-CASES"),
        (["scans", "scans", "--out", "c.json"], DATA, "E-DUPLICATE-ID"),
    ],
)
def test_mistakes(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    code: int,
    told: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_nifti(tmp_path / "scans" / "a.nii.gz", ct_like(SIZE), np.asarray(DEFAULT))
    (tmp_path / "empty").mkdir()
    (tmp_path / "old.json").write_text("{}")
    assert told in script(main, capsys, *words, code=code)
    assert not (tmp_path / "c.json").exists()


@pytest.mark.realdata
def test_real_scans(real_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """NIfTI in the layout of a task, plain NIfTI, and DICOM with a label map beside it."""
    folders = [real_data / name for name in ("openkbp", "trunk_ct", "dicom")]
    said = script(main, capsys, *folders, "--out", tmp_path / "cases.json")
    found = find(tmp_path / "cases.json")
    assert "openkbp: 237 cases (decathlon layout" in said
    assert "dicom: 2 cases (plain layout; 2 DICOM series, 0 files)" in said
    assert sorted(len(case.slices) for case in found.cases)[-2:] == [4, 20]
    assert sum(case.section == "validation" for case in found.cases) == 16


@pytest.mark.realdata
def test_a_plain_folder_of_real_scans_becomes_a_store(
    real_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Four head-and-neck CTs of OpenKBP as bare files, without the description of the task."""
    for source in sorted((real_data / "openkbp" / "imagesTr").glob("*.nii.gz"))[:4]:
        place(source, tmp_path / "scans" / source.name)
    script(main, capsys, tmp_path / "scans", "--out", tmp_path / "cases.json")
    prepare_command(tmp_path / "cases.json", tmp_path / "store", workers=0)
    store = Store.open(tmp_path / "store")
    assert len(store) == 4
    assert {record.modality for record in store.cases} == {"CT"}
    assert len({record.content_hash for record in store.cases}) == 4
