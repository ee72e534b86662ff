"""Options of recipes reach the objectives and the optimiser."""

import pytest
import torch
from objective_cases import CASES, make_a2mim, make_localmim, make_spark
from timm.optim.lamb import Lamb
from torch import nn

from spark3d import build
from spark3d.commands.pretrain import TrainingStep
from spark3d.config import ComputeSection, OptimSection, PretrainRecipe, load_recipe
from spark3d.engine.optim import build_optimizer, parameter_groups
from spark3d.errors import ConfigError
from spark3d.models.hidden import cut_hidden
from spark3d.models.taps import GlobalBlock, TapDecoder, positions
from spark3d.objectives.a2mim import A2MIM
from spark3d.objectives.localmim import LocalMIM
from spark3d.objectives.spark import SparK
from spark3d.objectives.targets import normalise_cells

NETWORK = (
    "model.options={init_filters: 8, blocks_down: [1, 1, 1], blocks_up: [1, 1]}",
    "mask.cell_size=8",
)


def built(*overrides: str) -> object:
    return build.objective(load_recipe(PretrainRecipe, None, (*NETWORK, *overrides)))


def test_options_of_every_objective_arrive() -> None:
    spark = built("objective.flat_weight=0.25", "objective.min_variance=1e-4")
    assert isinstance(spark, SparK)
    assert (spark.flat_weight, spark.min_variance) == (0.25, 1e-4)
    options = "replacement: target, visible_weight: 0.5, fourier: 0.1, focal: false, mode: fading"
    a2mim = built(f"objective={{name: a2mim, {options}}}")
    assert isinstance(a2mim, A2MIM)
    assert (a2mim.replacement, a2mim.visible_weight, a2mim.fourier) == ("target", 0.5, 0.1)
    assert (a2mim.focal, a2mim.token.mode) == (False, "fading")
    options = "detach: true, fourier_focal: false, head_rank: 3, add_mean: true"
    more = built(f"objective={{name: a2mim, {options}}}")
    assert isinstance(more, A2MIM)
    assert (more.token.detach, more.fourier_focal, more.add_mean) == (True, False, True)
    assert isinstance(more.head, nn.Sequential)
    local = built("objective={name: localmim, floor: 0.1, soft: false, width: 16, body: attention}")
    assert isinstance(local, LocalMIM)
    settings = local.hog_settings
    assert (settings.floor, settings.soft, settings.spacing) == (0.1, False, None)
    assert any(isinstance(m, GlobalBlock) for m in local.decoders.modules())


def test_the_light_decoder_is_as_wide_as_its_encoder_needs() -> None:
    """Half as many channels again as the deepest stage, 256 at most; or as many as are asked."""
    found = [built(), built("objective.decoder_width=200"), built("objective.decoder=official")]
    assert all(isinstance(spark, SparK) for spark in found)
    assert [spark.decoder.widths[-1] for spark in found] == [64, 200, 768]  # type: ignore[attr-defined]
    assert [build.light_width(c) for c in (16, 64, 128, 2048)] == [32, 96, 192, 256]


def test_gradients_are_per_millimetre_where_voxels_are_no_cubes() -> None:
    """Only the ratio counts, histograms have unit length."""
    even = built("objective.name=localmim", "data.spacing_mm=[2.0, 2.0, 2.0]")
    flat = built("objective.name=localmim", "data.spacing_mm=[1.5, 1.5, 3.0]")
    assert isinstance(even, LocalMIM)
    assert isinstance(flat, LocalMIM)
    assert even.hog_settings.spacing is None
    assert flat.hog_settings.spacing == (1.0, 1.0, 2.0)


def test_flat_cells_can_count_less_than_others() -> None:
    """Between leaving them out (0) and counting them in full (1)."""
    case = CASES["segresnet 2d"]
    crops, mask = case.batch()
    crops[0] *= 1e-3
    model = make_spark(case, min_variance=1e-3, flat_weight=0.25).double()
    target = normalise_cells(cut_hidden(crops.double(), mask), min_variance=1e-3)
    assert 0 < target.counted.sum() < len(target.counted)
    errors = (model.predict(crops.double(), mask) - target.voxels).square().flatten(1).mean(1)
    weights = torch.where(target.counted, 1.0, 0.25)
    wanted = (errors * weights).sum() / weights.sum()
    torch.testing.assert_close(model(crops.double(), mask).total, wanted)
    model.flat_weight = 1.0
    torch.testing.assert_close(model(crops.double(), mask).total, errors.mean())


