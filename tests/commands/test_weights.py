"""`spark3d weights` and `pretrain --init`: there and back, and what is refused."""

import logging
import os
from pathlib import Path

import pytest
import timm
import torch
from conftest import PRETRAIN, Fails, succeeds
from processes import curve
from safetensors.torch import load_file

from spark3d.commands.pretrain import pretrain_command
from spark3d.weights.exchange import OBJECTIVE, load_encoder

NAME, OPTIONS = "resnet10t", {"channels": (8, 16, 24, 32)}
QUICK = (
    "optim.steps=2",
    "optim.warmup=0",
    "optim.batch=2",
    "compute.accelerator=cpu",
    "compute.threads=1",
    "compute.workers=0",
    "log.tensorboard=false",
)
IMAGES = (
    *QUICK,
    f"model.backbone=timm/{NAME}",
    "model.options={channels: [8, 16, 24, 32]}",
    "objective.decoder_width=16",
    "images.crop=64",
    "images.max_bad=0.5",
)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of timm's training script."""
    torch.manual_seed(3)
    model = timm.create_model(NAME, **OPTIONS)
    file = tmp_path_factory.mktemp("theirs") / "model_best.pth.tar"
    state = {f"module.{key}": value for key, value in model.state_dict().items()}
    torch.save({"epoch": 7, "arch": NAME, "state_dict": state}, file)
    return file


