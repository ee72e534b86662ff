"""The catalogue of bad input as a user meets it: verdict, message and exit code of the commands.

`docs/bad-input.md` lists every row with the test that makes the fault; what other tests hold to
functions alone is held to `doctor`, `prepare` and `pretrain` here.
"""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from datasets import snapshot
from dicom_files import SERIES, SIZE, write_series
from nifti_files import DEFAULT, ct_like, dims, put, rotation, sform, write_nifti
from pydicom import dcmread
from test_nifti_faults import HEADERS, TURNED, damaged

from spark3d.cli import main
from spark3d.data.checks import corner_distance_mm
from spark3d.data.io import read_grid
from spark3d.data.record import read_record
from spark3d.data.store import Store, case_path

ROOT = Path(__file__).parents[2]


def run(capfd, *words):
    """A command's exit code and all it said, on one line."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as left:
        main([str(word) for word in words])
    said = " ".join("".join(capfd.readouterr()).split())
    assert "Traceback" not in said
    return left.value.code, said


# ---- files and headers ---------------------------------------------------------------------------

DAMAGES = {
    "cut in the middle": "E-TRUNCATED",
    "checksum only cut": "E-TRUNCATED",
    "one bit flipped": "E-DAMAGED",
    "empty": "E-NOT-GZIP",
    "error page": "E-NOT-GZIP",
    "voxels missing": "E-TRUNCATED",
}
FLOATS = {
    "not a number": (np.nan, "E-NAN"),
    "infinite": (np.inf, "E-NAN"),
    "no type holds it": (1e35, "E-RANGE"),
    "no int16 holds it": (40000.0, "E-HU-RANGE"),
}


def every_fault(root: Path) -> dict[str, str]:
    """A file of each fault, and a sound one; case id -> code."""
    write_nifti(root / "sound.nii.gz")
    codes = {}

    def named(name: str, code: str) -> Path:
        case = re.sub(r"\W+", "_", name)
        codes[case] = code
        return root / f"{case}.nii.gz"

    for name, (edit, code) in HEADERS.items():
        write_nifti(named(name, code), edit=edit)
    for name, code in DAMAGES.items():
        path = write_nifti(named(name, code))
        path.write_bytes(damaged(name, path.read_bytes()))
    for name, (value, code) in FLOATS.items():
        array = ct_like().astype(np.float32)
        array[9, 9, 6] = value
        write_nifti(named(name, code), array)
    write_nifti(named("one value", "E-CONSTANT"), np.full((20, 18, 12), 7, np.int16))
    large = write_nifti(root / "too_large.nii", edit=dims(2000, 2000, 2000))
    os.truncate(large, 352 + 2 * 2000**3)  # a file with a hole, which takes no room
    codes["too_large"] = "E-TOO-LARGE"
    return codes


def test_every_fault_of_a_file_in_one_folder(tmp_path, capfd):
    codes = every_fault(tmp_path / "in")
    words = (tmp_path / "in", "--out", tmp_path / "d.json", "--workers", "0")
    assert run(capfd, "doctor", *words)[0] == 3
    report = json.loads((tmp_path / "d.json").read_text())
    assert report["must_be_fixed"] == sorted(codes)
    for case in report["cases"]:
        (text,) = case["faults"] or ("sound: ",)
        assert text.startswith(f"{codes.get(case['id'], 'sound')}: "), text
        if case["id"] in codes:
            assert case["id"] in text
            assert re.search(": found .*; expected .*; .+", text), text
            assert "\n" not in text

    words = ("prepare", "--data", tmp_path / "in", "--workers", "0", "--spacing", "2,1.5,3")
    code, said = run(capfd, *words, "--out", tmp_path / "s")
    assert code == 3
    assert f"E-TOO-MANY-BAD: {tmp_path}/s: found {len(codes)} unusable cases of" in said
    assert all(f"{code}: " in said for code in codes.values())
    code, said = run(capfd, *words, "--out", tmp_path / "s", "--max-bad", len(codes))
    assert code == 0
    total = len(codes) + 1
    assert f"{total} cases = 0 written + 1 already there + {len(codes)} left out" in said
    assert [record.id for record in Store.open(tmp_path / "s").cases] == ["sound"]


def test_what_looks_odd_and_is_accepted(tmp_path, capfd):
    """A fourth axis of one, metres, micrometres, an oblique affine: read as they are meant."""
    root = tmp_path / "in"
    write_nifti(root / "one.nii.gz", edit=dims(20, 18, 12, 1))
    for name, unit, factor in (("m", 1, 1e-3), ("um", 3, 1e3)):
        affine = np.diag([*np.array([2.0, 1.5, 3]) * factor, 1])
        write_nifti(root / f"{name}.nii", affine=affine, edit=put("B", (123, unit)))
    oblique = DEFAULT.copy()
    oblique[:3, :3] = rotation(23, 0) @ rotation(11, 2) @ DEFAULT[:3, :3]
    write_nifti(root / "oblique.nii", affine=oblique)
    words = ("prepare", "--data", root, "--out", tmp_path / "s", "--workers", "0")
    assert run(capfd, *words)[0] == 0
    store = Store.open(tmp_path / "s")
    assert {record.id for record in store.cases} == {"one", "m", "um", "oblique"}
    for record in store.cases:
        assert record.spacing_mm == pytest.approx((2, 1.5, 3), abs=1e-3)
    source = store.record("oblique").source
    assert corner_distance_mm(source.size, source.affine, oblique) < 1e-3
    size, affine = source.ras()
    start = np.linalg.solve(affine, store.record("oblique").affine)[:3, 3]
    np.testing.assert_allclose(start, np.rint(start), atol=1e-3)
    assert size == (20, 18, 12)


@pytest.mark.parametrize("form", ["sform", "qform"])
def test_a_contradictory_geometry_is_read_as_told(tmp_path, capfd, form):
    write_nifti(tmp_path / "in" / "a.nii", edit=sform(TURNED))
    words = ("prepare", "--data", tmp_path / "in", "--out", tmp_path / "s", "--workers", "0")
    code, said = run(capfd, *words)
    assert code == 3
    assert "E-GEOMETRY" in said
    assert "--geometry" in said
    assert run(capfd, *words, "--geometry", form)[0] == 0
    affine = Store.open(tmp_path / "s").cases[0].source.affine
    expected = TURNED if form == "sform" else DEFAULT
    np.testing.assert_allclose(affine, expected, atol=1e-4)


def test_filled_voxels_are_counted(tmp_path, capfd):
    array = ct_like().astype(np.float32)
    array[0, 0, :5] = np.nan
    write_nifti(tmp_path / "in" / "a.nii", array)
    words = ("prepare", "--data", tmp_path / "in", "--out", tmp_path / "s", "--workers", "0")
    code, said = run(capfd, *words)
    assert code == 3
    assert "found 5 voxels" in said
    assert run(capfd, *words, "--nan-fill", "-1000")[0] == 0
    assert Store.open(tmp_path / "s").cases[0].filled == 5


# ---- DICOM ---------------------------------------------------------------------------------------


def test_what_lies_beside_a_series_is_passed_over_and_said(tmp_path, capfd):
    """Two series in one folder are two cases; rescale varies, SliceThickness is not the step."""
    root = tmp_path / "in"

    def varying(ds, k):
        ds.RescaleSlope, ds.RescaleIntercept = str(1 + k % 2), str(-1024 - k)

    first = write_series(root / "study", edit=varying)
    for path in write_series(tmp_path / "b", ct_like(SIZE, 1), series=f"{SERIES}.5"):
        shutil.copy(path, root / "study" / f"b{path.name}")

    def scout(ds, k):
        ds.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]

    write_series(root / "scout", ct_like((5, 5, 2)), edit=scout, series=f"{SERIES}.6")
    index = dcmread(first[0])
    for name in ("Rows", "Columns", "PixelData"):
        delattr(index, name)
    index.save_as(root / "DICOMDIR")
    (root / "notes.txt").write_text("read me")
    words = ("prepare", "--data", root, "--out", tmp_path / "s", "--workers", "0")
    code, said = run(capfd, *words)
    assert code == 0, said
    assert "2 cases (plain layout; 2 unlabelled; 0 labelled)" in said
    assert "passed over 1 DICOM files that hold no image" in said
    assert "passed over 2 localiser slices" in said
    assert "passed over 1 files that are no volumes (1 .txt)" in said
    records = Store.open(tmp_path / "s").cases
    assert [record.spacing_mm for record in records] == [pytest.approx((2, 1.5, 3))] * 2
    assert len({record.group for record in records}) == 1
    assert len({record.content_hash for record in records}) == 2


@pytest.mark.realdata
def test_real_series_become_a_store(real_data, tmp_path, capfd):
    words = ("prepare", "--data", real_data / "dicom" / "ct_jpeg2000_series", "--workers", "0")
    code, said = run(capfd, *words, "--out", tmp_path / "s", "--spacing", "2")
    assert code == 0, said
    (record,) = Store.open(tmp_path / "s").cases
    label = read_grid(real_data / "dicom" / "ct_jpeg2000_series_label.nii.gz")
    assert record.source.ras()[0] == label.ras()[0]
    np.testing.assert_allclose(record.source.ras()[1], label.ras()[1], atol=1e-3)
    assert record.modality == "CT"
    assert all(b"1.3.12.2.1107" not in data for data in snapshot(tmp_path / "s").values())


# ---- storage -------------------------------------------------------------------------------------

TINY = (
    "model.options={init_filters: 8, blocks_down: [1, 1, 1], blocks_up: [1, 1]}",
    "mask.cell_size=8", "objective.decoder_width=16", "data.crop=16", "optim.batch=2",
    "optim.steps=2", "optim.warmup=1", "compute.accelerator=cpu", "compute.threads=1",
    "compute.workers=0",
)  # fmt: skip


def flipped(path: Path, frame: dict) -> str:
    content = bytearray(path.read_bytes())
    content[frame["head"] + 40] ^= 4
    path.write_bytes(content)
    return "case ct: its chunk 0 was altered"


def cut(path: Path, frame: dict) -> str:
    path.write_bytes(path.read_bytes()[: frame["head"] + frame["data"] // 2])
    return f"case ct: its file has {frame['head'] + frame['data'] // 2} bytes instead of"


def lost(path: Path, frame: dict) -> str:
    path.unlink()
    return "case ct: its file cannot be read (No such file or directory)"


@pytest.mark.parametrize("harm", [flipped, cut, lost])
def test_training_on_a_rotten_store_ends_in_one_line(tmp_path, capfd, harm):
    """Case and chunk are named; a missing chunk is never a fill value; --verify mends it."""
    write_nifti(tmp_path / "in" / "ct.nii", ct_like((24, 24, 24)), np.diag([2.0, 2, 2, 1]))
    words = ("prepare", "--data", tmp_path / "in", "--out", tmp_path / "s", "--workers", "0")
    assert run(capfd, *words)[0] == 0
    whole = snapshot(tmp_path / "s")
    said_by = harm(case_path(tmp_path / "s", "ct", ".b2nd"),
                   read_record(tmp_path / "s", "ct")["files"]["image"])  # fmt: skip
    code, said = run(capfd, "pretrain", *TINY, "--data", tmp_path / "s", "--out", tmp_path / "r")
    assert code == 3, said
    assert f"E-STORE-DAMAGED: {said_by}" in said
    assert "--verify to prepare this case again" in said
    assert not (tmp_path / "r" / "encoder.safetensors").exists()
    assert run(capfd, *words, "--verify")[0] == 0
    assert snapshot(tmp_path / "s") == whole


# ---- the list itself -----------------------------------------------------------------------------


def rows() -> list[tuple[str, str, str]]:
    """Fault, answer and test of every row of the document."""
    lines = (ROOT / "docs" / "bad-input.md").read_text("utf-8").splitlines()
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in lines if "::" in line
    ]
    return [(cell[0], cell[1], cell[-1]) for cell in cells]


def test_every_row_of_the_catalogue_names_tests_and_codes_that_exist():
    sources = [*(ROOT / "spark3d").rglob("*.py"), *(ROOT / "data_prep").glob("*.py")]
    code = "\n".join(path.read_text("utf-8") for path in sources)
    listed = rows()
    assert len(listed) > 50
    for fault, answer, tests in listed:
        for name in re.findall(r"E-[A-Z0-9-]+", answer):
            stem = re.sub(r"^E-(LABEL|CHANNEL)-(SIZE|AFFINE)$", r"-\2", name)
            stem = re.sub(r"^E-LEAK-(PATIENT|VOXELS)$", "E-LEAK-", stem)
            assert stem in code, (fault, name)
        found = re.findall(r"`([\w/]+)\.py::(\w+)`", tests)
        assert found, fault
        for module, test in found:
            text = (ROOT / "tests" / f"{module}.py").read_text("utf-8")
            assert f"def {test}(" in text, (fault, module, test)
