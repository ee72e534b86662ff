"""Recipes: strict, round-tripping, with errors that carry the remedy."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spark3d.classify_recipe import ClassifyRecipe
from spark3d.config import (
    FinetuneRecipe,
    PretrainRecipe,
    changed_keys,
    dump_yaml,
    find_recipe,
    load_recipe,
    read_yaml,
    resolve,
    to_tree,
    validate,
)
from spark3d.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lrr=1", "did you mean 'optim.lr'"),
        ("optm.lr=1", "did you mean 'optim.lr'"),
        ("lr=3", "did you mean 'optim.lr'"),
        ("data.window={low: 1, hih: 2}", "data.window"),
        ("optim.lr=fast", "optim.lr='fast'"),
        ("mask.ratio=1.0", "mask.ratio=1.0"),
        ("optim.lr", "must read section.key=value"),
        ("optim.betas=[0.9, 1.0]", "optim.betas"),
        ("optim.betas=[-0.1, 0.9]", "optim.betas"),
        ("seed=-1", "seed=-1"),
        ("objective={name: localmim, kernel: 1}", "objective.kernel=1"),
        ("optim.encoder_lr_ratio=0.3", "unknown key 'optim.encoder_lr_ratio'"),
        ("optim.lr={a: 1, a: 2}", "stands twice"),
        ("seed=!!python/object:os.system x", "not valid YAML"),
    ],
)
def test_a_mistake_is_told_in_one_line_with_the_remedy(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=r"recipe|optim|seed|key") as caught:
        load_recipe(PretrainRecipe, None, [override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@given(
    lr=st.floats(1e-8, 1e3),
    crop=st.one_of(
        st.just("auto"),
        st.integers(1, 512),
        st.lists(st.integers(1, 99), min_size=3, max_size=3),
    ),
    steps=st.integers(1, 10**7),
)
def test_a_resolved_recipe_reads_back_equal(lr: float, crop: object, steps: int) -> None:
    tree = {"optim.lr": lr, "data.crop": crop, "optim.steps": steps}
    recipe = resolve(PretrainRecipe(), tree)
    assert PretrainRecipe.model_validate(read_yaml(dump_yaml(recipe))) == recipe


@pytest.mark.parametrize("kind", [PretrainRecipe, FinetuneRecipe, ClassifyRecipe])
def test_a_rate_of_the_encoder_is_for_fine_tuning_and_in_older_resolved_recipes(kind: type) -> None:
    tree = to_tree(kind())
    tree["optim"]["encoder_lr_ratio"] = 1.0
    assert validate(kind, tree) == kind()
    tree["optim"]["encoder_lr_ratio"] = 0.3
    if kind is FinetuneRecipe:
        assert validate(kind, tree).optim.encoder_lr_ratio == 0.3
    else:
        with pytest.raises(ConfigError, match=r"unknown key 'optim\.encoder_lr_ratio'"):
            validate(kind, tree)


def leaves(tree: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every key of a tree, alone in the sections around it."""
    for key, value in tree.items():
        for inner in leaves(value) if isinstance(value, dict) and value else [value]:
            yield {key: inner}


@pytest.mark.parametrize("kind", [PretrainRecipe, FinetuneRecipe, ClassifyRecipe])
def test_to_name_one_key_leaves_the_defaults_of_its_neighbours(kind: type) -> None:
    for tree in leaves(to_tree(kind())):
        assert validate(kind, tree) == kind(), tree


def test_a_recipe_of_a_crop_alone_keeps_what_fine_tuning_does(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("data: {crop: [64, 64, 32]}\noptim: {steps: 50}\n")
    recipe = load_recipe(FinetuneRecipe, tmp_path / "mine.yaml", ["data.augment.noise=0.2"])
    default = {"data.crop": (64, 64, 32), "optim.steps": 50, "data.augment.noise": 0.2}
    assert recipe == resolve(FinetuneRecipe(), default)
    assert (recipe.data.augment.degrees, recipe.optim.lr, recipe.optim.batch) == (15.0, 3e-3, 2)


def test_scientific_notation_is_a_number_as_yaml_1_2_says() -> None:
    assert read_yaml("[1e-3, 1E3, -2.5e+2, 1.0, .5]") == [1e-3, 1e3, -250.0, 1.0, 0.5]
    assert read_yaml("[3, e3, 1e, 2026-01-01x]") == [3, "e3", "1e", "2026-01-01x"]


def test_only_sections_that_change_results_make_another_run() -> None:
    plain = PretrainRecipe()
    faster = resolve(plain, {"compute.workers": 2, "log.every": 7})
    other = resolve(plain, {"optim.lr": 0.5, "mask.ratio": 0.7, "compute.workers": 2})
    assert changed_keys(plain, faster) == []
    assert changed_keys(plain, other) == ["mask.ratio", "optim.lr"]


def test_an_unknown_recipe_lists_the_shipped_ones() -> None:
    with pytest.raises(ConfigError, match="openkbp_segresnet"):
        find_recipe("no_such_recipe", "pretrain")


RECIPES = [f for kind in ("finetune", "pretrain") for f in (ROOT / "configs" / kind).glob("*.yaml")]


@pytest.mark.parametrize("file", sorted(RECIPES), ids=lambda f: f.stem)
def test_every_shipped_recipe_loads_and_opens_with_its_command(file: Path) -> None:
    kinds = {"pretrain": PretrainRecipe, "finetune": FinetuneRecipe, "classify": ClassifyRecipe}
    load_recipe(kinds[file.parent.name], file)
    head = [line for line in file.read_text().splitlines() if line.startswith("#")]
    command = "pretrain" if file.parent.name == "pretrain" else "finetune"
    assert any(f"{command} {file.stem}" in line and "--data" in line for line in head)
