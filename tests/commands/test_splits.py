"""Named splits, folds and lists as a user gives them; leaks are refused, or told in the report."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import FINETUNE, PRETRAIN, SCRATCH, Fails, succeeds

from spark3d.data.store import Store
from spark3d.weights.exchange import load_encoder, save_encoder

CONFIG, DATA = 2, 3
SHORT = ("optim.steps=1", "optim.warmup=0")
HALVES = {"train": ["case0", "case1"], "validation": ["case2"], "test": ["case3"]}
Tuning = Callable[..., list[str | Path]]


@pytest.fixture
def tuning(store: Path, out: Path) -> Tuning:
    """Words of a short fine-tuning from scratch."""

    def words(*more: str | Path, data: Path = store) -> list[str | Path]:
        return ["finetune", *FINETUNE, *SHORT, *SCRATCH, *more, "--data", data, "--out", out]

    return words


def written(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content))
    return path


def inputs(run: Path) -> dict:
    return json.loads((run / "run.json").read_text())["inputs"]


# ---- what is chosen ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        {"about": "halves", "folds": [["case0", "case2"], ["case1"], ["case3"]]},
        [
            {"train": ["case1", "case3"], "val": ["case0", "case2"]},
            {"train": ["case0", "case2", "case3"], "val": ["case1"]},
        ],
    ],
)
def test_a_fold_of_a_file(tuning: Tuning, tmp_path: Path, out: Path, content: object) -> None:
    file = written(tmp_path / "folds.json", content)
    succeeds(*tuning("split.use=named", f"split.name={file}", "split.fold=1"))
    assert sorted(inputs(out)["train"]) == ["case0", "case2", "case3"]
    assert inputs(out)["validation"] == ["case1"]


def test_pretraining_leaves_out_what_a_split_holds_back(
    store: Path, tmp_path: Path, out: Path
) -> None:
    file = written(tmp_path / "mine.json", {"train": ["case1"], "test": ["case0", "extra0"]})
    succeeds("pretrain", *PRETRAIN, *SHORT, "--data", store, "--out", out, "--exclude", file)
    hashes = {r.id: r.content_hash for r in Store.open(store).cases}
    _, passport = load_encoder(out / "encoder.safetensors")
    assert set(passport.content_hashes) == {hashes[i] for i in ("case1", "extra1", "extra2")}


def test_the_labels_of_a_split_are_scored_unless_the_recipe_says(
    tuning: Tuning, tmp_path: Path, out: Path
) -> None:
    file = written(tmp_path / "mine.json", {**HALVES, "labels": [1, 3]})
    split = ("split.use=named", f"split.name={file}")
    succeeds(*tuning(*split))
    card = json.loads((out / "model.json").read_text())
    assert card["recipe"]["score"]["labels"] == [1, 3]
    (scores,) = json.loads((out / "run.json").read_text())["result"]["validation"].values()
    assert sorted(scores) == ["1", "3"]
    shutil.rmtree(out)
    succeeds(*tuning(*split, "score.labels=[2]"))
    assert json.loads((out / "model.json").read_text())["recipe"]["score"]["labels"] == [2]


# ---- what does not fit ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["split.use=named", "split.name=btcv"], CONFIG, "choose from btcv-80-20, btcv-monai-24-6"),
        (["split.use=named"], CONFIG, "no split is called ''"),
        (["data.augment.swap=[[1,14]]"], CONFIG, "the data have no label 14; set it to the pairs"),
        (["score.labels=[1,14]"], CONFIG, "the data have no label 14; choose from 1 liver"),
        (["split.use=named", "split.name=no.json"], DATA, "E-SPLIT-FILE: no.json: found a file"),
        (["split.use=named", "split.name=btcv-80-20"], DATA, "E-SPLIT-ABSENT: split btcv-80-20: "),
        (["split.use=named", "split.name=btcv-80-20", "split.fold=0"], CONFIG, "has no folds"),
        (["split.name=btcv-80-20"], CONFIG, "need split.use=named, not dataset"),
        (["split.use=list", "split.train=[case0]", "split.validation=[case0]"], CONFIG,
         "split.train and split.validation name a case twice: case0"),
    ],
)  # fmt: skip
def test_splits_that_do_not_fit(
    tuning: Tuning, fails: Fails, out: Path, words: list[str], code: int, said: str
) -> None:
    assert said in fails(code, *tuning(*words))
    assert not out.exists()


@pytest.mark.parametrize(
    ("content", "words", "code", "said"),
    [
        ({"train": ["case0"], "test": ["case0"]}, [], DATA, "E-SPLIT-TWICE: split s.json: found c"),
        ({"train": ["case0", "extra0"]}, [], DATA, "E-SPLIT-LABEL: split s.json: found no label"),
        ({"trian": []}, [], DATA, "E-SPLIT-FILE: s.json: found something else"),
        ({"train": "case0"}, [], DATA, "E-SPLIT-FILE"),
        ({"train": [1]}, [], DATA, "E-SPLIT-FILE"),
        ([{"train": ["case0"]}], [], DATA, "E-SPLIT-FILE"),
        ("case0", [], DATA, "E-SPLIT-FILE"),
        ({"folds": [["case0"], ["case1"]]}, [], CONFIG, "has 2 folds, none was chosen: give"),
        ({"folds": [["case0"], ["case1"]]}, ["split.fold=2"], CONFIG, "2 is not among them"),
    ],
)
def test_split_files_that_do_not_fit(
    tuning: Tuning,
    fails: Fails,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    out: Path,
    content: object,
    words: list[str],
    code: int,
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "s.json", content)
    assert said in fails(code, *tuning("split.use=named", "split.name=s.json", *words))
    assert not out.exists()


# ---- leaks ---------------------------------------------------------------------------------------


def test_the_same_patient_on_both_sides(
    volumes: Path, tuning: Tuning, fails: Fails, tmp_path: Path, out: Path
) -> None:
    data = tmp_path / "store"
    words = ("--data", volumes, "--out", data, "--workers", "0")
    succeeds("prepare", *words, "--group-pattern", "(case)")
    line = fails(DATA, *tuning(data=data))
    assert "E-LEAK-PATIENT: training and validation: found 2 cases with the same patient" in line
    assert "or pass --allow-overlap" in line
    assert not out.exists()


def test_the_same_voxels_on_both_sides_under_two_names(
    volumes: Path, tuning: Tuning, fails: Fails, tmp_path: Path, out: Path
) -> None:
    task, data = tmp_path / "task", tmp_path / "store"
    shutil.copytree(volumes, task)
    for folder in ("imagesTr", "labelsTr"):
        shutil.copy(task / folder / "case1.nii.gz", task / folder / "case3.nii.gz")
    succeeds("prepare", "--data", task, "--out", data, "--workers", "0")
    line = fails(DATA, *tuning(data=data))
    assert "E-LEAK-VOXELS: training and validation: found 1 cases" in line
    assert "case1 = case3" in line
    file = written(tmp_path / "s.json", {"train": ["case0", "case1"], "test": ["case3"]})
    line = fails(DATA, *tuning("split.use=named", f"split.name={file}", data=data))
    assert "E-LEAK-VOXELS: training and test: found 1 cases" in line
    assert not out.exists()
    succeeds(*tuning("--allow-overlap", data=data))
    (told,) = inputs(out)["overlap"]["allowed"]
    assert told.startswith("E-LEAK-VOXELS: training and validation")


@pytest.fixture
def leaky(store: Path, pretrained: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Encoder weights that have seen one more case."""

    def seen(case: str) -> Path:
        state, passport = load_encoder(pretrained / "encoder.safetensors")
        content = next(r.content_hash for r in Store.open(store).cases if r.id == case)
        more = replace(passport, content_hashes=(*passport.content_hashes, content))
        save_encoder(tmp_path / "encoder.safetensors", state, more)
        return tmp_path / "encoder.safetensors"

    return seen


