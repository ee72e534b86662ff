"""Folds as files: whole patients, the same file for the same data, no overwriting."""

import json
from pathlib import Path

import pytest
from nifti_files import ct_like, write_nifti
from scripts import script
from test_msd import SIZE, label_like, task

from data_prep.folds import main
from spark3d.data.splits import named_split

CONFIG, DATA = 2, 3


def test_patients_stay_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, out = tmp_path / "raw", tmp_path / "splits" / "folds.json"
    for name in ("p1_a", "p1_b", "p2_a", "p3_a", "p3_b", "p3_c"):
        write_nifti(root / "imagesTr" / f"{name}.nii.gz", ct_like(SIZE))
        write_nifti(root / "labelsTr" / f"{name}.nii.gz", label_like())
    words = (root, "--folds", "3", "--group-pattern", r"^(p\d)_")
    said = script(main, capsys, *words, "--out", out)
    assert "3 folds of 6 cases of 3 patients, seed 0" in said
    splits = [named_split(str(out), fold) for fold in range(3)]
    held = sorted(sorted(split.validation) for split in splits)
    assert held == [["p1_a", "p1_b"], ["p2_a"], ["p3_a", "p3_b", "p3_c"]]
    assert {len({*split.train, *split.validation}) for split in splits} == {6}
    script(main, capsys, *words, "--out", tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == out.read_bytes()


def test_test_cases_stand_beside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = task(tmp_path, "Task09_Spleen", 4, 2)
    script(main, capsys, root, "--folds", "2", "--out", tmp_path / "f.json")
    content = json.loads((tmp_path / "f.json").read_text())
    assert content["test"] == ["spleen_5", "spleen_6"]
    assert sorted(map(len, content["folds"])) == [2, 2]


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["Task09_Spleen", "--out", "old.json"], CONFIG, "old.json exists"),
        (["Task09_Spleen", "--out", "new.json", "--folds", "9"], CONFIG, "choose from 2 to 3"),
        (["Task09_Spleen"], CONFIG, "required: --out"),
        (["plain", "--out", "new.json"], DATA, "E-NO-LABEL"),
        (["nowhere", "--out", "new.json"], DATA, "E-NO-FOLDER"),
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
    task(tmp_path, "Task09_Spleen", 3, 0)
    write_nifti(tmp_path / "plain" / "a.nii.gz", ct_like(SIZE))
    (tmp_path / "old.json").write_text("{}")
    assert told in script(main, capsys, *words, code=code)
    assert not (tmp_path / "new.json").exists()
    assert (tmp_path / "old.json").read_text() == "{}"
