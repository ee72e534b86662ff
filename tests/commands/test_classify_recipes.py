"""Every shipped recipe for classification: loaded and run for two steps, small."""

from pathlib import Path

import numpy as np
import pytest
from processes import curve

from spark3d.classify_recipe import ClassifyRecipe
from spark3d.commands.classify import classify_command
from spark3d.config import load_recipe
from spark3d.engine.logging import read_metrics

FOLDER = Path(__file__).parents[2] / "configs" / "classify"
RECIPES = {file.stem: load_recipe(ClassifyRecipe, file) for file in sorted(FOLDER.glob("*.yaml"))}
RESNET = ("model.options={channels: [8, 8, 16, 16], stem_width: 8}",)
SMALL_NETWORK = {
    "auto": ("model.backbone=timm/resnet10t", *RESNET),
    "timm/resnet50": ("model.options={channels: [8, 16, 24, 32]}",),
    "timm/convnext_small": ("model.options={dims: [8, 16, 24, 32]}",),
    "timm/convnext_base": ("model.options={dims: [8, 16, 24, 32]}",),
}
TWO_STEPS = (
    "images.crop=32",
    "optim.steps=2",
    "optim.warmup=1",
    "optim.batch=4",
    "compute={accelerator: cpu, threads: 1}",
    "log.tensorboard=false",
)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_runs_for_two_steps_when_shrunk(name: str, photos: Path, tmp_path: Path) -> None:
    """Layers, mixing, loss, optimiser and average as they stand; the log tells of both waits."""
    small = SMALL_NETWORK[RECIPES[name].model.backbone]
    done = classify_command(photos, tmp_path / "run", None, name, (*small, *TWO_STEPS))
    losses = [loss for _, loss, *_ in curve(tmp_path / "run")]
    assert len(losses) == 2
    assert np.isfinite(losses).all()
    assert done.model.is_file()
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    for line in lines:
        if line["kind"] == "train":
            assert 0 <= line["data_seconds"] <= line["seconds"]
    resolved = load_recipe(ClassifyRecipe, tmp_path / "run" / "recipe.yaml")
    wanted = RECIPES[name]
    assert (resolved.loss, resolved.mix, resolved.augment) == (
        wanted.loss,
        wanted.mix,
        wanted.augment,
    )
    for key in ("name", "lr", "betas", "weight_decay", "layer_decay", "layer_blocks", "ema"):
        assert getattr(resolved.optim, key) == getattr(wanted.optim, key)


def test_the_published_fine_tunings() -> None:
    """Batch, epochs, warm-up, rate per 256 of the batch, decays, mixing, as published."""
    published = {
        "spark_convnext_small_2d": (4096, 400, 20, "adamw", 2e-4, 0.7, 0.01, 0.8, 3, 0.3),
        "spark_convnext_base_2d": (4096, 400, 20, "adamw", 1e-4, 0.7, 0.01, 0.8, 3, 0.4),
        "spark_resnet50_2d": (2048, 300, 5, "lamb", 2e-3, 0.7, 0.02, 0.1, 1, 0.05),
    }
    for name, row in published.items():
        batch, epochs, warmup, optimiser, base, decay, weight_decay, mixup, repeats, drop = row
        recipe = RECIPES[name]
        optim = recipe.optim
        per_epoch = 1_281_167 / batch
        assert optim.steps == pytest.approx(epochs * per_epoch, abs=per_epoch)
        assert optim.warmup == pytest.approx(warmup * per_epoch, abs=per_epoch)
        assert (optim.batch, optim.name, optim.layer_decay) == (batch, optimiser, decay)
        assert optim.lr == pytest.approx(base * batch / 256)
        assert (optim.weight_decay, optim.ema) == (weight_decay, 0.9999)
        assert (recipe.mix.mixup, recipe.mix.cutmix) == (mixup, 1.0)
        assert (recipe.images.repeats, recipe.images.evaluation_share) == (repeats, 0.95)
        assert (recipe.model.drop_path, recipe.loss.smoothing) == (drop, 0.1)
        assert recipe.loss.name == ("bce" if optimiser == "lamb" else "ce")
        assert (recipe.augment.policy, recipe.augment.erase) == ("trivial", 0.25)
