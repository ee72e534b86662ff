"""nnU-Net's raw datasets of versions 1 and 2, read and written, with their names and quirks."""

import json
from pathlib import Path

import numpy as np
import pytest
from nifti_files import ct_like, write_nifti
from rich.console import Console
from scripts import script
from test_msd import SIZE, label_like, task

from data_prep.nnunet import main
from spark3d.commands.prepare import prepare_command
from spark3d.data.io import read_volume
from spark3d.data.sources import find
from spark3d.data.splits import named_split
from spark3d.data.store import Store

CONFIG, DATA = 2, 3


def dataset(root: Path, channels: tuple[str, ...] = ("T1", "T2"), version: int = 2) -> Path:
    """A raw dataset of three training cases and a test case."""
    for case in ("BRAIN_001", "BRAIN_002", "BRAIN_003", "BRAIN_009"):
        part = "Ts" if case == "BRAIN_009" else "Tr"
        for k in range(len(channels)):
            path = root / f"images{part}" / f"{case}_{k:04d}.nii.gz"
            write_nifti(path, ct_like(SIZE, seed=10 * int(case[-1]) + k))
        if part == "Tr":
            write_nifti(root / "labelsTr" / f"{case}.nii.gz", label_like())
    names = {str(k): name for k, name in enumerate(channels)}
    if version == 2:
        labels = {"background": 0, "one": 1, "two": 2}
        data = {
            "channel_names": names,
            "labels": labels,
            "numTraining": 3,
            "file_ending": ".nii.gz",
        }
    else:
        files = [f"BRAIN_00{n}.nii.gz" for n in (1, 2, 3)]  # listed without their _0000
        data = {
            "name": "BRAIN", "tensorImageSize": "4D", "modality": names,
            "labels": {"0": "background", "1": "one", "2": "two"}, "numTraining": 3, "numTest": 1,
            "training": [{"image": f"./imagesTr/{n}", "label": f"./labelsTr/{n}"} for n in files],
            "test": ["./imagesTs/BRAIN_009.nii.gz"],
        }  # fmt: skip
    (root / "dataset.json").write_text(json.dumps(data))
    return root


@pytest.mark.parametrize("version", [1, 2])
def test_both_versions_are_read_where_they_lie(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], version: int
) -> None:
    root = dataset(tmp_path / "Dataset501_Brain", version=version)
    before = sorted(tmp_path.rglob("*"))
    assert "4 cases (nnunet), 3 labelled" in script(main, capsys, root)
    assert sorted(tmp_path.rglob("*")) == before
    found = find(root)
    assert found.labels == {"background": 0, "one": 1, "two": 2}
    assert [len(case.images) for case in found.cases] == [2] * 4
    assert not found.fourth_axis
    prepare_command(root, tmp_path / "store", workers=0, console=Console(quiet=True))
    assert {r.channels for r in Store.open(tmp_path / "store").cases} == {2}


def test_a_4d_task_there_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, out = task(tmp_path, "Task05_Prostate", 3, 1), tmp_path / "raw" / "Dataset505_Prostate"
    said = script(main, capsys, root, "--out", out)
    assert "wrote 3 training and 1 test cases" in said
    assert sorted(p.relative_to(out).as_posix() for p in out.rglob("*.gz"))[:3] == [
        "imagesTr/prostate_01_0000.nii.gz",
        "imagesTr/prostate_01_0001.nii.gz",
        "imagesTr/prostate_02_0000.nii.gz",
    ]
    data = json.loads((out / "dataset.json").read_text())
    assert data["channel_names"] == {"0": "T2", "1": "ADC"}
    assert data["labels"] == {"background": 0, "one": 1, "two": 2}
    assert (data["numTraining"], data["file_ending"]) == (3, ".nii.gz")
    ours, theirs = find(root), find(out)
    assert [(c.id, c.section) for c in ours.cases] == [(c.id, c.section) for c in theirs.cases]
    assert ours.labels == theirs.labels
    for one, other in zip(ours.cases, theirs.cases, strict=True):
        whole = read_volume(one.image, channels=True)
        for k, path in enumerate(other.images):
            part = read_volume(path)
            np.testing.assert_array_equal(part.array[0], whole.array[k])
            np.testing.assert_array_equal(part.affine, whole.affine)
    assert not (out / "splits_final.json").exists()


