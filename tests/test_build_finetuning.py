"""Every network takes an encoder by its own keys, trains, predicts; rates, freezing, statistics."""

import pytest
import torch
from lightning_fabric import Fabric
from monai.networks.nets.flexible_unet import FlexibleUNet
from torch import nn

from spark3d import build, build_finetuning
from spark3d.config import FinetuneOptimSection, FinetuneRecipe, validate
from spark3d.engine.loop import take_step
from spark3d.engine.optim import set_step
from spark3d.errors import ConfigError
from spark3d.evaluation.windows import WindowPlan, predict_labels
from spark3d.models.backbones import build_backbone
from spark3d.models.losses import DeepSupervision
from spark3d.models.segmenter import build_segmenter, encoder_of
from spark3d.weights.exchange import load_into
from spark3d.weights.passport import Passport

MEDNEXT = {
    "init_filters": 4, "blocks_down": [1, 1], "blocks_up": [1, 1], "blocks_bottleneck": 1,
    "encoder_expansion_ratio": 2, "decoder_expansion_ratio": 2,
}  # fmt: skip
RESENC = {"features": [4, 8, 8], "strides": [1, 2, 2], "blocks": [1, 1, 1]}
SEGRESNET = {"init_filters": 8, "blocks_down": [1, 1, 1], "blocks_up": [1, 1]}
NARROW = {"widen_factor": 0.125}
NETWORKS = {
    "segresnet": ("monai/segresnet", SEGRESNET, {}),
    "segresnet-unet": ("monai/segresnet", SEGRESNET, {"decoder": "unet", "feature_size": 4}),
    "dynunet": ("monai/dynunet", {"filters": [4, 8, 8, 8], "strides": [1, 2, 2, 2]}, {}),
    "dynunet-ds": (
        "monai/dynunet",
        {"filters": [4, 8, 8, 8], "strides": [1, 2, 2, 2]},
        {"deep_supervision": True},
    ),
    "mednext": ("monai/mednext_s", MEDNEXT, {}),
    "mednext-ds": ("monai/mednext_s", MEDNEXT, {"deep_supervision": True}),
    "resenc": ("nnunet/resenc", RESENC, {}),
    "resenc-ds": ("nnunet/resenc", RESENC, {"deep_supervision": True}),
    "resnet-unet": ("monai/resnet10", NARROW, {"feature_size": 4}),
    "resnet-unet-ds": ("monai/resnet10", NARROW, {"feature_size": 4, "deep_supervision": True}),
    "resnet-flexible": ("monai/resnet10", NARROW, {"decoder": "flexible"}),
    "timm-unet": ("timm/test_convnext", {}, {"feature_size": 4}),
}


def recipe_of(network: str, dims: int, **optim: object) -> FinetuneRecipe:
    backbone, options, decoder = NETWORKS[network]
    model = {"backbone": backbone, "options": options, "balance": False, **decoder}
    return validate(FinetuneRecipe, {"dims": dims, "model": model, "optim": optim})


def encoder_weights(name: str, dims: int) -> tuple[dict[str, torch.Tensor], Passport]:
    backbone, options, _ = NETWORKS[name]
    net = build_backbone(backbone, dims, 1, **options)
    state = {k: v for k, v in net.network.state_dict().items() if k in net.encoder_keys}
    return state, Passport(backbone, dims, 1, options)


def made(network: str, dims: int, **optim: object) -> build_finetuning.Segmenter:
    weights = encoder_weights(network, dims)
    return build_finetuning.segmenter(
        recipe_of(network, dims, **optim), 3, weights, lambda: torch.zeros(0)
    )


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_takes_its_encoder_whole_learns_and_predicts(name: str, dims: int) -> None:
    """Coverage 1 by own keys, one guarded step, logits of every voxel, and back from its card."""
    if name.startswith("resenc"):
        pytest.importorskip("dynamic_network_architectures", reason="needs the extra `nnunet`")
    torch.manual_seed(0)
    recipe, segmenter = recipe_of(name, dims), made(name, dims)
    assert segmenter.report is not None
    assert segmenter.report.coverage == 1.0
    assert (segmenter.report.missing, segmenter.report.unused) == ((), ())
    loss = build.segmentation_loss(recipe.loss, 3, recipe.model.deep_supervision)
    fabric = Fabric(accelerator="cpu", devices=1)
    module, optimizer = build_finetuning.set_up(fabric, segmenter, recipe.optim)
    set_step(optimizer, 1e-3, 0.0)
    crops = torch.randn(2, 1, *(32,) * dims)
    labels = torch.randint(0, 3, (2, *(32,) * dims))
    outputs = module(crops)
    one_map = isinstance(outputs, torch.Tensor) and outputs.ndim == crops.ndim
    assert one_map != recipe.model.deep_supervision
    before = [p.detach().clone() for p in module.parameters() if p.requires_grad]
    result = take_step(fabric, optimizer, module, lambda: (loss(module(crops), labels), {}), 5.0)
    assert not result.skipped
    after = [p for p in module.parameters() if p.requires_grad]
    assert all(p.grad is not None for p in after)
    assert sum(torch.equal(a, b) for a, b in zip(before, after, strict=True)) < len(after) / 4

    plan = WindowPlan((32,) * dims, 0.25)
    found = predict_labels(segmenter.network, torch.randn(1, *(40,) * dims), plan)
    assert found.shape == (40,) * dims
    again, _ = build.segmentation_network(build.network_kind(recipe), 3)
    again.load_state_dict(segmenter.network.state_dict(), strict=True)


