"""Folders and weights of other runs are refused in one line, and left as they were."""

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import FINETUNE, PRETRAIN, SCRATCH, Fails, snapshot, succeeds, write_phantom

from spark3d.data.store import Store
from spark3d.weights.exchange import load_encoder, save_encoder

CONFIG, DATA, MACHINE = 2, 3, 4


# ---- the output folder ---------------------------------------------------------------------------


def test_an_out_of_another_run_is_refused_and_left_alone(
    store: Path, volumes: Path, pretrained: Path, fails: Fails
) -> None:
    before = snapshot(pretrained)
    other = ["pretrain", *PRETRAIN, "--out", pretrained]
    tuning = ["finetune", *FINETUNE, *SCRATCH, "--data", store, "--out", pretrained]
    for words, said in (
        ([*other, "mask.ratio=0.5", "--data", store], "another run: mask.ratio differ"),
        ([*other, "--data", volumes / "imagesUn"], "choose a new folder"),
        (tuning, "holds a pretrain run, not finetune"),
    ):
        assert said in fails(CONFIG, *words)
        assert snapshot(pretrained) == before


def test_a_run_on_other_volumes_is_refused(
    volumes: Path, fails: Fails, tmp_path: Path, out: Path
) -> None:
    short = ("optim.steps=1", "optim.warmup=0")
    succeeds("pretrain", *PRETRAIN, *short, "--data", volumes / "imagesUn", "--out", out)
    before = snapshot(out)
    others = tmp_path / "others"
    write_phantom(others, "extra0", 50, labelled=False)
    line = fails(CONFIG, "pretrain", *PRETRAIN, *short, "--data", others, "--out", out)
    assert "others" in line
    assert snapshot(out) == before
    succeeds("pretrain", *PRETRAIN, *short, "--data", out / "store", "--out", out)
    assert snapshot(out) == before


@pytest.mark.parametrize("command", ["pretrain", "finetune"])
def test_an_unrelated_folder_is_left_alone(
    volumes: Path, fails: Fails, out: Path, command: str
) -> None:
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    line = fails(CONFIG, command, "--data", volumes, "--out", out)
    assert "not empty (thesis.tex)" in line
    assert snapshot(out) == {"thesis.tex": b"years of work"}
    assert [file.name for file in out.iterdir()] == ["thesis.tex"]


def test_a_file_is_no_out(store: Path, fails: Fails, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    words = ["pretrain", *PRETRAIN, "--data", store, "--out"]
    assert "is a file" in fails(CONFIG, *words, file)
    assert "cannot write --out" in fails(MACHINE, *words, file / "run")


def test_an_unreadable_record_is_refused(store: Path, fails: Fails, out: Path) -> None:
    out.mkdir()
    (out / "run.json").write_text("{")
    line = fails(CONFIG, "pretrain", *PRETRAIN, "--data", store, "--out", out)
    assert "run.json that cannot be read" in line


def test_a_second_process_on_the_same_run_is_sent_away(
    store: Path, fails: Fails, tmp_path: Path, out: Path
) -> None:
    out.mkdir()
    hold = (
        "import fcntl, sys; lock = open(sys.argv[1], 'w'); fcntl.lockf(lock, fcntl.LOCK_EX);"
        "print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(out / ".lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        line = fails(MACHINE, "pretrain", *PRETRAIN, "--data", store, "--out", out)
        other.kill()
    assert "another process is at work" in line


def test_what_a_kill_left_at_the_start_does_not_bar_the_folder(store: Path, out: Path) -> None:
    out.mkdir()
    (out / "recipe.yaml").write_text("dims: 3\n")
    (out / ".run.json.123.tmp").write_text("{")
    short = ("optim.steps=1", "optim.warmup=0")
    succeeds("pretrain", *PRETRAIN, *short, "--data", store, "--out", out)
    assert not (out / ".run.json.123.tmp").exists()


# ---- weights -------------------------------------------------------------------------------------


def finetune_words(store: Path, out: Path, encoder: Path, *more: str) -> list[str | Path]:
    return ["finetune", *FINETUNE, *more, "--data", store, "--out", out, "--encoder", encoder]


def test_an_encoder_of_another_backbone(
    store: Path, pretrained: Path, fails: Fails, out: Path
) -> None:
    other = "model.backbone=monai/resnet10"
    line = fails(CONFIG, *finetune_words(store, out, pretrained, other))
    assert "the encoder is monai/segresnet" in line
    assert not out.exists()


def test_an_encoder_of_other_options(
    store: Path, pretrained: Path, fails: Fails, out: Path
) -> None:
    wide = "model.options={init_filters: 16, blocks_down: [1, 1, 1], blocks_up: [1, 1]}"
    line = fails(CONFIG, *finetune_words(store, out, pretrained, *SCRATCH, wide))
    assert "model.options.init_filters=16: the encoder was pre-trained with init_filters=8" in line
    assert not out.exists()


def test_a_damaged_encoder(
    store: Path, pretrained: Path, fails: Fails, tmp_path: Path, out: Path
) -> None:
    for name in ("encoder.safetensors", "encoder.json"):
        shutil.copy(pretrained / name, tmp_path / name)
    file = tmp_path / "encoder.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert "is damaged" in fails(DATA, *finetune_words(store, out, file))
    (tmp_path / "encoder.json").write_text("{")
    assert "no valid JSON" in fails(DATA, *finetune_words(store, out, file))
    (tmp_path / "encoder.json").unlink()
    assert "encoder.json not found" in fails(DATA, *finetune_words(store, out, file))
    assert not out.exists()


def test_a_run_whose_checkpoints_are_all_damaged(
    store: Path, pretrained: Path, fails: Fails, out: Path
) -> None:
    shutil.copytree(pretrained, out)
    (out / "encoder.safetensors").unlink()
    for file in (out / "checkpoints").glob("*.pt"):
        file.write_bytes(file.read_bytes()[:-1])
    line = fails(DATA, "pretrain", *PRETRAIN, "--data", store, "--out", out)
    assert "every checkpoint" in line


def test_validation_volumes_seen_in_pretraining(
    store: Path, pretrained: Path, fails: Fails, tmp_path: Path, out: Path
) -> None:
    state, passport = load_encoder(pretrained / "encoder.safetensors")
    seen = next(r.content_hash for r in Store.open(store).cases if r.id == "case2")
    leaky = replace(passport, content_hashes=(*passport.content_hashes, seen))
    save_encoder(tmp_path / "encoder.safetensors", state, leaky)
    words = finetune_words(store, out, tmp_path / "encoder.safetensors", "optim.steps=1")
    line = fails(DATA, *words, "optim.warmup=0")
    assert "1 validation volumes were seen in pre-training: case2" in line
    assert "--allow-overlap" in line
    assert not out.exists()
    succeeds(*words, "optim.warmup=0", "--allow-overlap")
    assert (out / "model.safetensors").is_file()


def test_predicting_without_a_model(volumes: Path, fails: Fails, tmp_path: Path, out: Path) -> None:
    (tmp_path / "run").mkdir()
    line = fails(DATA, "predict", "--model", tmp_path / "run", "--data", volumes, "--out", out)
    assert "no model.safetensors" in line
    assert not out.exists()
