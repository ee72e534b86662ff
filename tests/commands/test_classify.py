"""`--task classify`: from a pre-trained encoder to top-1 and top-5, exactly resumable."""

import json
import logging
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import succeeds
from PIL import Image
from processes import curve, end, ranks, start, wait_for_step
from safetensors.torch import load_file
from test_resume import checkpoint_steps, stopped

from spark3d.build_images import load_classifier
from spark3d.commands import classify as classify_module
from spark3d.commands.classify import Classified, classify_command
from spark3d.commands.pretrain import pretrain_command
from spark3d.commands.report import report_command
from spark3d.engine.logging import read_metrics
from spark3d.errors import ConfigError
from spark3d.weights.exchange import load_encoder

OPTIONS = "model.options={channels: [8, 8, 16, 16], stem_width: 8}"
HERE = (
    "compute.accelerator=cpu",
    "compute.threads=1",
    "compute.workers=0",
    "compute.checkpoint_every=2",
    "log.tensorboard=false",
)
PRETRAIN = (
    "model.backbone=timm/resnet10t",
    OPTIONS,
    "objective.decoder_width=16",
    "images.crop=64",
    "optim.steps=2",
    "optim.warmup=1",
    "optim.batch=4",
    *HERE,
)
EVERYTHING = (
    "images_small_2d",
    "images.crop=32",
    "augment.policy=trivial",
    "augment.erase=0.3",
    "mix={mixup: 0.2, cutmix: 1.0}",
    "optim={name: adamw, lr: 2e-3, steps: 9, warmup: 1, batch: 6, layer_decay: 0.9, ema: 0.5}",
    *HERE,
)


def arguments(recipe: tuple[str, ...] = EVERYTHING) -> tuple[str, tuple[str, ...]]:
    return recipe[0], recipe[1:]


