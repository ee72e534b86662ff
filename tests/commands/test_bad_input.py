"""A user's mistake is one line that names it, and an exit code; nothing is left half-written."""

import gzip
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import FINETUNE, PRETRAIN, SCRATCH, Fails, succeeds

from spark3d.data.io import read_label, write_volume

CONFIG, DATA, MACHINE = 2, 3, 4


# ---- the command line and the recipe -------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["optim.lrr=1"], "did you mean 'optim.lr'"),
        (["otpim.lr=1"], "did you mean 'optim.lr'"),
        (["optim.lr=fast"], "optim.lr='fast'"),
        (["optim.batch=0"], "optim.batch=0"),
        (["mask.ratio=1.5"], "mask.ratio=1.5"),
        (["optim.lr={a: 1, a: 2}"], "stands twice"),
        (["no_such_recipe"], "no recipe 'no_such_recipe': give a YAML file or one of"),
        (["--dims", "5"], "dims=5"),
        (["model.backbone=monai/segresnit"], "try monai/segresnet"),
        (["model.options={no_such: 1}"], "no_such"),
        (["data.crop=20"], "multiple of mask.cell_size=(8, 8, 8) along axis 0; the nearest that"),
        (["data.crop=8"], "holds 1 cell"),
        (["images.flip=0.1"], "dims=3, but images.flip: for 2D images, volumes have data.crop"),
        (["mask.cell_size=[8, 8]"], "one for each of 3 axes"),
        (["mask.cell_size=2"], "monai/segresnet cannot be trained by this recipe: "),
        (["model.in_channels=2"], "the volumes have [1] channels"),
        (["data.spacing_mm=[1, 1, 1]"], "was prepared at (7.0, 8.0, 10.0) mm"),
        (["optim.precision=16-mixed"], "optim.precision='16-mixed'"),
        (["compute.strategy=no_such"], "no_such"),
    ],
)
def test_pretraining_recipes(store: Path, fails: Fails, out: Path, words: list, said: str) -> None:
    named = [] if "=" in words[0] or words[0].startswith("--") else words
    given = [] if named else words
    line = fails(CONFIG, "pretrain", *named, *PRETRAIN, *given, "--data", store, "--out", out)
    assert said in line
    assert not out.exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["loss.dice=1"], "unknown key 'loss.dice'; did you mean"),
        (["data.crop=18"], "data.crop=(18, 18, 18) is not a multiple of the network's stride"),
        (["dims=2", "data.crop=18"], "data.crop=(18, 18) is not a multiple of the network's"),
        (["model.in_channels=3"], "the volumes have [1] channels"),
        (["split.labels=9"], "9 labelled cases of 2"),
        (["split.use=list", "split.train=[case9]"], "case9"),
        (["no_such_recipe"], "no recipe 'no_such_recipe'"),
    ],
)
def test_finetuning_recipes(store: Path, fails: Fails, out: Path, words: list, said: str) -> None:
    named = [] if "=" in words[0] else words
    given = [] if named else words
    line = fails(
        CONFIG, "finetune", *named, *FINETUNE, *SCRATCH, *given, "--data", store, "--out", out
    )
    assert said in line
    assert not out.exists()