def test_flexible_unet_has_the_keys_of_monais() -> None:
    options = {"bias_downsample": False}
    net = build_backbone("monai/resnet10", 2, 1, **options)
    ours = build_segmenter(net, 3, decoder="flexible")
    theirs = FlexibleUNet(1, 3, "resnet10", spatial_dims=2)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    crops = torch.randn(1, 1, 64, 64)
    torch.testing.assert_close(ours.eval()(crops), theirs.eval()(crops))


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ({"backbone": "monai/segresnet", "deep_supervision": True}, "choose model.decoder=unet"),
        ({"backbone": "monai/segresnet", "decoder": "flexible"}, "is for monai/resnet10 to 101"),
        (
            {"backbone": "monai/resnet10", "decoder": "flexible", "deep_supervision": True},
            "does not go with deep supervision",
        ),
    ],
)
def test_decoders_that_do_not_fit_are_refused(model: dict, told: str) -> None:
    recipe = validate(FinetuneRecipe, {"model": model})
    with pytest.raises(ConfigError, match=told):
        build.segmentation_network(build.network_kind(recipe), 3)


def test_an_encoder_of_another_network_is_refused() -> None:
    state, passport = encoder_weights("dynunet", 3)
    with pytest.raises(ConfigError, match="the weights come from monai/dynunet"):
        build_finetuning.segmenter(recipe_of("mednext", 3), 3, (state, passport), torch.zeros)
    wide = build_backbone("monai/dynunet", 3, 1, filters=[8, 8, 8, 8], strides=[1, 2, 2, 2])
    with pytest.raises(ConfigError, match="build the network with the backbone and options"):
        load_into(wide.network, state)


# ---- deep supervision ----------------------------------------------------------------------------


