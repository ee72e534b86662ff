"""Labels and lists that do not fit, as a user meets them: verdict, message, exit code."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import FINETUNE, SCRATCH, Fails, succeeds
from nifti_files import DEFAULT, ct_like, write_nifti

from spark3d.data.store import Store

DATA = 3
SIZE = (20, 18, 12)
Fault = Callable[[Path], None]


def label_like(kind: type = np.uint8) -> np.ndarray:
    """Two classes inside the body."""
    label = np.zeros(SIZE, kind)
    label[5:10, 5:10, 3:8] = 1
    label[12:14, 6:9, 4:7] = 2
    return label


def rewrite(case: str, label: np.ndarray, affine: np.ndarray = DEFAULT) -> Fault:
    return lambda task: void(write_nifti(task / "labelsTr" / f"{case}.nii.gz", label, affine))


def void(_: object) -> None:
    return None


def with_value(value: float, kind: type = np.int16) -> np.ndarray:
    label = label_like(kind)
    label[6, 6, 4] = value
    return label


def moved(millimetres: float) -> np.ndarray:
    affine = DEFAULT.copy()
    affine[0, 3] += millimetres
    return affine


def lose(*names: str) -> Fault:
    def edit(task: Path) -> None:
        for name in names:
            (task / name).unlink()

    return edit


def described(**changes: object) -> Fault:
    def edit(task: Path) -> None:
        data = json.loads((task / "dataset.json").read_text())
        (task / "dataset.json").write_text(json.dumps(data | changes))

    return edit


def listed(*pairs: tuple[str, str]) -> Fault:
    """Other lists of cases."""
    return described(training=[{"image": image, "label": label} for image, label in pairs])


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """A sound task of three small cases."""
    root = tmp_path / "task"
    names = [f"case{n}.nii.gz" for n in range(3)]
    for n, name in enumerate(names):
        write_nifti(root / "imagesTr" / name, ct_like(SIZE, n))
        write_nifti(root / "labelsTr" / name, label_like())
    description = {
        "modality": {"0": "CT"}, "labels": {"0": "background", "1": "liver", "2": "spleen"},
        "training": [{"image": f"imagesTr/{n}", "label": f"labelsTr/{n}"} for n in names],
    }  # fmt: skip
    (root / "dataset.json").write_text(json.dumps(description))
    return root


A, B = "imagesTr/case0.nii.gz", "imagesTr/case1.nii.gz"
LA, LB = "labelsTr/case0.nii.gz", "labelsTr/case1.nii.gz"

IN_ONE_CASE = {
    "size": (rewrite("case1", label_like()[:, :-1]), "E-LABEL-SIZE: case1: ", "20 x 17 x 12"),
    "axes": (rewrite("case1", label_like().T), "E-LABEL-SIZE: case1: ", "12 x 18 x 20"),
    "affine": (
        rewrite("case1", label_like(), moved(2e-3)),
        "E-LABEL-AFFINE: case1: ",
        " mm apart at a corner",
    ),
    "undeclared": (rewrite("case1", with_value(7)), "E-LABEL-RANGE: case1: ", "values 7;"),
    "negative": (rewrite("case1", with_value(-1)), "E-LABEL-RANGE: ", "from -1 to 2"),
    "too large": (rewrite("case1", with_value(4e4, np.float32)), "E-LABEL-RANGE: ", "to 40000"),
    "fractions": (rewrite("case1", with_value(0.5, np.float32)), "E-LABEL-FLOAT: ", "nearest"),
    "no foreground": (rewrite("case1", 0 * label_like()), "E-LABEL-EMPTY: case1: ", "unlabelled"),
    "4D": (rewrite("case1", np.stack([label_like()] * 2, -1)), "E-4D: ", "one class number"),
}
IN_THE_LIST = {
    "gap": (described(labels={"0": "bg", "1": "a", "3": "b"}), "E-LABEL-GAP", "0, 1, 3"),
    "no number": (described(labels={"0": "bg", "x": "a"}), "E-DATASET-JSON", "whole numbers"),
    "missing": (lose(LA, LB), "E-MISSING-FILE", "2 listed files absent"),
    "label is image": (listed((A, A), (B, LB)), "E-LABEL-IS-IMAGE", "case0"),
    "twice": (listed((A, LA), (B, LB), (A, LB)), "E-DUPLICATE-ID", "case0"),
    "none": (described(training=[]), "E-NO-CASES", "no volume"),
    "leads out": (listed((A, "../case0.nii.gz")), "E-DATASET-JSON", "leads out of the folder"),
}


def command(name: str, task: Path, out: Path) -> list[str | Path]:
    words = ["--workers", "0"] if name == "prepare" else [*FINETUNE, *SCRATCH]
    return [name, *words, "--data", task, "--out", out]


@pytest.mark.parametrize(("fault", "code", "said"), IN_ONE_CASE.values(), ids=IN_ONE_CASE)
def test_a_faulty_label_is_refused_by_name(
    task: Path, fails: Fails, out: Path, fault: Fault, code: str, said: str
) -> None:
    fault(task)
    line = fails(DATA, *command("prepare", task, out))
    assert "1 unusable cases of 3 (1 of them labelled)" in line
    assert code in line
    assert "case1" in line
    assert said in line
    assert not list(out.rglob("index.json"))


@pytest.mark.parametrize("name", ["prepare", "finetune"])
@pytest.mark.parametrize(("fault", "code", "said"), IN_THE_LIST.values(), ids=IN_THE_LIST)
def test_a_faulty_list_is_refused_before_anything_is_written(
    task: Path, fails: Fails, out: Path, fault: Fault, code: str, said: str, name: str
) -> None:
    fault(task)
    line = fails(DATA, *command(name, task, out))
    assert f"error: {code}: " in line
    assert said in line
    assert not out.exists()


def test_both_missing_labels_are_named(task: Path, fails: Fails, out: Path) -> None:
    lose(LA, LB)(task)
    line = fails(DATA, *command("prepare", task, out))
    assert LA in line
    assert LB in line


def test_what_looks_like_a_fault_but_is_none(task: Path, out: Path) -> None:
    """A micrometre of difference, whole numbers stored as floats, a class that a case lacks."""
    rewrite("case0", label_like(), moved(5e-4))(task)
    rewrite("case1", label_like(np.float32))(task)
    rewrite("case2", (label_like() == 1).astype(np.uint8))(task)
    succeeds(*command("prepare", task, out))
    assert [r.labels for r in Store.open(out).cases] == [(1, 2), (1, 2), (1,)]


def test_undeclared_labels_with_a_gap_are_refused(
    task: Path, fails: Fails, tmp_path: Path, out: Path
) -> None:
    (task / "dataset.json").unlink()
    for n in range(3):
        rewrite(f"case{n}", 2 * label_like())(task)
    succeeds(*command("prepare", task, tmp_path / "store"))
    line = fails(DATA, *command("finetune", tmp_path / "store", out))
    assert "E-LABEL-GAP: " in line
    assert "found the label values 0, 2, 4; expected 0..2 without gaps" in line
    assert not (out / "run.json").exists()