@pytest.mark.parametrize("command", ["pretrain", "finetune"])
@pytest.mark.parametrize("option", ["--data", "--out"])
def test_missing_options(fails: Fails, tmp_path: Path, command: str, option: str) -> None:
    other = {"--data": "--out", "--out": "--data"}[option]
    assert f"{option} is missing" in fails(CONFIG, command, other, tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_hardware_that_is_not_there(store: Path, fails: Fails, out: Path) -> None:
    line = fails(
        MACHINE, "pretrain", *PRETRAIN, "compute.accelerator=tpu", "--data", store, "--out", out
    )
    assert "compute.accelerator=tpu" in line
    assert not out.exists()


# ---- the data ------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["prepare", "pretrain", "finetune"])
def test_no_such_folder(fails: Fails, tmp_path: Path, out: Path, command: str) -> None:
    line = fails(DATA, command, "--data", tmp_path / "nowhere", "--out", out)
    assert "nowhere" in line
    assert not out.exists()


@pytest.mark.parametrize("command", ["prepare", "pretrain", "finetune"])
def test_no_volume_inside(fails: Fails, tmp_path: Path, out: Path, command: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("no volumes yet")
    line = fails(DATA, command, "--data", tmp_path / "empty", "--out", out)
    assert "empty" in line
    assert "NIfTI" in line
    assert not out.exists()


def test_a_file_for_a_folder(volumes: Path, fails: Fails, out: Path) -> None:
    line = fails(DATA, "pretrain", "--data", volumes / "dataset.json", "--out", out)
    assert "dataset.json: is a file" in line


def test_a_truncated_volume_is_named_and_no_run_begins(
    volumes: Path, fails: Fails, tmp_path: Path, out: Path
) -> None:
    scans = tmp_path / "scans"
    shutil.copytree(volumes / "imagesUn", scans)
    bad = scans / "extra1.nii.gz"
    bad.write_bytes(bad.read_bytes()[:-200])
    line = fails(DATA, "pretrain", *PRETRAIN, "--data", scans, "--out", out)
    assert "extra1.nii.gz" in line
    assert "1 unusable cases of 3" in line
    assert not (out / "run.json").exists()

    bad.write_bytes((volumes / "imagesUn" / "extra1.nii.gz").read_bytes())
    short = ("optim.steps=1", "optim.warmup=0")
    succeeds("pretrain", *PRETRAIN, *short, "--data", scans, "--out", out)
    assert (out / "encoder.safetensors").is_file()


def break_grid(folder: Path) -> None:
    label = folder / "labelsTr" / "case1.nii.gz"
    array = read_label(label).array[0]
    write_volume(label, array[:-2].astype(np.uint8), np.diag([7.0, 8.0, 10.0, 1.0]))


def break_values(folder: Path) -> None:
    label = folder / "labelsTr" / "case1.nii.gz"
    array = read_label(label).array[0].astype(np.uint8)
    array[5, 5, 5] = 9
    write_volume(label, array, np.diag([7.0, 8.0, 10.0, 1.0]))


def break_gzip(folder: Path) -> None:
    (folder / "imagesTr" / "case1.nii.gz").write_bytes(gzip.compress(b"<html>not found</html>"))


def lose_label(folder: Path) -> None:
    (folder / "labelsTr" / "case1.nii.gz").unlink()


@pytest.mark.parametrize(
    ("breaking", "said"),
    [
        (break_grid, "size 42 x 36 x 32"),
        (break_values, "9"),
        (break_gzip, "case1"),
        (lose_label, "labelsTr"),
    ],
)
@pytest.mark.parametrize("command", ["prepare", "finetune"])
def test_faulty_labelled_cases(
    volumes: Path,
    fails: Fails,
    tmp_path: Path,
    out: Path,
    breaking: Callable[[Path], None],
    said: str,
    command: str,
) -> None:
    data = tmp_path / "task"
    shutil.copytree(volumes, data)
    breaking(data)
    workers = ["--workers", "0"] if command == "prepare" else []
    line = fails(DATA, command, "--data", data, "--out", out, *workers)
    assert "case1" in line
    assert said in line
    assert not (out / "run.json").exists()


def test_excluding_everything_or_nothing(
    store: Path, fails: Fails, tmp_path: Path, out: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = tmp_path / "names.txt"
    names.write_text("case0.nii.gz\n")
    words = ["pretrain", *PRETRAIN, "--data", store, "--out", out, "--exclude", names]
    assert "names no case" in fails(DATA, *words)
    every = ["case0", "case1", "extra0", "extra1", "extra2"]
    names.write_text("\n".join(every), encoding="utf-8-sig")  # with a mark, as of Windows
    assert "none is left to train on" in fails(DATA, *words)
    assert "no case has" not in caplog.text
    names.write_text("\n".join([*every, "caes2", "Jane Doe.nii.gz"]))
    fails(DATA, *words)
    assert "--exclude names 2 ids that no case has: *.nii.gz, caes2; correct" in caplog.text
    names.unlink()
    assert "cannot read --exclude" in fails(DATA, *words)
    folds = tmp_path / "folds.json"
    folds.write_text(json.dumps({"folds": [["case0"], ["case1"]]}))
    line = fails(CONFIG, *words[:-1], folds)
    assert "folds.json holds folds" in line
    assert "give a text file of the ids" in line
    assert "split.fold" not in line
    assert not out.exists()


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_last_good_checkpoint(
    store: Path, fails: Fails, out: Path
) -> None:
    wild = ("optim.lr=1e30", "compute.checkpoint_every=1")
    line = fails(DATA, "pretrain", *PRETRAIN, *wild, "--data", store, "--out", out)
    assert "not finite in 5 steps in a row" in line
    assert "start a new run with a lower optim.lr" in line
    assert not (out / "encoder.safetensors").exists()
    kept = sorted(file.name for file in (out / "checkpoints").glob("*.pt"))
    lines = [json.loads(text) for text in (out / "metrics.jsonl").read_text().splitlines()]
    good = [line["step"] for line in lines if not line["skipped"]]
    assert kept[-1] == f"step_{good[-1]:08d}.pt"
    assert all(line["loss"] is None for line in lines if line["skipped"])


# ---- as a user sees it ---------------------------------------------------------------------------


def test_the_installed_command_says_one_line_and_nothing_else(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "spark3d.cli", "prepare"]
    words += ["--data", str(tmp_path / "nowhere"), "--out", str(tmp_path / "store")]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == DATA
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: ")
    assert not list(tmp_path.iterdir())
