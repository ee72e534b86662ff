"""`model.options` beside encoder weights: merged, or refused, in all that takes such weights."""

from pathlib import Path
from typing import Any

import pytest

from spark3d.classify_recipe import ClassifyRecipe
from spark3d.commands import classify_inputs, labelled
from spark3d.commands.start import read_start
from spark3d.config import FinetuneRecipe, PretrainRecipe, validate
from spark3d.errors import ConfigError
from spark3d.models.backbones import build_backbone
from spark3d.weights.exchange import save_encoder
from spark3d.weights.passport import Passport

SEGRESNET = {"init_filters": 8, "blocks_down": [1, 1, 1], "blocks_up": [1, 1]}
RESNET = {"channels": [8, 8, 16, 16], "drop_path_rate": 0.05}


@pytest.mark.parametrize("backbone", ["auto", "monai/segresnet"])
def test_finetuning_adds_its_own_to_those_of_the_encoder(backbone: str) -> None:
    def planned(**options: Any) -> dict[str, Any]:
        recipe = validate(FinetuneRecipe, {"model": {"backbone": backbone, "options": options}})
        passport = Passport("monai/segresnet", 3, 1, SEGRESNET)
        return labelled.plan_from_encoder(recipe, passport)[0].model.options

    assert planned() == SEGRESNET
    assert planned(dropout_prob=0.1) == {**SEGRESNET, "dropout_prob": 0.1}
    with pytest.raises(ConfigError, match=r"model\.options\.act=leakyrelu: the encoder was"):
        planned(act="leakyrelu")


@pytest.mark.parametrize("backbone", ["auto", "timm/resnet10t"])
def test_classification_keeps_its_own_drop_path(backbone: str) -> None:
    def planned(**options: Any) -> dict[str, Any]:
        recipe = validate(ClassifyRecipe, {"model": {"backbone": backbone, "options": options}})
        passport = Passport("timm/resnet10t", 2, 3, RESNET)
        return classify_inputs.plan_from_encoder(recipe, passport)[0].model.options

    assert planned() == {"channels": RESNET["channels"]}
    assert planned(drop_path_rate=0.2) == {**RESNET, "drop_path_rate": 0.2}
    with pytest.raises(ConfigError, match=r"replace_stem_pool=True: the encoder was"):
        planned(replace_stem_pool=True)


def test_pretraining_goes_on_in_the_same_network(tmp_path: Path) -> None:
    net = build_backbone("monai/segresnet", 3, 1, **SEGRESNET)
    save_encoder(
        tmp_path / "encoder.safetensors",
        {key: net.network.state_dict()[key] for key in net.encoder_keys},
        Passport(net.name, 3, 1, net.options),
    )
    recipe = validate(PretrainRecipe, {"model": {"options": {"init_filters": 8}}})
    start, planned = read_start(tmp_path, recipe)
    assert start is not None
    assert planned.model.options == SEGRESNET
    wrong = validate(PretrainRecipe, {"model": {"options": {"act": "leakyrelu"}}})
    with pytest.raises(ConfigError, match=r"model\.options\.act=leakyrelu: the encoder was"):
        read_start(tmp_path, wrong)
