"""Frozen protocols say what the published recipes say, cannot be changed, and run end to end."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from spark3d import protocols
from spark3d.cli import main
from spark3d.commands.evaluate import evaluate_command
from spark3d.commands.finetune import finetune_command
from spark3d.commands.predict import predict_command
from spark3d.commands.predict_cases import held_out_cases
from spark3d.commands.report import report_command
from spark3d.config import FinetuneRecipe, WindowSection, find_recipe, load_recipe
from spark3d.data.io import write_volume
from spark3d.data.phantom import make_phantom
from spark3d.data.splits import named_split
from spark3d.errors import ConfigError, DataError
from spark3d.protocols import read_protocol

FOLDER = Path(__file__).resolve().parents[1] / "configs" / "protocols"
NAMES = sorted(file.stem for file in FOLDER.glob("*.yaml"))
SIZE, SPACING = (40, 32, 28), (8.0, 9.0, 12.0)
TINY = (
    "model.backbone=monai/segresnet",
    "model.options={init_filters: 8, blocks_down: [1, 1, 1], blocks_up: [1, 1]}",
    "compute.accelerator=cpu",
    "compute.threads=1",
    "log.tensorboard=false",
)

# spacing; probability of flip, quarter turn, scale, shift; lr, schedule, steps, warm-up
# (epochs of 24 volumes, but 18 for synapse-18-12, one volume of 4 crops a step); overlap
BTCV = {
    "btcv_unetr": ((1.5, 1.5, 2.0), 0.2, 0.2, 0.1, 0.1, 1e-4, "cosine", 5000 * 24, 50 * 24, 0.5),
    "btcv_monai_notebook": ((1.5, 1.5, 2.0), 0.1, 0.1, 0.0, 0.5, 1e-4, "constant", 30_000, 0, 0.25),
    "btcv_voco": ((1.5, 1.5, 1.5), 0.2, 0.2, 0.1, 0.5, 3e-4, "cosine", 3000 * 24, 100 * 24, 0.75),
    "btcv_hi_end_mae": ((1.5,) * 3, 0.2, 0.2, 0.1, 0.1, 1e-4, "cosine", 500 * 24, 50 * 24, 0.5),
    "btcv-80-20": ((1.5, 1.5, 2.0), 0.2, 0.2, 0.1, 0.1, 1e-4, "cosine", 5000 * 24, 50 * 24, 0.5),
    "btcv-monai-24-6": ((1.5, 1.5, 2.0), 0.1, 0.1, 0.0, 0.5, 1e-4, "constant", 30_000, 0, 0.25),
    "btcv-synapse-18-12": (
        (1.5, 1.5, 2.0), 0.2, 0.2, 0.1, 0.1, 1e-4, "cosine", 5000 * 18, 50 * 18, 0.5,
    ),
}  # fmt: skip
# task, training cases, channels, labels; clip low, high, mean, std; spacing; patch
MSD = {
    "brain-tumour": ("01", 484, 4, 3, None, (1, 1, 1), (128, 128, 128)),
    "heart": ("02", 20, 1, 1, None, (1.25, 1.25, 1.37), (160, 192, 80)),
    "liver": ("03", 131, 1, 2, (-17, 201, 99.40, 39.36), (0.77, 0.77, 1), (128, 128, 128)),
    "hippocampus": ("04", 260, 1, 2, None, (1, 1, 1), (40, 56, 40)),
    "prostate": ("05", 32, 2, 2, None, (0.62, 0.62, 3.6), (320, 256, 20)),
    "lung": ("06", 63, 1, 1, (-1024, 325, -158.58, 324.7), (0.79, 0.79, 1.24), (192, 160, 80)),
    "pancreas": ("07", 281, 1, 2, (-96, 215, 77.99, 75.4), (0.8, 0.8, 2.5), (224, 224, 40)),
    "hepatic-vessel": ("08", 303, 1, 2, (-3, 243, 104.37, 52.62), (0.8, 0.8, 1.5), (192, 192, 64)),
    "spleen": ("09", 41, 1, 1, (-41, 176, 99.29, 39.47), (0.79, 0.79, 1.6), (192, 160, 64)),
    "colon": ("10", 126, 1, 1, (-30, 165.82, 62.18, 32.65), (0.78, 0.78, 3), (192, 160, 56)),
}


def test_every_named_protocol_is_there() -> None:
    assert {f"msd-{name}" for name in MSD} | {"openkbp"} | {
        name for name in BTCV if "-" in name
    } == set(NAMES)


@pytest.mark.parametrize("name", BTCV)
def test_btcv_columns(name: str) -> None:
    published = "-" in name
    recipe = (
        read_protocol(name).recipe()
        if published
        else (load_recipe(FinetuneRecipe, find_recipe(name, "finetune")))
    )
    spacing, flip, turn, scale, shift, lr, schedule, steps, warmup, overlap = BTCV[name]
    data, optim = recipe.data, recipe.optim
    assert data.spacing_mm == spacing
    assert data.window == WindowSection(mode="unit", low=-175, high=250, scale=1.0)
    assert (data.crop, data.crops_per_case, data.class_crops) == ((96, 96, 96), 4, 0.5)
    assert data.augment.flips == (flip,) * 3
    assert data.augment.rot90 == turn
    assert data.augment.intensity == (scale, shift, 0.0)
    assert (data.augment.scale, data.augment.shift, data.augment.affine) == (0.1, 0.1, 0.0)
    assert (data.augment.degrees, data.augment.zoom) == (0.0, (0.8, 1.25))  # as sealed
    assert (optim.name, optim.lr, optim.weight_decay) == ("adamw", lr, 1e-5)
    assert (optim.schedule, optim.steps, optim.warmup, optim.batch) == (schedule, steps, warmup, 4)
    assert recipe.window_overlap == overlap
    smooth = (True, (0.0, 1e-6)) if name == "btcv_hi_end_mae" else (False, (1e-5, 1e-5))
    assert (recipe.loss.squared, recipe.loss.smooth) == smooth
    assert recipe.split.name == (name if published else "btcv-monai-24-6")
    eight = (1, 2, 3, 4, 6, 7, 8, 11)
    assert recipe.score.labels == (eight if name == "btcv-synapse-18-12" else ())
    if published:
        assert len(read_protocol(name).labels) == 13
        assert "data_prep.btcv" in read_protocol(name).prepare


@pytest.mark.parametrize("name", MSD)
def test_msd_table(name: str) -> None:
    task, cases, channels, labels, window, spacing, patch = MSD[name]
    protocol = read_protocol(f"msd-{name}")
    recipe = protocol.recipe()
    assert f"Task{task}_" in protocol.about
    assert f"Task{task}_" in protocol.prepare
    assert dict(protocol.cases) == {"training": cases}
    assert len(protocol.labels) == labels
    assert recipe.model.in_channels == channels
    assert recipe.data.spacing_mm == spacing
    assert recipe.data.crop == patch
    low, high, mean, std = window or (None,) * 4
    assert recipe.data.window == WindowSection(
        mode="zscore", low=low, high=high, mean=mean, std=std
    )
    assert (recipe.optim.name, recipe.optim.lr, recipe.optim.schedule) == ("sgd", 1e-3, "poly")


def test_openkbp() -> None:
    recipe = read_protocol("openkbp").recipe(("split.labels=8",))
    assert recipe.data.spacing_mm == (4.5, 4.5, 3.0)
    assert recipe.data.augment.swap == ((3, 4),)
    assert (recipe.optim.steps, recipe.split.use, recipe.split.labels) == (800, "dataset", 8)


# ---- frozen --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "override",
    ["optim.lr=1", "optim.steps=5", "data.crop=64", "split.name=btcv-80-20", "window_overlap=0.9",
     "score.tolerance_mm=9", "loss.squared=true", "dims=2", "protocol.smoke=false"],
)  # fmt: skip
def test_a_frozen_key_is_refused(override: str) -> None:
    with pytest.raises(
        ConfigError, match="is fixed by the protocol btcv-monai-24-6; free are model"
    ):
        read_protocol("btcv-monai-24-6").recipe((override,))


def test_what_is_free_is_taken_and_the_rest_stays() -> None:
    protocol = read_protocol("btcv-monai-24-6")
    free = ("model.backbone=monai/dynunet", "seed=3", "split.labels=6", "optim.layer_decay=0.7")
    recipe, plain = protocol.recipe((*free, "compute.workers=2")), protocol.recipe()
    assert (recipe.model.backbone, recipe.seed, recipe.split.labels) == ("monai/dynunet", 3, 6)
    assert recipe.data == plain.data
    assert recipe.protocol == plain.protocol
    assert recipe.protocol is not None
    assert (recipe.protocol.name, recipe.protocol.smoke) == ("btcv-monai-24-6", False)


def test_a_changed_file_is_no_longer_the_protocol(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copytree(FOLDER, tmp_path / "protocols"))
    monkeypatch.setattr(protocols, "find_recipe", lambda name, kind: copy / f"{name}.yaml")
    file = copy / "openkbp.yaml"
    text = file.read_text()
    file.write_text(text + "# a comment changes nothing\n")
    assert read_protocol("openkbp").name == "openkbp"
    file.write_text(text.replace("steps: 800", "steps: 801"))
    with pytest.raises(ConfigError, match="not the protocol that was frozen under this name"):
        read_protocol("openkbp")


def test_names_that_are_none() -> None:
    with pytest.raises(ConfigError, match=r"no recipe 'btcv'.*btcv-80-20"):
        read_protocol("btcv")
    with pytest.raises(ConfigError, match="a file of your own is a recipe"):
        read_protocol("my/own.yaml")


def test_missing_cases_are_named_with_the_command(tmp_path: Path) -> None:
    protocol = read_protocol("btcv-synapse-18-12")
    split = named_split("btcv-synapse-18-12")
    there = {case: "training" for case in split.train if case not in ("img0005", "img0040")}
    with pytest.raises(DataError, match=r"2 of its 18 .*img0005, img0040; .*data_prep\.btcv"):
        protocol.check_cases(there, split.train, tmp_path)
    with pytest.raises(DataError, match=r"65 of its 260 labelled training cases.*has 195; .*msd"):
        read_protocol("msd-hippocampus").check_cases(
            {f"h{n}": "training" for n in range(195)}, (), tmp_path
        )
    with pytest.raises(DataError, match=r"labels 1 to 13 \(spleen.*\[14\]"):
        protocol.check_labels((1, 13, 14))
    protocol.check_labels(range(14))


# ---- end to end ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def btcv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tree of the archive: thirty cases of one phantom that differ by a few units."""
    root = tmp_path_factory.mktemp("btcv") / "RawData"
    folders = root / "Training" / "img", root / "Training" / "label"
    for folder in folders:
        folder.mkdir(parents=True)
    phantom = make_phantom(0, SIZE, SPACING)
    affine = np.diag([*SPACING, 1.0])
    numbers = [*range(1, 11), *range(21, 41)]
    for number in numbers:
        hu = phantom.hu.copy()
        hu[: number % 7 + 1, 0, 0] += number
        write_volume(folders[0] / f"img{number:04d}.nii.gz", hu, affine)
        write_volume(folders[1] / f"label{number:04d}.nii.gz", phantom.labels, affine)
    return root