@pytest.mark.parametrize("how", [[], ["--copy"]])
def test_volumes_are_linked_unless_copied_and_validation_is_kept_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], how: list[str]
) -> None:
    root, out = task(tmp_path, "Task09_Spleen", 3, 1), tmp_path / "Dataset509_Spleen"
    data = json.loads((root / "dataset.json").read_text())
    data["validation"] = [data["training"].pop()]
    (root / "dataset.json").write_text(json.dumps(data))
    script(main, capsys, root, "--out", out, *how)
    image = out / "imagesTr" / "spleen_1_0000.nii.gz"
    assert image.is_symlink() == (not how)
    assert image.read_bytes() == (root / "imagesTr" / "spleen_1.nii.gz").read_bytes()
    split = named_split(str(out / "splits_final.json"), 0)
    assert (sorted(split.train), split.validation) == (["spleen_2", "spleen_3"], ("spleen_1",))


def test_uncompressed_files_are_written_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "mine"
    for n in (1, 2):
        write_nifti(root / "imagesTr" / f"a{n}.nii", ct_like(SIZE, seed=n))
        write_nifti(root / "labelsTr" / f"a{n}.nii.gz", label_like())
    out = tmp_path / "Dataset600_Mine"
    script(main, capsys, root, "--out", out, "--channels", "CT", "--labels", "one=1, two=2")
    written, original = out / "imagesTr" / "a1_0000.nii.gz", root / "imagesTr" / "a1.nii"
    np.testing.assert_array_equal(read_volume(written).array, read_volume(original).array)
    assert find(out).modality == "CT"


def lose_channel(root: Path) -> None:
    (root / "imagesTr" / "BRAIN_002_0001.nii.gz").unlink()


def add_channel(root: Path) -> None:
    write_nifti(root / "imagesTr" / "BRAIN_003_0002.nii.gz", ct_like(SIZE))


def lose_labels(root: Path) -> None:
    for n in (1, 3):
        (root / "labelsTr" / f"BRAIN_00{n}.nii.gz").unlink()


def change(key: str, value: object):
    def edit(root: Path) -> None:
        data = json.loads((root / "dataset.json").read_text())
        (root / "dataset.json").write_text(json.dumps(data | {key: value}))

    return edit


@pytest.mark.parametrize(
    ("breaking", "told"),
    [
        (lose_channel, "E-CHANNELS: "),
        (lose_channel, "the channels 0000, 0001: BRAIN_002; expected 2 files per case"),
        (add_channel, "the channels 0000, 0001: BRAIN_003; expected"),
        (lose_labels, "E-MISSING-FILE"),
        (lose_labels, "BRAIN_003"),
        (change("labels", {"background": 0, "one": 1, "ignore": 2}), "E-LABEL-IGNORE"),
        (change("labels", {"background": 0, "whole": [1, 2], "core": 2}), "regions of several"),
        (change("labels", {"background": 0, "one": 1, "two": 3}), "E-LABEL-GAP"),
    ],
)
def test_faulty_datasets(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], breaking, told: str
) -> None:
    root = dataset(tmp_path / "Dataset501_Brain")
    breaking(root)
    assert told in script(main, capsys, root, code=DATA)


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["raw", "--out", "x"], CONFIG, "call the folder DatasetNNN_Name"),
        (["raw", "--out", "Dataset001_X", "--channels", "CT"], DATA, "2 files; expected 1"),
        (["raw", "--out", "Dataset001_X", "--labels", "one"], CONFIG, "give name=value"),
        (["raw", "--out", "Dataset001_X", "--labels", "one=2"], DATA, "E-LABEL-GAP"),
        (["bare", "--out", "Dataset001_X"], CONFIG, "does not name its channels"),
        (["bare", "--out", "Dataset001_X", "--channels", "CT"], CONFIG, "does not name its labels"),
        (["raw", "--out", "Dataset009_Full"], CONFIG, "holds something already"),
        (["nowhere"], DATA, "E-NO-FOLDER"),
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
    dataset(tmp_path / "raw")
    write_nifti(tmp_path / "bare" / "a.nii.gz", ct_like(SIZE))
    (tmp_path / "Dataset009_Full").mkdir()
    (tmp_path / "Dataset009_Full" / "mine").touch()
    assert told in script(main, capsys, *words, code=code)
    assert not (tmp_path / "Dataset001_X").exists()
    assert not list(tmp_path.glob(".*"))
