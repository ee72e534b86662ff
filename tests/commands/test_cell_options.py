"""Cells and crops of every kind, end to end: larger and smaller cells, per axis, padding."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import PRETRAIN

from spark3d.commands.inputs import crop_unit
from spark3d.commands.pretrain import pretrain_command
from spark3d.config import PretrainRecipe, load_recipe
from spark3d.engine.logging import read_metrics
from spark3d.weights.exchange import load_encoder

SHORT = (*PRETRAIN, "optim.steps=3", "optim.warmup=1")
CELLS = {
    "larger than the stride, per axis": ("mask.cell_size=[8,4,16]", "data.crop=[16,8,16]"),
    "smaller than the stride": (
        *("mask.cell_size=2", "data.crop=[8,16,8]", "model.backend=reference"),
        "objective.stop_stride=2",
    ),
    "padded": ("mask.cell_size=8", "data.crop=[18,20,16]", "mask.pad=true"),
}


@pytest.mark.parametrize("words", CELLS.values(), ids=CELLS)
def test_pretraining_runs(words: tuple[str, ...], store: Path, tmp_path: Path) -> None:
    weights = pretrain_command(store, tmp_path / "run", None, (*SHORT, *words))
    losses = [line["loss"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert len(losses) == 3
    assert all(0 < loss < 10 for loss in losses)
    assert load_encoder(weights)[1].steps == 3


WRONG = {
    "crop": (
        ("mask.cell_size=8", "data.crop=[18,16,16]"),
        "axis 0; the nearest that fit are 16 and 24, or set mask.pad=true",
    ),
    "crop, small cells": (
        ("mask.cell_size=2", "data.crop=[8,16,10]", "model.backend=reference"),
        "along axis 2; the nearest that fit are 8 and 12",
    ),
    "small cells, packed": (
        ("mask.cell_size=2", "data.crop=8"),
        'enlarge the cells to the total stride of the network or use backend="reference"',
    ),
    "one padded cell": (("mask.cell_size=16", "data.crop=9", "mask.pad=true"), "holds 1 cell"),
}


@pytest.mark.parametrize(("words", "message"), WRONG.values(), ids=WRONG)
def test_what_does_not_fit_is_refused_before_anything_is_read(
    words: tuple[str, ...], message: str, store: Path, tmp_path: Path, fails: Callable[..., str]
) -> None:
    run = tmp_path / "run"
    line = fails(2, "pretrain", *SHORT, *words, "--data", store, "--out", run)
    assert message in line
    assert not (run / "metrics.jsonl").exists()


def test_crops_are_whole_cells_and_whole_strides() -> None:
    def unit(*words: str) -> tuple[int, ...]:
        recipe = load_recipe(PretrainRecipe, None, (*PRETRAIN, *words))
        return crop_unit(recipe)

    assert unit() == (8, 8, 8)
    assert unit("mask.cell_size=2", "model.backend=reference") == (4, 4, 4)
    assert unit("mask.cell_size=[2,4,8]", "model.backend=reference") == (4, 4, 8)


def test_unused_padding_changes_nothing(store: Path, tmp_path: Path) -> None:
    plain = pretrain_command(store, tmp_path / "plain", None, SHORT)
    padded = pretrain_command(store, tmp_path / "padded", None, (*SHORT, "mask.pad=true"))
    for (name, mine), theirs in zip(
        load_encoder(plain)[0].items(), load_encoder(padded)[0].values(), strict=True
    ):
        assert torch.equal(mine, theirs), name
