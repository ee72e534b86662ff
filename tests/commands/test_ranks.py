"""Two processes do what one does: the same samples, masks and losses, and they end together."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import FINETUNE, PRETRAIN
from processes import curve, end, ranks, start_ranks, wait_for_step
from test_images import TINY

from spark3d.commands.finetune import finetune_command
from spark3d.commands.pretrain import pretrain_command
from spark3d.engine.logging import read_metrics
from spark3d.weights.exchange import load_encoder

pytestmark = pytest.mark.ddp
EXACT = (*PRETRAIN, "objective.min_variance=0", "optim.steps=6")
"""Every hidden cell counts, so that the mean over ranks of their means is the mean over all."""


def assert_close(run: Path, other: Path) -> None:
    """Equal but for the order in which floats are summed."""
    ours, theirs = curve(run), curve(other)
    assert [line[0] for line in ours] == [line[0] for line in theirs]
    for mine, its in zip(ours, theirs, strict=True):
        assert mine[1:] == pytest.approx(its[1:], rel=2e-3)
    assert ours[0][1:] == pytest.approx(theirs[0][1:], rel=1e-5)


@pytest.fixture(scope="module")
def alone(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process gets."""
    run = tmp_path_factory.mktemp("alone") / "run"
    pretrain_command(store, run, None, EXACT)
    return run


def test_pretraining_on_two_ranks_is_that_on_one(store: Path, alone: Path, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    codes = ranks(["pretrain", *EXACT, "--data", store, "--out", run], log)
    assert codes == [0, 0], log.with_name("log0").read_text()
    assert_close(run, alone)
    assert len(read_metrics(run / "metrics.jsonl")) == 6
    assert load_encoder(run / "encoder.safetensors")[1].steps == 6
    record = json.loads((run / "run.json").read_text())
    assert record["inputs"] == json.loads((alone / "run.json").read_text())["inputs"]


def test_a_stop_of_one_rank_stops_both_and_one_rank_goes_on(
    store: Path, alone: Path, tmp_path: Path
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    processes = start_ranks(["pretrain", *EXACT, "--data", store, "--out", run], log)
    wait_for_step(processes[0], run, 2, log.with_name("log0"))
    processes[1].terminate()
    assert [end(process) for process in processes] == [75, 75]
    assert len(curve(run)) < 6
    pretrain_command(store, run, None, EXACT)
    assert_close(run, alone)


def test_images_on_two_ranks(images: Path, tmp_path: Path) -> None:
    words = ["pretrain", *TINY, "--dims", "2", "--data", images, "--out", tmp_path / "run"]
    assert ranks(words, tmp_path / "log") == [0, 0], (tmp_path / "log0").read_text()
    state, passport = load_encoder(tmp_path / "run" / "encoder.safetensors")
    assert passport.backbone == "timm/resnet18"
    assert int(state["bn1.num_batches_tracked"]) == 5


def test_finetuning_on_two_ranks_is_that_on_one(
    store: Path, pretrained: Path, finetuned: Path, tmp_path: Path
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    words = ["finetune", *FINETUNE, "--data", store, "--encoder", pretrained, "--out", run]
    assert ranks(words, log) == [0, 0], log.with_name("log0").read_text()
    assert_close(run, finetuned)
    again = finetune_command(store, run, pretrained, None, FINETUNE)
    assert set(again.validation) == {"case2", "case3"}


@pytest.mark.parametrize(
    ("word", "code", "said"),
    [
        ("mask.ratio=0.5", 2, "another run: mask.ratio differ"),
        ("optim.batch=3", 2, "the batch over all 2 ranks, which cannot share it"),
    ],
)
def test_mistakes_end_both_ranks(
    store: Path, alone: Path, tmp_path: Path, word: str, code: int, said: str
) -> None:
    log = tmp_path / "log"
    codes = ranks(["pretrain", *EXACT, word, "--data", store, "--out", alone], log)
    assert codes == [code, code]
    assert said in log.with_name("log0").read_text()


@pytest.mark.slow
def test_torchrun(store: Path, alone: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    words += ["-m", "spark3d.cli", "pretrain", *EXACT]
    words += ["--data", str(store), "--out", str(tmp_path / "run")]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stderr
    assert_close(tmp_path / "run", alone)
