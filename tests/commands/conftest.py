"""A tiny labelled data set, a store of it, and the overrides that make every training tiny."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from spark3d.cli import main
from spark3d.commands.finetune import Finetuned, finetune_command
from spark3d.commands.prepare import prepare_command
from spark3d.commands.pretrain import pretrain_command
from spark3d.data.io import write_volume
from spark3d.data.phantom import make_phantom

Fails = Callable[..., str]
SIZE, SPACING = (44, 36, 32), (7.0, 8.0, 10.0)
ORGANS = {"liver": (6,), "spleen": (1,), "kidneys": (2, 3)}
NETWORK = (
    "model.options={init_filters: 8, blocks_down: [1, 1, 1], blocks_up: [1, 1]}",
    "compute.accelerator=cpu",
    "compute.checkpoint_every=2",
    "compute.threads=1",
    "log.tensorboard=false",
)
PRETRAIN = (
    *NETWORK,
    "mask.cell_size=8",
    "objective.decoder_width=16",
    "data.crop=16",
    "optim.batch=2",
    "optim.steps=10",
    "optim.warmup=2",
)
FINETUNE = (*NETWORK, "data.crop=16", "optim.batch=2", "optim.steps=8", "optim.warmup=1")
COLOURS = {"blue": (50, 50, 220), "green": (40, 200, 60), "red": (220, 60, 50)}
SCRATCH = ("model.backbone=monai/segresnet",)


def write_phantom(folder: Path, name: str, seed: int, labelled: bool) -> dict[str, str]:
    """One phantom of three organs; its entry in `dataset.json`."""
    phantom = make_phantom(seed, SIZE, SPACING)
    affine = np.diag([*SPACING, 1.0])
    part = "Tr" if labelled else "Un"
    files = {"image": f"images{part}/{name}.nii.gz"}
    (folder / f"images{part}").mkdir(parents=True, exist_ok=True)
    write_volume(folder / files["image"], phantom.hu, affine)
    if labelled:
        files["label"] = f"labelsTr/{name}.nii.gz"
        (folder / "labelsTr").mkdir(exist_ok=True)
        merged = np.zeros(SIZE, np.uint8)
        for value, parts in enumerate(ORGANS.values(), start=1):
            merged[np.isin(phantom.labels, parts)] = value
        write_volume(folder / files["label"], merged, affine)
    return files


@pytest.fixture(scope="session")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Decathlon task: two cases to train on, two for validation, three without label."""
    folder = tmp_path_factory.mktemp("data") / "task"
    cases = [write_phantom(folder, f"case{n}", n, labelled=True) for n in range(4)]
    extra = [write_phantom(folder, f"extra{n}", 10 + n, labelled=False) for n in range(3)]
    description = {
        "modality": {"0": "CT"},
        "labels": {"0": "background", **{str(n): o for n, o in enumerate(ORGANS, start=1)}},
        "training": cases[:2],
        "validation": cases[2:],
        "unlabelled": [entry["image"] for entry in extra],
    }
    (folder / "dataset.json").write_text(json.dumps(description))
    return folder


@pytest.fixture(scope="session")
def store(volumes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The task, prepared."""
    folder = tmp_path_factory.mktemp("store") / "store"
    prepare_command(volumes, folder, workers=0, console=Console(quiet=True))
    return folder


@pytest.fixture(scope="session")
def pretrained(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished pre-training that nothing interrupted."""
    run = tmp_path_factory.mktemp("pretrained") / "run"
    pretrain_command(store, run, None, PRETRAIN)
    return run


@pytest.fixture(scope="session")
def tuned(store: Path, pretrained: Path, tmp_path_factory: pytest.TempPathFactory) -> Finetuned:
    """What a fine-tuning from that encoder returned."""
    run = tmp_path_factory.mktemp("finetuned") / "run"
    return finetune_command(store, run, pretrained, None, FINETUNE)


@pytest.fixture(scope="session")
def finetuned(tuned: Finetuned) -> Path:
    """A finished fine-tuning that nothing interrupted."""
    return tuned.model.parent


@pytest.fixture(scope="session")
def finetuned2d(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished fine-tuning from scratch of a 2D network on axial slices."""
    run = tmp_path_factory.mktemp("finetuned2d") / "run"
    return finetune_command(store, run, None, None, ("dims=2", *SCRATCH, *FINETUNE)).model.parent


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six small pictures in two classes, PNG and JPEG, one grey; and a file that is none."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for n in range(6):
        side = 70 + 7 * n
        pixels = rng.integers(0, 256, (8, 9, 3), dtype=np.uint8)
        picture = Image.fromarray(pixels).resize((side, side + 5), Image.Resampling.BICUBIC)
        place = folder / f"class{n % 2}"
        place.mkdir(exist_ok=True)
        if n == 5:
            picture = picture.convert("L")
        picture.save(place / (f"p{n}.png" if n % 2 else f"p{n}.jpg"))
    (folder / "class0" / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no picture")
    return folder


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes told apart by their colour, six to train on and three for validation."""
    folder = tmp_path_factory.mktemp("photos")
    for part, count in (("train", 6), ("val", 3)):
        rng = np.random.default_rng(count)
        for name, colour in COLOURS.items():
            (folder / part / name).mkdir(parents=True)
            for n in range(count):
                pixels = np.clip(np.array(colour) + rng.normal(0, 30, (40, 46, 3)), 0, 255)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / part / name / f"{n}.jpg")
    return folder


@pytest.fixture
def copied() -> Callable[[Path, Path], Path]:
    """Copies a run folder, for a test that changes it."""
    return lambda run, target: Path(shutil.copytree(run, target))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Where a command is to write."""
    return tmp_path / "out"


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Fails:
    """Runs a command that must fail with this exit code; returns the one line it says."""

    def run(code: int, *arguments: str | Path) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main([str(argument) for argument in arguments])
        said = capsys.readouterr().err
        assert left.value.code == code, said
        lines = [line for line in said.splitlines() if line.strip()]
        assert [line.startswith("error: ") for line in lines].count(True) == 1, said
        assert lines[-1].startswith("error: ")
        assert "Traceback" not in said
        assert not [f for f in tmp_path.rglob("*") if f.name.endswith((".tmp", ".part"))]
        return lines[-1]

    return run


def succeeds(*arguments: str | Path) -> None:
    """Run a command that must succeed."""
    with pytest.raises(SystemExit) as left:
        main([str(argument) for argument in arguments])
    assert left.value.code == 0


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file of a folder but locks."""
    files = [file for file in folder.rglob("*") if file.is_file() and file.name != ".lock"]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}