def smoke(btcv: Path, out: Path) -> None:
    finetune_command(btcv, out, None, None, TINY, protocol="btcv-synapse-18-12", smoke=True)


def one_case(btcv: Path, folder: Path) -> Path:
    """The tree of the archive with the one case that the folder is called after."""
    number = folder.name.removeprefix("img")
    for part in ("img", "label"):
        (folder / "Training" / part).mkdir(parents=True)
        file = f"Training/{part}/{part}{number}.nii.gz"
        shutil.copy(btcv / file, folder / file)
    return folder


def test_a_smoke_run_goes_from_the_archive_to_the_report_and_says_so(
    btcv: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    smoke(btcv, run)
    assert "no result" in (run / "SMOKE.txt").read_text()
    record = json.loads((run / "run.json").read_text())
    assert "no result" in record["summary"]["smoke"]
    recipe = load_recipe(FinetuneRecipe, run / "recipe.yaml")
    assert recipe.protocol is not None
    assert recipe.protocol.smoke
    assert recipe.optim.steps == 4
    assert tuple(record["inputs"]["train"]) == named_split("btcv-synapse-18-12").train

    assert held_out_cases(run) == named_split("btcv-synapse-18-12").test

    few, seen = (one_case(btcv, tmp_path / name) for name in ("img0001", "img0005"))
    predict_command(run, few, tmp_path / "predicted", device="cpu")
    ledger = json.loads((tmp_path / "predicted" / "predict.json").read_text())
    assert ledger["settings"]["overlap"] == recipe.window_overlap
    assert ledger["protocol"]["smoke"]
    scores = evaluate_command(tmp_path / "predicted", few, tmp_path / "scores")
    assert "no result" in scores.name
    assert sorted(scores.labels) == [1, 2, 3, 4, 6, 7, 8, 11]
    assert scores.settings["protocol"]["name"] == "btcv-synapse-18-12"
    page = report_command([str(run), str(tmp_path / "scores")], tmp_path / "report.html")
    assert "Smoke run, shortened: no result" in page.read_text()

    predict_command(run, seen, tmp_path / "learnt", device="cpu")
    with pytest.raises(DataError, match="1 of 1 predicted cases were trained on: img0005"):
        evaluate_command(tmp_path / "learnt", seen, tmp_path / "none")

    with pytest.raises(ConfigError, match=r"was prepared at \(6.0, 6.0, 8.0\) mm"):
        finetune_command(run / "store", run, None, None, TINY, protocol="btcv-synapse-18-12")


def test_bad_commands_are_one_line(
    btcv: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(code: int, *words: str | Path) -> str:
        with pytest.raises(SystemExit) as left:
            main(["finetune", *map(str, words), "--out", str(tmp_path / "out")])
        lines = capsys.readouterr().err.strip().splitlines()
        assert (left.value.code, len(lines)) == (code, 1), lines
        assert not (tmp_path / "out").exists()
        return lines[0]

    few = tmp_path / "few"
    shutil.copytree(btcv, few)
    (few / "Training" / "img" / "img0035.nii.gz").unlink()
    (few / "Training" / "label" / "label0035.nii.gz").unlink()
    protocol = ("--protocol", "btcv-monai-24-6", "--data")
    assert "1 of its 30" in (said := fails(3, *protocol, few))
    assert "img0035; prepare them: python -m data_prep.btcv" in said
    assert "optim.lr is fixed by the protocol" in fails(2, "optim.lr=1", *protocol, btcv)
    assert "not both" in fails(2, "segresnet_3d", *protocol, btcv)
    assert "--smoke shortens a protocol" in fails(2, "--smoke", "--data", btcv)
    assert "choose from 1 to 24" in fails(2, "split.labels=25", *protocol, btcv)