@pytest.fixture(scope="session")
def encoder(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("encoder") / "run"
    pretrain_command(photos / "train", run, None, PRETRAIN, dims=2)
    return run


@pytest.fixture(scope="session")
def whole(photos: Path, encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Classified:
    """A run with every piece in it that nothing interrupted."""
    return classify_command(photos, tmp_path_factory.mktemp("whole") / "run", encoder, *arguments())


def test_the_run_has_scores_after_every_epoch_and_at_the_end(whole: Classified) -> None:
    run = whole.model.parent
    lines = [line for line in read_metrics(run / "metrics.jsonl") if line["kind"] == "val"]
    assert [line["step"] for line in lines] == [3, 6, 9]  # 18 images, batch 6
    scores = json.loads((run / "scores.json").read_text())
    for name in ("top1", "top5", "loss"):
        assert scores[name] == lines[-1][name] == whole.scores[name]
    assert scores["classes"] == ["blue", "green", "red"]
    assert scores["hits"]["images"] == 9
    assert scores["top5"] == 1
    assert all(np.isfinite(loss) for _, loss, *_ in curve(run))


def test_the_model_is_one_of_timm(whole: Classified, photos: Path) -> None:
    """What the card says rebuilds the network, and timm alone loads the file strictly."""
    network, card = load_classifier(whole.model.parent)
    assert card.classes == ("blue", "green", "red")
    assert card.average == 0.5
    twin = timm.create_model(
        "resnet10t", num_classes=3, channels=[8, 8, 16, 16], stem_width=8
    ).eval()
    twin.load_state_dict(load_file(whole.model))
    crops = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(network(crops), twin(crops))


def test_the_encoder_is_loaded_and_trained_less_near_its_input(
    photos: Path, encoder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    words = (*EVERYTHING, "optim.lr=1e-12", "optim.ema=0", "optim.steps=2")
    with caplog.at_level(logging.INFO):
        done = classify_command(photos, tmp_path / "run", encoder, *arguments(words))
    assert "100.0% of the encoder" in caplog.text
    state, _ = load_encoder(encoder / "encoder.safetensors")
    kept = load_file(done.model)
    parameters = [key for key, value in state.items() if "running" not in key and value.ndim]
    assert len(parameters) > 10
    for key in parameters:
        torch.testing.assert_close(kept[key], state[key], atol=1e-9, rtol=0)


def test_learning_works_from_scratch(photos: Path, tmp_path: Path) -> None:
    """Three colours are told apart after a few epochs."""
    words = ("images_small_2d", "model.backbone=timm/resnet10t", OPTIONS, "images.crop=32")
    words += ("optim={lr: 5e-3, steps: 16, warmup: 2, batch: 9}", "log.validate_every=16", *HERE)
    assert classify_command(photos, tmp_path / "run", None, *arguments(words)).scores["top1"] == 1


@pytest.mark.parametrize("loading", ["compute.workers=0", "compute.workers=2"])
def test_a_killed_run_ends_like_the_uninterrupted_one(
    photos: Path, encoder: Path, whole: Classified, tmp_path: Path, loading: str
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    words = ["finetune", *EVERYTHING, loading, "--dims", "2", "--task", "classify"]
    words += ["--data", str(photos), "--encoder", str(encoder), "--out", str(run)]
    process = start(words, log)
    wait_for_step(process, run, 4, log)
    process.kill()
    assert end(process) == -signal.SIGKILL
    assert not (run / "model.safetensors").exists()
    succeeds(*words)
    before = whole.model.parent
    assert curve(run) == curve(before)
    kinds = [
        [x for x in read_metrics(r / "metrics.jsonl") if x["kind"] == "val"] for r in (run, before)
    ]
    assert kinds[0] == kinds[1]
    for file in ("model.safetensors", "scores.json"):
        assert (run / file).read_bytes() == (before / file).read_bytes()


def test_a_stop_is_obeyed_within_the_step(
    photos: Path, encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run() -> None:
        classify_command(photos, tmp_path, encoder, *arguments())

    stopped(monkeypatch, classify_module, 3, run)
    assert checkpoint_steps(tmp_path)[-1] == 3


def test_a_finished_run_is_left_alone_and_a_lost_model_written_again(
    photos: Path,
    encoder: Path,
    whole: Classified,
    tmp_path: Path,
    copied: Callable[[Path, Path], Path],
    caplog: pytest.LogCaptureFixture,
) -> None:
    run = copied(whole.model.parent, tmp_path / "run")
    with caplog.at_level(logging.INFO):
        again = classify_command(photos, run, encoder, *arguments())
    assert "finished already" in caplog.text
    assert again.scores == whole.scores
    content = (run / "model.safetensors").read_bytes()
    (run / "model.safetensors").write_bytes(b"damaged")
    classify_command(photos, run, encoder, *arguments())
    assert (run / "model.safetensors").read_bytes() == content


def test_a_begun_run_does_not_decode_its_images_again(
    photos: Path, encoder: Path, whole: Classified, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> None:
        raise AssertionError(f"{path} was decoded again")

    monkeypatch.setattr("spark3d.data.images2d._examine", refuse)
    assert classify_command(photos, whole.model.parent, encoder, *arguments()).model == whole.model


@pytest.mark.ddp
def test_two_ranks_share_the_validation_images(photos: Path, encoder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ["finetune", *EVERYTHING, "optim.batch=8", "--task", "classify", "--data", photos]
    codes = ranks([*words, "--encoder", encoder, "--out", run], tmp_path / "log")
    assert codes == [0, 0], (tmp_path / "log0").read_text()
    scores = json.loads((run / "scores.json").read_text())
    assert scores["hits"]["images"] == 9


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["optim.batch=5"], "pair the images of a rank's batch, which has 5"),
        (["augment.policy=rand-q1"], "augment.policy='rand-q1' is none of timm's"),
        (["images.per_class=7"], "images.per_class=7, but class blue has 6 images"),
        (["optim.layer_blocks=[1,1]"], "each of the 4 stages"),
        (["model.backbone=timm/resnet18"], "the encoder is timm/resnet10t"),
        (["optim.layerdecay=1"], "did you mean 'optim.layer_decay'?"),
        (["--dims", "3"], "dims=3"),
        (["--smoke"], "about volumes"),
    ],
)
def test_mistakes_in_the_recipe(
    photos: Path,
    encoder: Path,
    tmp_path: Path,
    fails: Callable[..., str],
    words: list[str],
    said: str,
) -> None:
    call = ["finetune", *EVERYTHING, *words, "--task", "classify", "--data", photos]
    assert said in fails(2, *call, "--encoder", encoder, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_volume_weights_and_volume_networks_are_refused(
    photos: Path, pretrained: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="pre-trained in 3D with 1 channels"):
        classify_command(photos, tmp_path / "a", pretrained, *arguments())
    words = (*EVERYTHING, "model.backbone=monai/resnet18")
    with pytest.raises(ConfigError, match="needs a network of timm"):
        classify_command(photos, tmp_path / "b", None, *arguments(words))


def test_validation_images_that_pretraining_saw_are_refused(
    photos: Path, tmp_path: Path, fails: Callable[..., str], caplog: pytest.LogCaptureFixture
) -> None:
    """By the hash of their bytes; allowed, the record and the report say so."""
    seen, out = tmp_path / "seen", tmp_path / "run"
    shutil.copytree(photos / "train", seen)
    for n in range(2):
        shutil.copy(photos / "val" / "red" / f"{n}.jpg", seen / f"renamed{n}.jpg")
    pre = pretrain_command(seen, tmp_path / "pre", None, PRETRAIN, dims=2)
    passport = load_encoder(pre)[1]
    assert len(passport.content_hashes) == 20
    call = ["finetune", *EVERYTHING, "optim.steps=2", "--task", "classify", "--data", photos]
    call += ["--encoder", pre, "--out", out]
    line = fails(3, *call)
    assert "2 of 9 validation images were seen in pre-training: red/0.jpg, red/1.jpg" in line
    assert "or pass --allow-overlap" in line
    assert not out.exists()
    with caplog.at_level(logging.WARNING):
        succeeds(*call, "--allow-overlap")
    assert "18 of 18 training images were seen in pre-training, without" in caplog.text
    overlap = json.loads((out / "run.json").read_text())["inputs"]["overlap"]
    assert overlap["pretraining"] == {"training": [18, 18], "validation": [2, 9]}
    assert "2 of 9 validation images were seen" in overlap["allowed"][0]
    page = tmp_path / "report.html"
    report_command([str(out)], page)
    assert "18 of 18 training, 2 of 9 validation images" in page.read_text()


def test_validation_images_that_are_trained_on_are_refused(
    photos: Path, tmp_path: Path, fails: Callable[..., str], copied: Callable[[Path, Path], Path]
) -> None:
    data = copied(photos, tmp_path / "photos")
    shutil.copy(data / "val" / "red" / "1.jpg", data / "train" / "red" / "other.jpg")
    scratch = ("model.backbone=timm/resnet10t", OPTIONS)
    call = ["finetune", *EVERYTHING, *scratch, "--task", "classify", "--data", data]
    said = "1 of 9 validation images are training images too: red/1.jpg; remove them"
    assert said in fails(3, *call, "--out", tmp_path / "run")
    subset = (*call, "images.per_class=1", "optim.steps=1", "optim.warmup=0", "optim.batch=2")
    succeeds(*subset, "--out", tmp_path / "few")  # which are not the copy


def test_faults_of_the_folders(
    photos: Path, tmp_path: Path, fails: Callable[..., str], copied: Callable[[Path, Path], Path]
) -> None:
    data, out = copied(photos, tmp_path / "photos"), tmp_path / "run"
    call = ["finetune", *EVERYTHING, "--task", "classify", "--data", data, "--out", out]
    (data / "val" / "blue").rename(data / "val" / "indigo")
    said = fails(3, *call)
    assert (
        "3 classes to train on, 3 for validation; only in train: blue; only in val: indigo" in said
    )
    (data / "val" / "indigo").rename(data / "val" / "blue")
    (data / "val" / "red" / "0.jpg").write_bytes(b"\xff\xd8\xff\xe0 no picture")
    assert "1 of 9 images cannot be used: red/0.jpg" in fails(3, *call)
    (data / "val").rename(data / "test")
    assert "no folder val; classification reads train/CLASS/ and val/CLASS/" in fails(3, *call)
    assert not out.exists()


def test_bad_images_up_to_a_limit_are_counted_and_named(
    photos: Path,
    tmp_path: Path,
    copied: Callable[[Path, Path], Path],
    caplog: pytest.LogCaptureFixture,
) -> None:
    data = copied(photos, tmp_path / "photos")
    (data / "train" / "red" / "0.jpg").write_bytes(b"no picture")
    with Image.open(data / "train" / "red" / "1.jpg") as image:
        grey = image.convert("L")
    grey.save(data / "train" / "red" / "1.jpg")
    words = (*EVERYTHING, "model.backbone=timm/resnet10t", OPTIONS, "images.max_bad=0.1")
    with caplog.at_level(logging.INFO):
        classify_command(data, tmp_path / "run", None, *arguments((*words, "optim.steps=2")))
    assert "17 training images; 1 left out: red/0.jpg (not an image)" in caplog.text
    assert "read as RGB: 1 of mode L" in caplog.text


def test_the_report_shows_what_was_classified(
    whole: Classified, encoder: Path, tmp_path: Path
) -> None:
    page = tmp_path / "report.html"
    report_command([f"pre={encoder}", f"fine={whole.model.parent}"], page)
    text = page.read_text()
    for words in ("classification", "Validation top-1", "Classification: validation top-5"):
        assert words in text
    shown = f"{whole.scores['top1']:.1%}"
    assert shown in text
    assert "Validation Dice" not in text
