"""A 2D network on the axial slices of volumes: trained, resumed, predicted on the files' grid."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import FINETUNE, SCRATCH, Fails

from spark3d.build import load_segmenter
from spark3d.commands.finetune import finetune_command
from spark3d.commands.predict import predict_command
from spark3d.config import FinetuneRecipe, load_recipe
from spark3d.data.store import Store
from spark3d.evaluation.metrics import dice_per_label
from spark3d.evaluation.windows import WindowPlan, predict_labels


def test_slices_are_trained_on_and_predicted_on_the_grid_of_the_file(
    finetuned2d: Path, volumes: Path, tmp_path: Path
) -> None:
    segmenter = load_segmenter(finetuned2d)
    assert segmenter.crop == (16, 16)
    assert segmenter.network(torch.zeros(2, 1, 16, 16)).shape == (2, 4, 16, 16)
    out = predict_command(finetuned2d, volumes, tmp_path / "out", section="validation")
    for name in ("case2", "case3"):
        image = nib.load(volumes / "imagesTr" / f"{name}.nii.gz")
        made = nib.load(out / f"{name}.nii.gz")
        assert made.shape == image.shape
        np.testing.assert_allclose(made.affine, image.affine, atol=1e-4)
        assert set(np.unique(np.asarray(made.dataobj))) <= {0, 1, 2, 3}


def test_validation_scores_whole_volumes(finetuned2d: Path, store: Path) -> None:
    result = json.loads((finetuned2d / "run.json").read_text())["result"]
    segmenter, opened = load_segmenter(finetuned2d), Store.open(store)
    volume = torch.from_numpy(segmenter.window.apply(opened.read("case2")))
    plan = WindowPlan(segmenter.crop, 0.5, empty_below=0.0)
    found = predict_labels(segmenter.network, volume, plan).numpy()
    dice = dice_per_label(found, opened.read_label("case2"), [1, 2, 3])
    assert result["validation"]["case2"] == pytest.approx({str(k): v for k, v in dice.items()})


def test_what_the_recipe_leaves_open_is_chosen_for_slices(store: Path, tmp_path: Path) -> None:
    few = [o for o in FINETUNE if not o.startswith(("data.crop", "optim.batch"))]
    words = ("dims=2", *SCRATCH, *few, "optim.steps=1", "optim.batch=2")
    out = tmp_path / "run"
    finetune_command(store, out, None, None, words)
    recipe = load_recipe(FinetuneRecipe, out / "recipe.yaml")
    assert isinstance(recipe.data.crop, tuple)
    assert len(recipe.data.crop) == 2
    for axis, side in enumerate(recipe.data.crop):
        assert side % 4 == 0
        assert 8 <= side <= max(r.size[axis] for r in Store.open(store).cases)


def test_an_encoder_of_other_axes_is_refused(
    pretrained: Path, store: Path, fails: Fails, out: Path
) -> None:
    words = ["finetune", *FINETUNE, "--dims", "2", "--data", store, "--encoder", pretrained]
    assert "pre-trained in 3D, fine-tuning is in 2D" in fails(2, *words, "--out", out)
    assert not out.exists()