def test_a_test_volume_seen_in_pretraining_is_refused_or_told_in_the_report(
    tuning: Tuning, leaky: Callable[[str], Path], fails: Fails, tmp_path: Path, out: Path
) -> None:
    file = written(tmp_path / "s.json", HALVES)
    words = tuning("split.use=named", f"split.name={file}", "--encoder", leaky("case3"))
    line = fails(DATA, *words)
    assert "1 test volumes were seen in pre-training: case3; pre-train without them, or" in line
    assert not out.exists()

    succeeds(*words, "--allow-overlap")
    overlap = inputs(out)["overlap"]
    assert overlap["pretraining"] == {"training": [2, 2], "validation": [0, 1], "test": [1, 1]}
    succeeds("report", out, "--out", tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    assert "2 of 2 training, 0 of 1 validation, 1 of 1 test volumes" in page
    assert "1 test volumes were seen in pre-training: case3" in page
    assert "Scores are not those of unseen cases." in page


def test_training_volumes_seen_in_pretraining_are_told_not_refused(
    tuning: Tuning,
    pretrained: Path,
    tmp_path: Path,
    out: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    succeeds(*tuning("--encoder", pretrained))
    assert "2 of 2 training volumes were seen in pre-training" in caplog.text
    assert inputs(out)["overlap"]["allowed"] == []
    succeeds("report", out, "--out", tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    assert "2 of 2 training, 0 of 2 validation volumes" in page
    assert "not those of unseen" not in page


def test_a_patient_of_pretraining_among_the_held_out_cases(
    volumes: Path, tuning: Tuning, fails: Fails, tmp_path: Path, out: Path
) -> None:
    """Other scans of the same patient: extra2 was pre-trained on, case2 validates."""
    data, pre = tmp_path / "store", tmp_path / "pre"
    pattern = ("--group-pattern", r"^\D+(\d)$")
    succeeds("prepare", "--data", volumes, "--out", data, "--workers", "0", *pattern)
    names = tmp_path / "names.txt"
    names.write_text("case0\ncase1\n")
    succeeds("pretrain", *PRETRAIN, *SHORT, "--data", data, "--out", pre, "--exclude", names)
    words = tuning("--encoder", pre, data=data)
    line = fails(DATA, *words)
    assert (
        "E-LEAK-PATIENT: 1 validation volumes are of patients seen in pre-training: case2" in line
    )
    assert not out.exists()
    succeeds(*words, "--allow-overlap")
    seen = {"training": [2, 2], "validation": [1, 2], "test": [0, 0]}
    assert inputs(out)["overlap"]["patients"] == seen
    succeeds("report", out, "--out", tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    assert "patients of 2 of 2 training, 1 of 2 validation volumes" in page
    assert "Scores are not those of unseen cases." in page
