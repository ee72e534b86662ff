"""`--dims 2`: the same objective on ordinary images with a network of timm."""

import logging
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import Fails
from processes import curve, end, start, wait_for_step

from spark3d.cli import main
from spark3d.commands.pretrain import TrainingStep, asked_recipe, pretrain_command
from spark3d.sparse.encoder import SparseEncoder
from spark3d.weights.exchange import load_encoder

TINY = (
    "model.backbone=timm/resnet18",
    "objective.decoder_width=16",
    "images.crop=64",
    "images.max_bad=0.5",
    "optim.steps=5",
    "optim.warmup=1",
    "optim.batch=4",
    "compute.accelerator=cpu",
    "compute.threads=1",
    "compute.workers=0",
    "compute.checkpoint_every=1",
    "log.tensorboard=false",
)


@pytest.fixture(scope="module")
def run(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images-run") / "run"
    pretrain_command(images, folder, None, TINY, dims=2)
    return folder


def test_without_a_recipe_images_get_one_of_their_own() -> None:
    for recipe in (asked_recipe(None, (), 2), asked_recipe(None, ("dims=2",), None)):
        assert recipe.dims == 2
        assert recipe.model.backbone == "timm/resnet50"
        assert recipe.model.in_channels == 3
    assert asked_recipe(None, (), None).model.backbone == "monai/segresnet"


def test_the_encoder_is_the_one_of_timm(run: Path) -> None:
    state, passport = load_encoder(run / "encoder.safetensors")
    assert (passport.backbone, passport.ndim, passport.in_channels) == ("timm/resnet18", 2, 3)
    assert passport.intensity == {"normalise": "imagenet"}
    assert passport.spacing_mm is None
    network = timm.create_model("resnet18", num_classes=0)
    network.load_state_dict(state)  # strictly
    network.eval()

    twin = timm.create_model("resnet18", num_classes=0)
    twin.load_state_dict(state)
    twin.eval()
    picture = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        stages = SparseEncoder(twin, ("layer1", "layer2", "layer3", "layer4"), 2).dense(picture)
        torch.testing.assert_close(stages[-1], network.forward_features(picture))
    assert float(stages[-1].std()) > 0


def test_training_moves_the_encoder(run: Path) -> None:
    state, _ = load_encoder(run / "encoder.safetensors")
    torch.manual_seed(0)
    assert int(state["bn1.num_batches_tracked"]) == 5
    assert [step for step, *_ in curve(run)] == [1, 2, 3, 4, 5]
    assert all(np.isfinite(loss) for _, loss, *_ in curve(run))


def test_unreadable_images_are_counted_and_named(
    images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        pretrain_command(images, tmp_path, None, (*TINY, "optim.steps=1", "optim.warmup=0"), dims=2)
    assert "6 images; 1 left out: class0/broken.jpg (" in caplog.text
    assert "read as RGB: 1 of mode L" in caplog.text


def test_a_killed_run_ends_like_the_uninterrupted_one(
    images: Path, run: Path, tmp_path: Path
) -> None:
    target, log = tmp_path / "run", tmp_path / "log"
    words = ["pretrain", *TINY, "--dims", "2", "--data", images, "--out", target]
    process = start(words, log)
    wait_for_step(process, target, 2, log)
    process.kill()
    end(process)
    assert not (target / "encoder.safetensors").exists()
    pretrain_command(images, target, None, TINY, dims=2)
    assert curve(target) == curve(run)
    weights = [(folder / "encoder.safetensors").read_bytes() for folder in (target, run)]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["model.in_channels=1"], 2, "set model.in_channels=3"),
        (["images.crop=60"], 2, "images.crop=(60, 60) is not a multiple of mask.cell_size"),
        (["data.crop=32"], 2, "leave data.crop out, or set images.crop"),
        (["data.augment.flips=[1, 1]"], 2, "data.augment: for volumes, images have images.crop, "),
        (["data.window={mode: unit}", "data.jitter=0"], 2, "but data.window, data.jitter: for"),
        (["images.max_bad=0.01"], 3, "class0/broken.jpg ("),
        (["model.backbone=timm/resnet19"], 2, "close names: resnet18"),
    ],
)
def test_mistakes(
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    code: int,
    said: str,
) -> None:
    arguments = ["pretrain", *TINY, *words, "--dims", "2", "--data", str(images)]
    with pytest.raises(SystemExit) as left:
        main([*arguments, "--out", str(tmp_path / "run")])
    errors = [e for e in capsys.readouterr().err.splitlines() if e.startswith("error: ")]
    assert left.value.code == code
    assert len(errors) == 1
    assert said in errors[0]
    assert not (tmp_path / "run").exists()


def test_pixels_and_weights_are_channels_last(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What convolutions in 2D are fastest with, up to the forward pass."""
    seen, forward = [], TrainingStep.forward

    def noting(self: TrainingStep, crops: torch.Tensor, visible: torch.Tensor) -> object:
        weight = self.objective.encoder.network.get_parameter("conv1.weight")
        seen.extend(x.is_contiguous(memory_format=torch.channels_last) for x in (crops, weight))
        return forward(self, crops, visible)

    monkeypatch.setattr(TrainingStep, "forward", noting)
    pretrain_command(images, tmp_path, None, (*TINY, "optim.steps=1", "optim.warmup=0"), dims=2)
    assert seen == [True, True]


def test_excluding_cases_is_about_volumes(images: Path, tmp_path: Path, fails: Fails) -> None:
    words = ["pretrain", *TINY, "--dims", "2", "--data", images, "--exclude", "btcv-monai-24-6"]
    assert "give --data a folder without those" in fails(2, *words, "--out", tmp_path / "run")


def test_no_image_inside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit) as left:
        main(["pretrain", "--dims", "2", "--data", str(tmp_path / "empty"), "--out", "x"])
    assert left.value.code == 3
    assert "--dims 3 for volumes" in capsys.readouterr().err
