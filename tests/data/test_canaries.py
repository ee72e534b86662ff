"""Names, ids and dates of patients, planted wherever they can be, are in nothing that comes out."""

import gzip
import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from dicom_files import write_series
from nifti_files import ct_like, write_nifti

from spark3d.cli import main

NAME, BORN, NUMBER, PLACE = "CANARYDOE", "19070809", "4711815", "StCanary"
SERIES = "1.3.6.1.4.1.99999.7.1.2.3"
PLAIN = "plaindoe"
"""In a folder's name that could be an id: it is kept from files, though a message may show it."""
CANARIES = (NAME, "Canary^", BORN, NUMBER, PLACE, "1.3.6.1.4.1.99999")
SIZE, AFFINE = (26, 24, 22), np.diag([2.0, 2, 2, 1])
NETWORK = (
    "model.options={init_filters: 8, blocks_down: [1, 1, 1], blocks_up: [1, 1]}", "data.crop=16",
    "optim.batch=2", "optim.steps=2", "optim.warmup=1", "compute.accelerator=cpu",
    "compute.threads=1",
)  # fmt: skip
TINY = (*NETWORK, "mask.cell_size=8", "objective.decoder_width=16")


def plant_in_slice(ds, k):
    """Everything of a patient that such a header may hold."""
    ds.PatientName, ds.PatientID, ds.PatientBirthDate = f"{NAME}^Canary^", NUMBER, BORN
    ds.StudyDate = ds.SeriesDate = ds.ContentDate = BORN
    ds.AccessionNumber, ds.InstitutionName = NUMBER, PLACE
    ds.StudyDescription = ds.SeriesDescription = ds.ImageComments = f"{NAME} {BORN}"
    ds.ReferringPhysicianName, ds.StationName = f"{PLACE}^Canary^", PLACE
    ds.add_new(0x00091001, "LO", f"{NAME} private")


