"""Official SparK checkpoints: every tensor under its name here, and the golden values with them."""

import json

import numpy as np
import pytest
import torch
from checkpoints import CONVNEXT, RESNET, make, to_meta_names
from golden_rule import FOLDER, fill, make_input, make_visible
from torch import Tensor

from spark3d import build
from spark3d.commands.start import Start
from spark3d.config import PretrainRecipe, find_recipe, load_recipe, resolve
from spark3d.errors import ConfigError
from spark3d.sparse.mask import CellMask
from spark3d.weights.convert import import_foreign
from spark3d.weights.foreign import Foreign
from spark3d.weights.official import sort_keys

NAMES = json.loads((FOLDER / "official_names.json").read_text())
"""Of every tensor of the official checkpoints: its role in the golden files, and its shape."""
NETWORKS = {"resnet50": "spark_resnet50_2d", "convnext_tiny": "spark_convnext_small_2d"}


def official(network: str) -> tuple[dict[str, Tensor], dict]:
    """A checkpoint of the official pre-training code with the golden tensors, and its numbers."""
    numbers = json.loads((FOLDER / f"spark_{network}_64.json").read_text())
    state = {
        key: torch.from_numpy(np.asarray(fill(role, tuple(shape))))
        for key, (role, shape) in NAMES[network].items()
    }
    for buffer, size in (("imn_m", 1), ("imn_s", 1), ("norm_black", 64)):
        state[buffer] = torch.zeros(1, 3, size, size)
    return state, numbers


@pytest.mark.parametrize(
    "network", ["resnet50", pytest.param("convnext_tiny", marks=pytest.mark.slow)]
)
def test_an_imported_pretraining_goes_on_with_the_official_loss(network: str) -> None:
    """Import, then `--init` on the shipped recipe: the loss is what the official code computed."""
    state, numbers = official(network)
    found = Foreign(state, "module", (), ("config",))
    done = import_foreign(found, "official.pth", f"timm/{network}", 2)
    assert done.passport.objective == "spark"
    assert done.passport.intensity == {"normalise": "imagenet"}
    left = done.report.left_out["buffers the official code does not use"]
    assert set(left) == {"imn_m", "imn_s", "norm_black"}
    assert len(done.state) + len(done.objective) + 3 == len(state)

    recipe = load_recipe(PretrainRecipe, find_recipe(NETWORKS[network], "pretrain"))
    changes = {"mask.cell_size": 32, "model.backbone": f"timm/{network}", "model.options": {}}
    objective = build.objective(resolve(recipe, changes))
    notes = Start(done.state, done.passport, done.objective).load(objective, "spark")
    assert notes[1] == f"decoder and tokens: {len(done.objective)} tensors go on"
    crops = torch.from_numpy(make_input(64)).double()
    mask = CellMask(torch.from_numpy(make_visible(64)), (32, 32))
    with torch.no_grad():
        loss = objective.double().eval()(crops, mask).total
    assert loss.item() == pytest.approx(numbers["eval"]["loss_f64"], rel=1e-9)


def test_every_role_of_the_golden_list_has_its_name_here() -> None:
    """Nothing of the official parts keeps its official name, and no two share one."""
    for network in NETWORKS:
        state = dict.fromkeys(NAMES[network], torch.zeros(1))
        found = sort_keys(state)
        assert len(found.encoder) + len(found.objective) == len(state)
        names = ("densify.stages.", "decoder.blocks.", "decoder.proj.")
        assert all(key.startswith(names) for key in found.objective)
        assert not any("downsample_layers" in key or "sp_cnn" in key for key in found.encoder)


def test_the_deepest_stage_comes_first_there_and_last_here() -> None:
    state = {f"mask_tokens.{n}": torch.full((1,), n) for n in range(4)}
    found = sort_keys({**state, "sparse_encoder.sp_cnn.conv1.weight": torch.zeros(1)}).objective
    assert [int(found[f"densify.stages.{n}.token"]) for n in range(4)] == [3, 2, 1, 0]


def test_parts_that_official_spark_does_not_have_are_named() -> None:
    name, options = RESNET
    theirs = make(RESNET).state_dict()
    state = {f"sparse_encoder.sp_cnn.{key}": value for key, value in theirs.items()}
    state["teacher.weight"] = torch.zeros(1)
    with pytest.raises(ConfigError, match=r"no known part of official SparK: teacher\.weight"):
        import_foreign(Foreign(state, "", (), ()), "odd.pth", f"timm/{name}", 2, options=options)


def test_meta_names_of_convnext_become_those_of_timm() -> None:
    """All of them, the classifier too, and the tensors stay what they were."""
    theirs = make(CONVNEXT).state_dict()
    metas = to_meta_names(theirs)
    assert not metas.keys() & {k for k in theirs if not k.startswith("stages")}
    found = sort_keys(metas).encoder
    assert found.keys() == theirs.keys()
    assert all(torch.equal(found[key], theirs[key]) for key in theirs)
