"""Every shipped pre-training recipe: loaded and run for two steps, small; as it is, slowly."""

from itertools import product
from pathlib import Path

import numpy as np
import pytest
from processes import curve
from test_resume import stopped

from spark3d.commands import pretrain
from spark3d.commands.pretrain import pretrain_command
from spark3d.config import PretrainRecipe, load_recipe
from spark3d.engine.logging import read_metrics
from spark3d.weights.exchange import OBJECTIVE, load_encoder

FOLDER = Path(__file__).parents[2] / "configs" / "pretrain"
RECIPES = {file.stem: load_recipe(PretrainRecipe, file) for file in sorted(FOLDER.glob("*.yaml"))}
TWO_STEPS = (
    "optim.steps=2",
    "optim.warmup=1",
    "optim.batch=2",
    "compute.accelerator=cpu",
    "compute.threads=1",
    "compute.workers=0",
    "compute.checkpoint_every=2",
    "log.tensorboard=false",
)
RESNET = ("model.options.channels=[8, 16, 24, 32]", "model.options.layers=[1, 1, 1, 1]")
CONVNEXT = ("model.options.dims=[8, 16, 24, 32]", "model.options.depths=[1, 1, 1, 1]")
SEGRESNET = (
    "model.options.init_filters=8",
    "model.options.blocks_down=[1, 1, 1]",
    "model.options.blocks_up=[1, 1]",
)
MEDNEXT = (
    "model.options.init_filters=4",
    "model.options.blocks_down=[1, 1, 1, 1]",
    "model.options.blocks_up=[1, 1, 1, 1]",
    "model.options.blocks_bottleneck=1",
)
DYNUNET = (
    "model.options.filters=[4, 8, 16]",
    "model.options.kernel_size=[3, 3, 3]",
    "model.options.strides=[1, 2, 2]",
)
SMALL_NETWORK = {
    "timm/resnet50": RESNET,
    "timm/convnext_small": CONVNEXT,
    "timm/convnext_base": CONVNEXT,
    "monai/segresnet": SEGRESNET,
    "monai/dynunet": DYNUNET,
    "monai/mednext_s": MEDNEXT,
    "monai/resnet50": ("model.options.widen_factor=0.125",),
}
SMALL_OBJECTIVE = {
    "spark": ("objective.decoder_width=16",),
    "localmim": ("objective.width=16",),
    "a2mim": (),
}


def shrunk(recipe: PretrainRecipe) -> tuple[str, ...]:
    """Overrides that make the networks and crops of a recipe small, and nothing else of it."""
    data = ("images.crop=64", "images.max_bad=0.5")
    if recipe.dims == 3:
        side = {"monai/resnet50": 64}.get(recipe.model.backbone, 32)
        data = (f"data.crop={side}", "data.spacing_mm=auto")
    return (
        *SMALL_NETWORK[recipe.model.backbone],
        *SMALL_OBJECTIVE[recipe.objective.name],
        *data,
    )


def two_steps(name: str, data: Path, out: Path, *more: str) -> Path:
    pretrain_command(data, out, name, (*TWO_STEPS, *more))
    losses = [loss for _, loss, *_ in curve(out)]
    assert len(losses) == 2
    assert np.isfinite(losses).all()
    assert load_encoder(out)[1].steps == 2
    assert (out / OBJECTIVE).is_file()
    return out


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_runs_for_two_steps_when_shrunk(
    name: str, store: Path, images: Path, tmp_path: Path
) -> None:
    """With a picture for the report, and the loss of every part in the log."""
    recipe = RECIPES[name]
    data = images if recipe.dims == 2 else store
    run = two_steps(name, data, tmp_path / "run", *shrunk(recipe))
    line = read_metrics(run / "metrics.jsonl")[0]
    parts = {"spark": "voxels", "localmim": "stride_", "a2mim": "spatial"}[recipe.objective.name]
    assert any(key.startswith(parts) for key in line)
    assert sorted(p.name for p in (run / "panels").iterdir()) == [
        "step_000001.png",
        "step_000002.png",
    ]
    resolved = load_recipe(PretrainRecipe, run / "recipe.yaml")
    same = ("mask", "optim.lr", "optim.betas", "optim.weight_decay", "optim.weight_decay_end")
    for key in same:
        wanted, found = recipe, resolved
        for part in key.split("."):
            wanted, found = getattr(wanted, part), getattr(found, part)
        if key == "mask":
            assert found.ratio == wanted.ratio
        else:
            assert found == wanted


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_runs_for_two_steps_on_a_gpu(
    name: str, precision: str, store: Path, images: Path, tmp_path: Path
) -> None:
    recipe = RECIPES[name]
    data = images if recipe.dims == 2 else store
    on_gpu = ("compute.accelerator=cuda", "compute.workers=2", f"optim.precision={precision}")
    two_steps(name, data, tmp_path / "run", *shrunk(recipe), *on_gpu)


