"""Objectives that do not fit the network or the cells: one line before anything is trained."""

from pathlib import Path

import pytest
from conftest import NETWORK, Fails

SMALL = (
    *NETWORK,
    "data.crop=16",
    "optim.batch=2",
    "optim.steps=2",
    "optim.warmup=1",
    "mask.cell_size=8",
)
SIX = ["mask.cell_size=6", "data.crop=24"]
"""Cells that maps of stride 4 do not divide."""


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["objective={name: localmim, taps: [layer9]}"],
            "taps ['layer9'] are not stages; they are ['down_layers.0', 'down_layers.1', ",
        ),
        (["objective={name: localmim, taps: [down_layers.1]}"], "finer than 4 voxels"),
        (["objective={name: localmim, target: edges}"], "'hog' or 'voxels'"),
        (["objective={name: localmim, body: attention, width: 20}"], "a multiple of 8 channels"),
        (["objective={name: localmim}", *SIX], "cannot be trained by this recipe"),
        (
            ["objective={name: a2mim, token_at: nowhere}"],
            "no stages named ['nowhere']; sub-modules",
        ),
        (["objective={name: a2mim, token_at: up_layers.0}"], "is not run before the stage"),
        (["objective={name: a2mim, mode: replace, detach: true}"], "leave detach out"),
        (["objective={name: a2mim, mode: add}"], "'residual', 'replace' or 'fading'"),
        (
            ["objective={name: a2mim}", "mask.cell_size=3", "data.crop=12"],
            "a map of (6, 6, 6) sites does not fit (4, 4, 4) cells along axis 0",
        ),
        (["objective.name=a2mim"], "is not for this objective; leave it out"),
        (["model.options.stages=[layer1]"], "no stages named ['layer1']; sub-modules are act_mod"),
        (["objective.stop_stride=0"], "objective.stop_stride=0 needs one positive number"),
        (["objective.densify_norm=batch"], "'bn', 'ln', 'gn', 'in' or 'none'"),
        (SIX, "cannot be trained by this recipe"),
    ],
)
def test_mistakes(store: Path, tmp_path: Path, fails: Fails, words: list[str], said: str) -> None:
    run = tmp_path / "run"
    assert said in fails(2, "pretrain", *SMALL, *words, "--data", store, "--out", run)
    assert not run.exists()