def test_the_token_of_a2mim_can_learn_more_slowly() -> None:
    """A tenth of the rate for the token (and its factor), the full one for all else."""
    model = make_a2mim(CASES["segresnet 2d"], mode="fading")
    assert set(model.tokens()) == {"token.token", "token.gamma"}
    assert make_spark(CASES["segresnet 2d"]).tokens() == ()
    runner = build.fabric(ComputeSection(accelerator="cpu", devices=1), "32-true")
    step = TrainingStep(model, (16, 8))
    slow = {f"objective.{name}" for name in model.tokens()}
    _, optimizer = build.set_up(runner, step, OptimSection(), slow, 0.1)
    ratios = {id(p): g["lr_ratio"] for g in optimizer.param_groups for p in g["params"]}
    decays = {id(p): g["decay"] for g in optimizer.param_groups for p in g["params"]}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert ratios[id(parameter)] == (0.1 if name in model.tokens() else 1.0), name
            if name in model.tokens():
                assert decays[id(parameter)] == 0


def test_clipping_before_lamb_is_clipping_inside_it() -> None:
    """The official code clips inside LAMB to 5, here the step does; decayed or not."""

    def network() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3)).double()

    ours, theirs = network(), network()
    outside = build_optimizer("lamb", parameter_groups(ours), 0.1, (0.9, 0.95))
    groups = [{**g, "weight_decay": 0.04 * g["decay"]} for g in parameter_groups(theirs)]
    for group in outside.param_groups:
        group["weight_decay"] = 0.04 * group["decay"]
    inside = Lamb(groups, lr=0.1, betas=(0.9, 0.95), eps=1e-6, max_grad_norm=5.0)
    crops = 50 * torch.randn(2, 1, 9, 9, dtype=torch.float64)
    for _ in range(3):
        for model in (ours, theirs):
            model.zero_grad()
            (30 * model(crops).square().mean()).backward()
        norm = nn.utils.clip_grad_norm_(ours.parameters(), 5.0)
        assert norm > 5
        outside.step()
        inside.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_attention_sees_every_site_and_convolutions_their_neighbours() -> None:
    """A far visible cell changes what is predicted at a hidden one only with attention."""
    case = CASES["segresnet 2d"]
    _, mask = case.batch()
    hidden = (~mask.host[0]).nonzero()
    seen = mask.host[0].nonzero()
    far = max(
        ((h, s) for h in hidden for s in seen),
        key=lambda pair: int((pair[0] - pair[1]).abs().max()),
    )
    for body, moves in (("conv", False), ("attention", True)):
        torch.manual_seed(0)
        decoder = TapDecoder(4, 3, 2, width=16, blocks=1, kernel=3, body=body).eval()
        maps = torch.randn(2, 4, *mask.grid, generator=torch.Generator().manual_seed(1))
        other = maps.clone()
        other[(0, 0, *far[1])] += 1  # a norm over channels would not see all of them move
        with torch.no_grad():
            change = decoder(other, mask, False) - decoder(maps, mask, False)
        assert bool(change[(0, slice(None), *far[0])].any()) == moves


@pytest.mark.parametrize("ndim", [2, 3])
def test_every_site_has_a_place_of_its_own(ndim: int) -> None:
    found = positions((5,) * ndim, 26)
    rows = found.flatten(2)[0].mT
    assert len(rows.unique(dim=0)) == 5**ndim
    assert found.abs().max() <= 1


def test_attention_has_its_limits() -> None:
    """The number of sites, the heads, and a name that does not exist."""
    with pytest.raises(ConfigError, match=r"at most 4096 .*objective.body=conv"):
        GlobalBlock(8, 2)(torch.zeros(1, 8, 65, 64))
    with pytest.raises(ConfigError, match="a multiple of 8 channels"):
        GlobalBlock(12, 2)
    with pytest.raises(ConfigError, match="conv, attention"):
        make_localmim(CASES["segresnet 2d"], body="mlp")


def test_localmim_with_attention_overfits_one_batch() -> None:
    case = CASES["segresnet 2d"]
    crops, mask = case.batch()
    torch.manual_seed(0)
    model = make_localmim(case, body="attention")
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    losses = []
    for _ in range(12):
        optimiser.zero_grad()
        loss = model(crops, mask).total
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.85 * losses[0]