def plant_in_nifti(raw):
    """In descrip, aux_file, db_name, intent_name and the unused fields before them."""
    for offset, size in ((148, 80), (228, 24), (14, 18), (328, 16), (4, 10)):
        raw[offset : offset + size] = f"{NAME} {BORN}".encode()[:size].ljust(size, b"\0")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the user keeps the scans of one patient, in folders called after her."""
    return tmp_path_factory.mktemp("canaries") / PLAIN / f"{NAME}, Jane {BORN}"


@pytest.fixture(scope="module")
def planted(home: Path) -> Path:
    """A series, NIfTI, NRRD and MetaImage files of one patient, canaries in names and headers."""
    root = home / "scans"
    write_series(root / f"{NAME}^{BORN}" / SERIES, ct_like(SIZE, 1), AFFINE,
                 edit=plant_in_slice, series=SERIES)  # fmt: skip
    for name, seed in ((f"{NAME}, Jane {BORN}.nii.gz", 2), (f"{SERIES}.nii", 3)):
        write_nifti(root / name, ct_like(SIZE, seed), AFFINE, edit=plant_in_nifti)
    texts = {
        "nrrd": (
            f"NRRD0004\n# {NAME}\ncontent: {NAME}\ntype: short\ndimension: 3\nspace: RAS\n"
            "sizes: 26 24 22\nspace directions: (2,0,0) (0,2,0) (0,0,2)\nendian: little\n"
            f"encoding: raw\nspace origin: (0,0,0)\npatient:={NAME} {BORN}\n\n"
        ),
        "mha": (
            f"ObjectType = Image\nNDims = 3\nComment = {NAME}\nPatientID = {NUMBER}\n"
            "BinaryData = True\nBinaryDataByteOrderMSB = False\nCompressedData = False\n"
            "TransformMatrix = 1 0 0 0 1 0 0 0 1\nOffset = 0 0 0\nElementSpacing = 2 2 2\n"
            "DimSize = 26 24 22\nElementType = MET_SHORT\nElementDataFile = LOCAL\n"
        ),
    }
    for seed, (suffix, text) in enumerate(texts.items(), start=4):
        voxels = ct_like(SIZE, seed).astype("<i2").tobytes(order="F")
        (root / f"{NAME} {suffix}.{suffix}").write_bytes(text.encode() + voxels)
    return root


@pytest.fixture(scope="module")
def labelled(home: Path) -> Path:
    """A task of the same patient: names in files and in `dataset.json`, headers of labels too."""
    root, entries = home / "labelled", []
    label = np.zeros(SIZE, np.uint8)
    label[8:16, 8:16, 8:16] = 1
    for n in range(3):
        name = f"{NAME}, {BORN} {n}.nii.gz"
        write_nifti(root / "imagesTr" / name, ct_like(SIZE, 10 + n), AFFINE, edit=plant_in_nifti)
        write_nifti(root / "labelsTr" / name, label, AFFINE, edit=plant_in_nifti)
        entries.append({"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"})
    description = {
        "name": NAME, "description": f"{NAME} {BORN}", "reference": PLACE, "modality": {"0": "CT"},
        "labels": {"0": "background", "1": "liver"}, "training": entries[:2],
        "validation": entries[2:],
    }  # fmt: skip
    (root / "dataset.json").write_text(json.dumps(description))
    return root


def run(capfd, *words):
    """Run a command; its exit code and all it said."""
    with pytest.raises(SystemExit) as left:
        main([str(word) for word in words])
    said = capfd.readouterr()
    return left.value.code, said.out + said.err


def clean(text: bytes, canaries: tuple[str, ...] = CANARIES) -> bool:
    """No canary, whether as text or as NIfTI, TensorBoard or torch would store it."""
    folded = text.lower()
    return not any(
        canary.lower().encode(coding) in folded
        for canary in canaries
        for coding in ("utf-8", "utf-16-le")
    )


def contents(path: Path) -> bytes:
    """The bytes of a file; of a compressed one what is in it, too."""
    data = path.read_bytes()
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as members:
            return data + b"".join(members.read(name) for name in members.namelist())
    return gzip.decompress(data) if path.suffix == ".gz" else data


def dirty(folder: Path) -> list[Path]:
    """Files with a canary in their name or content, that of a plain folder's name included."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    return [
        path
        for path in files
        if not clean(contents(path), (*CANARIES, PLAIN))
        or not clean(str(path.relative_to(folder)).encode())
    ]


def test_the_search_finds_what_it_looks_for(planted, labelled):
    for root in (planted, labelled):
        files = [path for path in root.rglob("*") if path.is_file()]
        assert all(not clean(contents(path)) for path in files)
        names = [str(path.relative_to(root)) for path in files if path.name != "dataset.json"]
        assert all(not clean(name.encode()) for name in names)
    assert clean(b"a canary bird")
    assert not clean(f"/data/{PLAIN}/scans".encode(), (PLAIN,))