@pytest.fixture(scope="module")
def imported(theirs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("imported") / "weights"
    options = "{channels: [8, 16, 24, 32]}"
    succeeds(
        "weights", "import", theirs, "--as", f"timm/{NAME}", "--options", options, "--out", folder
    )
    return folder


def test_from_timm_through_more_pretraining_and_back(
    imported: Path, theirs: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a step the file that timm loads strictly holds what timm saved; with some, others."""
    back = tmp_path / "back.safetensors"
    capsys.readouterr()
    succeeds("weights", "export", imported, "--to", "timm", "--out", back)
    said = capsys.readouterr().out
    assert "timm loads the file strictly" in said
    first = torch.load(theirs, weights_only=True)["state_dict"]
    again = load_file(back)
    assert all(torch.equal(value, first[f"module.{key}"]) for key, value in again.items())
    line = next(line for line in said.splitlines() if line.startswith("timm.create_model("))
    model = eval(line, {"timm": timm})  # what the command tells the user to run
    assert model.num_classes == 0

    run = pretrain_command(images, tmp_path / "run", None, IMAGES, dims=2, init=imported).parent
    passport = load_encoder(run)[1]
    assert passport.history[-1].startswith("went on from ")
    after = tmp_path / "new" / "after.safetensors"
    succeeds("weights", "export", run, "--to", "timm", "--out", after)
    trained = timm.create_model(
        NAME, num_classes=0, checkpoint_path=str(after), channels=OPTIONS["channels"]
    )
    assert any(
        not torch.equal(value, first[f"module.{key}"])
        for key, value in trained.state_dict().items()
        if "conv" in key
    )
    assert {file.name for file in after.parent.iterdir()} == {after.name}


def test_an_inflated_encoder_fine_tunes(imported: Path, store: Path, tmp_path: Path) -> None:
    grown = tmp_path / "grown"
    succeeds("weights", "inflate", imported, "--in-channels", "1", "--out", grown)
    passport = load_encoder(grown)[1]
    assert (passport.ndim, passport.in_channels, passport.options["depth"]) == (3, 1, "mean")
    run = tmp_path / "run"
    short = ("optim.steps=1", "window_overlap=0", "data.crop=32")
    words = ["finetune", *QUICK, *short, "--data", store, "--encoder", grown, "--out", run]
    succeeds(*words)
    assert (run / "model.safetensors").is_file()


def test_pretraining_goes_on_from_a_run(
    store: Path, pretrained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Encoder and decoder go on; the passport counts all steps and volumes; a resume needs both."""
    recipe = (*PRETRAIN, *QUICK)
    rest = load_file(pretrained / OBJECTIVE)
    with caplog.at_level(logging.INFO):
        pretrain_command(store, tmp_path / "run", None, recipe, init=pretrained)
    assert f"decoder and tokens: {len(rest)} tensors go on" in caplog.text
    before, after = load_encoder(pretrained)[1], load_encoder(tmp_path / "run")[1]
    assert after.steps == before.steps + 2
    assert set(after.content_hashes) >= set(before.content_hashes)
    assert curve(tmp_path / "run")[0][1] < curve(pretrained)[0][1]  # the same batch and masks

    caplog.clear()
    with caplog.at_level(logging.INFO):
        other = (*recipe, "objective.decoder_width=8", "optim.steps=1")
        pretrain_command(store, tmp_path / "other", None, other, init=pretrained)
    assert "decoder and tokens start from random weights: " in caplog.text
    assert " was (" in caplog.text or "in one of the two" in caplog.text


def test_another_start_is_another_run(
    store: Path, pretrained: Path, tmp_path: Path, fails: Fails
) -> None:
    run = tmp_path / "run"
    pretrain_command(store, run, None, (*PRETRAIN, *QUICK))
    words = ["pretrain", *PRETRAIN, *QUICK, "--data", store, "--out", run, "--init", pretrained]
    assert "is another run: init differ" in fails(2, *words)


def test_a_damaged_objective_is_refused(
    store: Path, pretrained: Path, tmp_path: Path, copied: object, fails: Fails
) -> None:
    run = copied(pretrained, tmp_path / "copy")  # type: ignore[operator]
    with (run / OBJECTIVE).open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    words = ["pretrain", *PRETRAIN, "--data", store, "--out", tmp_path / "run", "--init", run]
    assert "objective.safetensors is damaged" in fails(3, *words)


class Runs:
    """A pickle that runs a program when it is read."""

    def __reduce__(self) -> tuple:
        return os.system, ("exit 1",)


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["import", "THEIRS", "--as", "timm/resnet18"], 2, "not a timm/resnet18: it has"),
        (
            ["import", "THEIRS", "--as", "timm/resnet10t", "--options", "[1]"],
            2,
            "must be a mapping",
        ),
        (["import", "THEIRS", "--as", "timm/resnet10t", "--entry", "ema"], 2, "state_dict"),
        (["import", "gone.pth", "--as", "timm/resnet10t"], 3, "gone.pth is no file"),
        (["import", "CODE", "--as", "timm/resnet10t"], 3, "asks for posix.system, which loading"),
        (
            ["import", "MORE", "--as", f"timm/{NAME}", "--options", "{channels: [8, 16, 24, 32]}"],
            2,
            "1 keys that it lacks (neck.weight)",
        ),
        (["import", "THEIRS", "--as", "timm/resnet10"], 2, "close names: resnet10t"),
        (["inflate", "THEIRS"], 3, "weights import FILE --as BACKBONE"),
        (["inflate", "SEG"], 2, "is 3D already"),
        (["channels", "gone", "--to", "1"], 3, "gone not found"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(
    words: list[str],
    code: int,
    said: str,
    theirs: Path,
    pretrained: Path,
    tmp_path: Path,
    fails: Fails,
) -> None:
    code_file, more = tmp_path / "code.pth", tmp_path / "more.pth"
    torch.save({"state_dict": Runs()}, code_file)
    state = torch.load(theirs, weights_only=True)["state_dict"]
    torch.save({**state, "module.neck.weight": torch.zeros(2)}, more)
    places = {"THEIRS": theirs, "SEG": pretrained}
    places |= {"CODE": code_file, "MORE": more}
    given = [places.get(word, word) for word in words]
    assert said in fails(code, "weights", *given, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["import", "export", "inflate", "channels"])
def test_help_shows_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    succeeds("weights", name, "--help")
    assert f"spark3d weights {name} " in " ".join(capsys.readouterr().out.split())


def test_outputs_are_never_overwritten(
    imported: Path, pretrained: Path, tmp_path: Path, fails: Fails
) -> None:
    told = fails(2, "weights", "channels", imported, "--to", "1", "--out", imported)
    assert "choose a new one" in told
    told = fails(2, "weights", "export", pretrained, "--to", "timm", "--out", "a.safetensors")
    assert "timm has 2D networks, this encoder is monai/segresnet in 3D" in told
    assert not Path("a.safetensors").exists()
    assert "must be a new .safetensors" in fails(
        2, "weights", "export", imported, "--to", "timm", "--out", imported
    )
    mine = tmp_path / "mine.safetensors"
    mine.write_bytes(b"mine")
    words = ("weights", "export", imported, "--to", "timm", "--out", mine)
    assert "mine.safetensors exists; choose a new file" in fails(2, *words)
    assert mine.read_bytes() == b"mine"


def test_init_of_another_network_names_what_to_set(
    store: Path, imported: Path, tmp_path: Path, fails: Fails
) -> None:
    words = ["pretrain", *PRETRAIN, "--data", store, "--out", tmp_path / "run"]
    told = fails(2, *words, "--init", imported)
    assert f"model.backbone=timm/{NAME}, dims=2" in told