@pytest.mark.parametrize("name", ["localmim_segresnet_3d", "a2mim_segresnet_3d"])
def test_every_objective_resumes_exactly(
    name: str, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after the first of two steps and started again: the same losses and weights."""
    small = shrunk(RECIPES[name])
    whole = two_steps(name, store, tmp_path / "whole", *small)
    run = tmp_path / "run"
    stopped(monkeypatch, pretrain, 1, lambda: two_steps(name, store, run, *small))
    again = two_steps(name, store, run, *small)
    assert curve(again) == curve(whole)
    for file in ("encoder.safetensors", OBJECTIVE):
        assert (again / file).read_bytes() == (whole / file).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_runs_for_two_steps_at_full_size(
    name: str, volumes: Path, images: Path, tmp_path: Path
) -> None:
    """Network, crop and spacing as they stand; only the batch is two."""
    two_steps(name, images if RECIPES[name].dims == 2 else volumes, tmp_path / "run")


def test_there_is_a_recipe_for_every_objective_in_2d_and_3d() -> None:
    found = {(recipe.objective.name, recipe.dims) for recipe in RECIPES.values()}
    assert found == set(product(("spark", "localmim", "a2mim"), (2, 3)))


@pytest.mark.parametrize("name", RECIPES)
def test_headers_say_what_was_measured_and_where_settings_come_from(name: str) -> None:
    head = "".join(
        line
        for line in (FOLDER / f"{name}.yaml").read_text("utf-8").splitlines()
        if line[:1] == "#"
    )
    assert f"pretrain {name}" in head
    # what our own give was measured: in docs/results, or told in their head
    own = name == "demo" or name.startswith(("openkbp_", "hippocampus_"))
    assert own or "not measured" in head
    assert not own or "docs/results" in head or "xpected" in head
    assert own or "Source" in head or name == "spark_segresnet_3d"


def test_the_official_recipes_of_spark() -> None:
    """As in its public code: 1600 epochs of 313 steps, 40 of them to warm up, LAMB, clip 5."""
    for name, betas, drop in (
        ("spark_resnet50_2d", (0.9, 0.95), 0.05),
        ("spark_convnext_small_2d", (0.9, 0.999), 0.2),
        ("spark_convnext_base_2d", (0.9, 0.999), 0.3),
    ):
        recipe = RECIPES[name]
        optim, objective = recipe.optim, recipe.objective
        per_epoch = -(-1_281_167 // 4096)
        assert (optim.steps, optim.warmup) == (1600 * per_epoch, 40 * per_epoch)
        assert (optim.name, optim.betas, optim.clip, optim.batch) == ("lamb", betas, 5.0, 4096)
        assert optim.lr == pytest.approx(2e-4 * 4096 / 256)
        assert (optim.weight_decay, optim.weight_decay_end) == (0.04, 0.2)
        assert (optim.warmup_start, optim.final, optim.schedule) == (0.005, 0.001, "cosine")
        assert optim.precision == "32-true"
        assert (recipe.mask.ratio, recipe.images.scale, recipe.images.crop) == (0.6, (0.67, 1), 224)
        assert recipe.model.options == {"drop_path_rate": drop}
        assert (objective.decoder, objective.decoder_width, objective.eps) == (
            "official",
            768,
            1e-6,
        )
        assert (objective.decoder_norm, objective.min_variance) == ("bn", 0.0)