def test_deep_supervision_weighs_by_halves_and_shrinks_labels_to_the_nearest() -> None:
    def mean(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return logits.mean() + 100 * labels.float().mean()

    class Mean(nn.Module):
        def forward(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return mean(logits, labels)

    maps = [torch.full((1, 2, n, n), v) for n, v in [(8, 1.0), (4, 10.0), (2, 100.0)]]
    labels = torch.zeros(1, 8, 8, dtype=torch.long)
    found = DeepSupervision(Mean())(maps, labels)
    assert float(found) == pytest.approx((1 + 10 / 2 + 100 / 4) / (1 + 1 / 2 + 1 / 4))
    halves = torch.zeros(1, 8, 8, dtype=torch.long)
    halves[:, 4:] = 1
    empty = [m * 0 for m in maps]
    assert float(DeepSupervision(Mean())(empty, halves)) == pytest.approx(50)
    stacked = torch.stack([maps[0], 10 * maps[0]], 1)
    assert float(DeepSupervision(Mean())(stacked, labels)) == pytest.approx((1 + 5) / 1.5)
    assert float(DeepSupervision(Mean())(maps[0], labels)) == pytest.approx(1)


# ---- rates, freezing, statistics -----------------------------------------------------------------


def test_rates_fall_by_stage_from_the_deepest_to_the_stem() -> None:
    segmenter = made("resnet-unet", 3, layer_decay=0.5, encoder_lr_ratio=0.4)
    rates = segmenter.rates
    assert rates["encoder.layer4.0.conv1.weight"] == pytest.approx(0.4 * 0.5)
    assert rates["encoder.layer3.0.conv1.weight"] == pytest.approx(0.4 * 0.25)
    assert rates["encoder.layer1.0.conv1.weight"] == pytest.approx(0.4 * 0.0625)
    assert rates["encoder.conv1.weight"] == rates["encoder.layer1.0.conv1.weight"]
    assert not any(name.startswith(("ups", "head", "laterals")) for name in rates)
    fabric = Fabric(accelerator="cpu", devices=1)
    _, optimizer = build_finetuning.set_up(fabric, segmenter, FinetuneOptimSection())
    set_step(optimizer, 2.0, 0.0)
    by_id = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    named = dict(segmenter.network.named_parameters())
    for name, parameter in named.items():
        if parameter.requires_grad:
            assert by_id[id(parameter)] == pytest.approx(2 * rates.get(name, 1.0)), name


def test_between_stages_counts_with_the_stage_it_leads_to() -> None:
    rates = made("mednext", 2, layer_decay=0.5).rates
    assert rates["stem.weight"] == rates["enc_stages.0.0.conv1.weight"] == pytest.approx(0.125)
    assert rates["down_blocks.0.conv1.weight"] == pytest.approx(0.25)
    assert rates["bottleneck.0.conv1.weight"] == pytest.approx(0.5)


@pytest.mark.parametrize("optimizer_name", ["adamw", "sgd", "lamb"])
def test_a_frozen_encoder_does_not_move_and_then_does(optimizer_name: str) -> None:
    segmenter = made("resnet-flexible", 2, name=optimizer_name, weight_decay=0.1)
    fabric = Fabric(accelerator="cpu", devices=1)
    optim = FinetuneOptimSection(name=optimizer_name)  # type: ignore[arg-type]
    module, optimizer = build_finetuning.set_up(fabric, segmenter, optim)
    encoder, decoder = encoder_of(segmenter.network), segmenter.network.get_submodule("decoder")
    crops = torch.randn(2, 1, 64, 64)

    def step(frozen: bool) -> tuple[bool, bool]:
        """Whether anything of the encoder (buffers too), and of the decoder, changed."""
        old = [{k: v.clone() for k, v in part.state_dict().items()} for part in (encoder, decoder)]
        set_step(optimizer, 1e-2, 0.1, frozen)
        segmenter.ready(frozen)
        take_step(fabric, optimizer, module, lambda: (module(crops).square().mean(), {}), 1.0)
        new = [encoder.state_dict(), decoder.state_dict()]
        changed = [
            any(not torch.equal(o[k], n[k]) for k in o) for o, n in zip(old, new, strict=True)
        ]
        return changed[0], changed[1]

    assert step(frozen=True) == (False, True)
    assert step(frozen=True) == (False, True)
    assert step(frozen=False) == (True, True)


def test_statistics_are_kept_estimated_or_moved() -> None:
    weights = encoder_weights("resnet-unet", 2)
    crops = torch.randn(8, 1, 64, 64) * 3 + 5

    def after(choice: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Running mean of the stem at the start and after a training pass; that of the crops."""
        tree = recipe_of("resnet-unet", 2).model_dump()
        tree["model"]["batch_norm"] = choice
        segmenter = build_finetuning.segmenter(
            validate(FinetuneRecipe, tree), 3, weights, lambda: crops
        )
        stem = segmenter.network.get_submodule("encoder.bn1")
        first = stem.running_mean.clone()
        segmenter.ready(frozen=False)
        segmenter.network(crops)
        conv = segmenter.network.get_submodule("encoder.conv1")
        with torch.no_grad():
            own = conv(crops).mean((0, 2, 3))
        return first, stem.running_mean.clone(), own

    pretrained = weights[0]["bn1.running_mean"]
    first, later, _ = after("hold")
    assert torch.equal(first, pretrained)
    assert torch.equal(later, pretrained)
    first, later, _ = after("train")
    assert torch.equal(first, pretrained)
    assert not torch.equal(later, pretrained)
    first, later, own = after("estimate")
    torch.testing.assert_close(first, own, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("choice", "frozen"), [("hold", False), ("train", True)])
@pytest.mark.parametrize(
    ("backbone", "options"),
    [
        ("monai/segresnet", {**SEGRESNET, "norm": "batch"}),
        ("monai/dynunet", {"filters": [4, 8, 8], "strides": [1, 2, 2], "norm_name": "batch"}),
    ],
)
def test_a_decoder_of_the_networks_own_does_not_hold_its_fresh_statistics(
    backbone: str, options: dict, choice: str, frozen: bool
) -> None:
    net = build_backbone(backbone, 2, 1, **options)
    state = {k: v for k, v in net.network.state_dict().items() if k in net.encoder_keys}
    model = {"backbone": backbone, "options": options, "balance": False, "batch_norm": choice}
    recipe = validate(FinetuneRecipe, {"dims": 2, "model": model})
    weights = state, Passport(backbone, 2, 1, options)
    segmenter = build_finetuning.segmenter(recipe, 3, weights, lambda: torch.zeros(0))
    segmenter.ready(frozen)
    segmenter.network(torch.randn(2, 1, 32, 32) * 3 + 5)
    means = {k: v for k, v in segmenter.network.state_dict().items() if k.endswith("running_mean")}
    moved = {key for key, value in means.items() if value.any()}
    assert not moved & state.keys()
    assert moved >= {key for key in means if key.startswith(("up_layers", "upsamples"))} > set()
