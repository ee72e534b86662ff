"""`spark3d pretrain --data FOLDER --out RUN` on nothing but files: all comes from the data."""

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
from processes import curve
from test_resume import stopped

from spark3d.commands import pretrain as pretrain_module
from spark3d.commands.pretrain import pretrain_command
from spark3d.config import PretrainRecipe, load_recipe
from spark3d.data.io import write_volume

SHORT = (
    "optim.steps=2",
    "optim.warmup=1",
    "objective.decoder_width=16",
    "compute.threads=1",
    "compute.accelerator=cpu",
    "log.tensorboard=false",
)


@pytest.fixture(scope="module")
def scans(volumes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three scans, and one that is thinner than any crop."""
    folder = tmp_path_factory.mktemp("plain") / "scans"
    shutil.copytree(volumes / "imagesUn", folder)
    thin = np.full((40, 36, 9), -1000, np.int16)
    thin[2:-2, 2:-2] = np.random.default_rng(0).normal(40, 30, (36, 32, 9))
    write_volume(folder / "thin.nii.gz", thin, np.diag([7.0, 8.0, 10.0, 1.0]))
    return folder


@pytest.fixture(scope="module")
def run(scans: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain-run") / "run"
    pretrain_command(scans, folder, None, SHORT)
    return folder


def test_everything_is_chosen_from_the_data_and_shown_with_its_reason(
    scans: Path,
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    target = tmp_path / "run"
    with caplog.at_level(logging.INFO):
        stopped(
            monkeypatch, pretrain_module, 1, lambda: pretrain_command(scans, target, None, SHORT)
        )
    for line in (
        "4 of 4 cases, for pre-training",
        "spacing 7 x 8 x 10 mm: median of the volumes",
        "window: CT, soft tissue",
        "-175..250 HU to 0..1",
        "crop (32, 32, 32): multiples of 16 x 16 x 16 within the median size",
        "batch 4: 4 crops of 32768 voxels",
        "modality CT: 4 of 4 cases are CT",
        "on some axis and padded: ",
        ", thin",
    ):
        assert line in caplog.text
    recipe = load_recipe(PretrainRecipe, target / "recipe.yaml")
    assert recipe.data.spacing_mm == (7.0, 8.0, 10.0)
    assert recipe.data.crop == (32, 32, 32)
    assert recipe.optim.batch == 4
    assert recipe.data.window.low == -175  # type: ignore[union-attr]
    assert recipe.mask.cell_size == 16

    pretrain_command(scans, target, None, SHORT)
    assert curve(target) == curve(run)
    weights = [(folder / "encoder.safetensors").read_bytes() for folder in (target, run)]
    assert weights[0] == weights[1]


def test_a_run_goes_on_from_its_own_store_when_the_scans_change(scans: Path, run: Path) -> None:
    before = (run / "store" / "index.json").read_bytes()
    extra = scans / "later.nii.gz"
    shutil.copy(scans / "thin.nii.gz", extra)
    try:
        (run / "encoder.safetensors").unlink()
        pretrain_command(scans, run, None, SHORT)
    finally:
        extra.unlink()
    assert (run / "encoder.safetensors").is_file()
    assert (run / "store" / "index.json").read_bytes() == before