def test_nothing_of_a_patient_comes_out(planted, labelled, tmp_path, capfd, caplog, monkeypatch):
    """Every command: every byte of every output, every name of a file, every line said."""
    caplog.set_level("INFO")
    out = tmp_path / "out"
    out.mkdir()
    folds = planted.parent / "folds.json"
    words = ("--data", out / "task", "--out", out / "other")
    steps: tuple[tuple[str | Path, ...], ...] = (
        ("doctor", planted, "--out", out / "doctor.json", "--workers", "0"),
        ("prepare", "--data", planted, "--out", out / "store", "--workers", "0"),
        ("pretrain", *TINY, "--data", out / "store", "--out", out / "pre"),
        ("prepare", "--data", labelled, "--out", out / "task", "--workers", "0"),
        ("finetune", *NETWORK, "--data", out / "task", "--out", out / "fine",
         "--encoder", out / "pre"),
        ("predict", "--data", labelled, "--out", out / "predictions", "--model", out / "fine",
         "--section", "validation"),
        ("evaluate", "--predictions", out / "predictions", "--references", labelled,
         "--out", out / "scores", "--pages", "--legacy"),
        ("predict", "--data", planted, "--out", out / "more", "--model", out / "fine"),
        ("finetune", *NETWORK, *words, "split.use=named", f"split.name={folds}",
         "model.backbone=monai/segresnet"),
        ("label-efficiency", *NETWORK, "--data", out / "task", "--encoder", out / "pre",
         "--labels", "1", "--subsets", "1", "--volumes", labelled, "--out", out / "study"),
        ("report", out / "pre", out / "fine", out / "other", out / "scores",
         "--out", out / "report.html"),
        ("export", out / "fine", "--to", "bundle", "--out", out / "bundle"),
        ("export", out / "fine", "--to", "exported", "--out", out / "exported"),
        ("export", out / "fine", "--to", "onnx", "--out", out / "onnx"),
    )  # fmt: skip
    for step in steps:
        if f"split.name={folds}" in step:
            ids = [p.stem for p in (out / "task").glob("cases/*/*.json")]
            folds.write_text(json.dumps({"train": ids[:2], "validation": ids[2:]}))
        monkeypatch.setattr("sys.argv", ["spark3d", *map(str, step)])
        code, said = run(capfd, *step)
        assert code == 0, said
        assert clean(said.encode()), said
    assert clean(caplog.text.encode())
    assert len(list(out.rglob("*"))) > 60
    assert dirty(out) == []
    records = [json.loads((out / run / "run.json").read_text()) for run in ("pre", "fine")]
    assert all("--data DATA" in " ".join(record["command"]) for record in records)


def test_nor_where_every_file_is_damaged(planted, tmp_path, capfd):
    """Errors name cases, not files or headers."""
    root = tmp_path / PLAIN / f"{NAME} {BORN}" / "scans"
    for path in planted.rglob("*"):
        if path.is_file():
            target = root / path.relative_to(planted)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes()[:-3000])
    out = tmp_path / "out"
    for words in (
        ("doctor", root, "--out", out / "doctor.json", "--workers", "0"),
        ("prepare", "--data", root, "--out", out / "store", "--workers", "0", "--max-bad", "9"),
        ("prepare", "--data", root, "--out", out / "none", "--workers", "0", "--spacing", "2"),
        ("pretrain", *TINY, "--data", root, "--out", out / "run"),
    ):
        out.mkdir(exist_ok=True)
        code, said = run(capfd, *words)
        assert code == 3, said
        assert "E-TRUNCATED" in said
        assert clean(said.encode()), said
    assert dirty(out) == []
    assert [p.name for p in out.iterdir()] == ["doctor.json"], "no store without a case, no run"


def test_nor_where_a_series_is_damaged_or_files_are_absent(labelled, tmp_path, capfd):
    """In folders whose names could be ids: a message may show them, the file that stays may not."""
    scans, out = tmp_path / PLAIN / "in", tmp_path / "out"
    write_series(scans / PLAIN, ct_like(SIZE, 1), AFFINE)
    slices = sorted((scans / PLAIN).iterdir())
    slices[3].write_bytes(slices[3].read_bytes()[:-9])
    task = tmp_path / PLAIN / "task"
    shutil.copytree(labelled, task)
    next((task / "labelsTr").iterdir()).unlink()
    for root, code in ((scans, "E-TRUNCATED"), (task, "E-MISSING-FILE")):
        out.mkdir(exist_ok=True)
        left, said = run(
            capfd, "doctor", root, "--out", out / f"{root.name}.json", "--workers", "0"
        )
        assert left == 3, said
        assert clean(said.encode()), said
        assert code in (out / f"{root.name}.json").read_text()
    assert dirty(out) == []
    assert json.loads((out / "task.json").read_text())["fault"] == (
        "E-MISSING-FILE: the folder: expected every listed file; restore them, or take them off "
        "the list"
    )
