"""Names, ids and dates of patients, planted wherever they can be, are in nothing that comes out."""

import gzip
import zipfile
from pathlib import Path

import numpy as np
import pytest
from dicom_files import write_series
from nifti_files import ct_like, write_nifti

from spark3d.cli import main

NAME, BORN, NUMBER, PLACE = "CANARYDOE", "19070809", "4711815", "StCanary"
CANARIES = (NAME, "Canary^", BORN, NUMBER, PLACE, "1.3.6.1.4.1.99999")
SERIES = "1.3.6.1.4.1.99999.7.1.2.3"
TINY = (
    "model.options={init_filters: 8, blocks_down: [1, 1, 1], blocks_up: [1, 1]}",
    "mask.cell_size=8", "objective.decoder_width=16", "data.crop=16", "optim.batch=2",
    "optim.steps=2", "optim.warmup=1", "compute.accelerator=cpu", "compute.threads=1",
)  # fmt: skip


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
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A series, NIfTI, NRRD and MetaImage files of one patient, canaries in names and headers."""
    root = tmp_path_factory.mktemp("planted") / "scans"
    size = (26, 24, 22)
    write_series(root / f"{NAME}^{BORN}" / SERIES, ct_like(size, 1), np.diag([2.0, 2, 2, 1]),
                 edit=plant_in_slice, series=SERIES)  # fmt: skip
    for name, seed in ((f"{NAME}, Jane {BORN}.nii.gz", 2), (f"{SERIES}.nii", 3)):
        write_nifti(root / name, ct_like(size, seed), np.diag([2.0, 2, 2, 1]), edit=plant_in_nifti)
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
        voxels = ct_like(size, seed).astype("<i2").tobytes(order="F")
        (root / f"{NAME} {suffix}.{suffix}").write_bytes(text.encode() + voxels)
    return root


def run(capfd, *words):
    """Run a command; its exit code and all it said."""
    with pytest.raises(SystemExit) as left:
        main([str(word) for word in words])
    said = capfd.readouterr()
    return left.value.code, said.out + said.err


def clean(text: bytes) -> bool:
    """No canary, whether as text or as NIfTI, TensorBoard or torch would store it."""
    folded = text.lower()
    return not any(
        canary.lower().encode(coding) in folded
        for canary in CANARIES
        for coding in ("utf-8", "utf-16-le")
    )


def contents(path: Path) -> bytes:
    """The bytes of a file; of a compressed one what is in it."""
    if path.suffix == ".npz":
        with zipfile.ZipFile(path) as members:
            return b"".join(members.read(name) for name in members.namelist())
    data = path.read_bytes()
    return gzip.decompress(data) if path.suffix == ".gz" else data


def test_the_search_finds_what_it_looks_for(planted):
    names = [str(path.relative_to(planted)) for path in planted.rglob("*") if path.is_file()]
    assert all(not clean(name.encode()) for name in names)
    files = [path for path in planted.rglob("*") if path.is_file()]
    assert all(not clean(contents(path)) for path in files)
    assert clean(b"a canary bird")


def test_nothing_of_a_patient_comes_out(planted, tmp_path, capfd, caplog):
    """prepare -> pretrain -> report: every byte of every output, every name, every line said."""
    caplog.set_level("INFO")
    steps = (
        ("prepare", "--data", planted, "--out", tmp_path / "store", "--workers", "0"),
        ("pretrain", *TINY, "--data", tmp_path / "store", "--out", tmp_path / "run"),
        ("report", tmp_path / "run", "--out", tmp_path / "report.html"),
    )
    for words in steps:
        code, said = run(capfd, *words)
        assert code == 0, said
        assert clean(said.encode()), said
    assert clean(caplog.text.encode())
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 25
    dirty = [path for path in files if not clean(contents(path)) or not clean(path.name.encode())]
    assert dirty == []
    assert not list(tmp_path.rglob("*CANARY*"))


def test_nor_where_every_file_is_damaged(planted, tmp_path, capfd):
    """Errors name cases, not files or headers."""
    root = tmp_path / "scans"
    for path in planted.rglob("*"):
        if path.is_file():
            target = root / path.relative_to(planted)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes()[:-3000])
    for words in (
        ("doctor", root, "--out", tmp_path / "doctor.json", "--workers", "0"),
        ("prepare", "--data", root, "--out", tmp_path / "store", "--workers", "0"),
        ("pretrain", *TINY, "--data", root, "--out", tmp_path / "run"),
    ):
        code, said = run(capfd, *words)
        assert code == 3, said
        assert "E-TRUNCATED" in said
        assert clean(said.encode()), said
    outputs = [p for p in tmp_path.rglob("*") if p.is_file() and root not in p.parents]
    assert outputs
    assert [path for path in outputs if not clean(contents(path))] == []
