"""What fine-tuning adds: all of it together resumed exactly; averaged, frozen, supervised."""

from pathlib import Path

import pytest
import torch
from conftest import FINETUNE, Fails
from processes import curve
from test_resume import assert_same_finetuning, stopped

from spark3d.build import load_segmenter
from spark3d.commands import finetune as finetune_module
from spark3d.commands.finetune import finetune_command
from spark3d.engine.checkpoint import Checkpoints
from spark3d.weights.exchange import load_encoder

DYNUNET = (
    "model.backbone=monai/dynunet",
    "model.options={filters: [4, 8, 8], strides: [1, 2, 2]}",
    "model.deep_supervision=true",
)
EVERYTHING = (
    *FINETUNE,
    "model.balance=false",
    "model.decoder=unet",
    "model.feature_size=4",
    "model.deep_supervision=true",
    "model.batch_norm=estimate",
    "optim.accumulate=2",
    "optim.ema=0.9",
    "optim.layer_decay=0.7",
    "optim.freeze_steps=4",
    "optim.precision=bf16-mixed",
)


@pytest.fixture(scope="module")
def whole(store: Path, pretrained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with every option, never stopped."""
    run = tmp_path_factory.mktemp("everything") / "run"
    finetune_command(store, run, pretrained, None, EVERYTHING)
    return run


def test_a_run_with_every_option_resumes_bit_for_bit(
    store: Path, pretrained: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run() -> None:
        finetune_command(store, tmp_path, pretrained, None, EVERYTHING)

    stopped(monkeypatch, finetune_module, 3, run)  # frozen until step 4
    run()
    assert_same_finetuning(tmp_path, whole)


def test_the_average_is_what_is_saved_and_predicts(whole: Path) -> None:
    state = Checkpoints(whole / "checkpoints").latest()
    assert state is not None
    saved = load_segmenter(whole).network.state_dict()
    assert all(torch.equal(saved[key], value) for key, value in state["average"].items())
    assert any(not torch.equal(saved[key], value) for key, value in state["network"].items())


def test_the_encoder_is_frozen_until_its_step(whole: Path, pretrained: Path) -> None:
    weights, passport = load_encoder(pretrained / "encoder.safetensors")
    checkpoints = Checkpoints(whole / "checkpoints", keep=9)
    assert [file.stem[-1] for file in checkpoints.files()] == ["6", "8"]
    moved = torch.load(checkpoints.files()[0], weights_only=True)["network"]
    assert any(not torch.equal(moved[f"encoder.{k}"], v) for k, v in weights.items())
    assert passport.backbone == "monai/segresnet"


def test_nothing_of_a_frozen_encoder_changes(store: Path, pretrained: Path, tmp_path: Path) -> None:
    options = (*FINETUNE, "model.balance=false", "optim.freeze_steps=99", "optim.steps=3")
    finetune_command(store, tmp_path / "run", pretrained, None, options)
    weights, _ = load_encoder(pretrained / "encoder.safetensors")
    tuned = load_segmenter(tmp_path / "run").network.state_dict()
    assert all(torch.equal(tuned[key], value) for key, value in weights.items())
    losses = [line[1] for line in curve(tmp_path / "run")]
    assert len(set(losses)) == 3


def test_a_network_with_deep_supervision_trains_from_scratch_and_loads(
    store: Path, tmp_path: Path
) -> None:
    options = (*FINETUNE, *DYNUNET, "optim.steps=2")
    finetune_command(store, tmp_path / "run", None, None, options)
    network = load_segmenter(tmp_path / "run").network
    assert network(torch.zeros(1, 1, 16, 16, 16)).shape == (1, 4, 16, 16, 16)


def test_a_batch_that_cannot_be_divided_is_refused(store: Path, out: Path, fails: Fails) -> None:
    told = fails(
        2, "finetune", *FINETUNE, "model.backbone=monai/segresnet", "optim.accumulate=3",
        "--data", store, "--out", out,
    )  # fmt: skip
    assert "optim.batch=2 over 1 ranks cannot be divided by optim.accumulate=3" in told
    assert "nearest batch that can is 3" in told
    assert not out.exists()
