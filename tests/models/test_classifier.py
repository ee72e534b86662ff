"""Classifiers: timm's networks under timm's keys, layers as published, targets as timm has them."""

import numpy as np
import pytest
import timm
import torch

from spark3d.build_images import layer_rates
from spark3d.classify_recipe import ClassifyRecipe
from spark3d.config import validate
from spark3d.engine.optim import build_optimizer, rated_groups, set_step
from spark3d.errors import ConfigError
from spark3d.models.classifier import build_classifier, layer_numbers
from spark3d.models.mixing import Mixing, classification_loss


def test_the_network_loads_into_timm_strictly_and_gives_the_same() -> None:
    built = build_classifier("timm/resnet10t", 7, {}, drop_path=0.1).network.eval()
    twin = timm.create_model("resnet10t", num_classes=7)
    twin.load_state_dict(built.state_dict())
    crops = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(built(crops), twin.eval()(crops))


def test_other_networks_and_options_are_refused() -> None:
    with pytest.raises(ConfigError, match="needs a network of timm"):
        build_classifier("monai/resnet18", 2, {})
    with pytest.raises(ConfigError, match="does not take these options"):
        build_classifier("timm/resnet10t", 2, {"no_such_option": 1})


def test_the_layers_of_convnext_small_are_those_of_its_authors() -> None:
    net = build_classifier("timm/convnext_small", 5, {})
    layers = layer_numbers(net, 3)
    assert set(layers) == {name for name, _ in net.network.named_parameters()}
    first = {
        "stem.0.weight": 0,
        "stages.0.blocks.2.gamma": 1,
        "stages.1.downsample.1.weight": 2,
        "stages.2.downsample.1.weight": 3,
        "stages.2.blocks.2.gamma": 3,
        "stages.2.blocks.3.gamma": 4,
        "stages.2.blocks.26.gamma": 11,
        "stages.3.downsample.0.weight": 12,
        "stages.3.blocks.0.gamma": 12,
        "head.norm.weight": 13,
        "head.fc.weight": 13,
    }
    assert {name: layers[name] for name in first} == first


def test_the_layers_of_resnet50_are_those_of_official_spark() -> None:
    net = build_classifier("timm/resnet50", 5, {})
    layers = layer_numbers(net, (3, 2, 3, 3))
    first = {
        "conv1.weight": 0,
        "bn1.bias": 0,
        "layer1.0.downsample.0.weight": 1,
        "layer1.2.conv1.weight": 1,
        "layer2.1.conv1.weight": 2,
        "layer2.2.conv1.weight": 3,
        "layer3.2.conv1.weight": 4,
        "layer3.3.conv1.weight": 5,
        "layer4.0.downsample.0.weight": 6,
        "layer4.2.bn3.weight": 6,
        "fc.bias": 7,
    }
    assert {name: layers[name] for name in first} == first


@pytest.mark.parametrize(
    ("name", "first"),
    [
        (
            "timm/mobilenetv3_small_050",  # stages are blocks 0, 1, 3 and 5
            {
                "conv_stem.weight": 0, "blocks.1.1.conv_dw.weight": 3,
                "blocks.2.0.conv_dw.weight": 4, "blocks.3.0.conv_dw.weight": 4,
                "blocks.3.1.conv_dw.weight": 5, "blocks.4.2.conv_dw.weight": 6,
                "blocks.5.0.conv.weight": 6, "conv_head.weight": 7,
            },
        ),
        (
            "timm/regnety_002",
            {
                "stem.conv.weight": 0, "s1.b1.conv1.conv.weight": 1, "s2.b1.conv1.conv.weight": 2,
                "s3.b1.conv1.conv.weight": 3, "s3.b4.conv1.conv.weight": 6,
                "s4.b7.conv1.conv.weight": 13, "head.fc.weight": 14,
            },
        ),
        (
            "timm/densenet121",
            {
                "features.conv0.weight": 0, "features.denseblock1.denselayer1.conv1.weight": 1,
                "features.transition1.conv.weight": 2, "features.norm5.weight": 4,
                "classifier.weight": 5,
            },
        ),
        ("timm/vgg11_bn", {"features.0.weight": 0, "features.25.weight": 3, "head.fc.weight": 5}),
    ],
)  # fmt: skip
def test_what_is_in_no_stage_goes_with_the_stage_it_leads_to(
    name: str, first: dict[str, int]
) -> None:
    layers = layer_numbers(build_classifier(name, 5, {}))
    assert {key: layers[key] for key in first} == first


@pytest.mark.parametrize("blocks", [0, (1, 1, 1), (1, 2, 0, 1)])
def test_impossible_layers_are_refused(blocks: object) -> None:
    net = build_classifier("timm/resnet10t", 2, {})
    with pytest.raises(ConfigError, match=r"each of the 4 stages of timm/resnet10t"):
        layer_numbers(net, blocks)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["adamw", "lamb", "sgd"])
def test_every_layer_gets_its_share_of_the_rate(name: str) -> None:
    net = build_classifier("timm/resnet10t", 2, {})
    layers = layer_numbers(net)
    rates = {key: 0.5 ** (max(layers.values()) - layer) for key, layer in layers.items()}
    optimizer = build_optimizer(name, rated_groups(net.network, rates), 1.0)  # type: ignore[arg-type]
    set_step(optimizer, 0.1, 0.02)
    found = {id(p): g for g in optimizer.param_groups for p in g["params"]}
    parameters = dict(net.network.named_parameters())
    assert len(found) == len(parameters)
    for key, parameter in parameters.items():
        group = found[id(parameter)]
        assert group["lr"] == pytest.approx(0.1 * rates[key])
        assert group["weight_decay"] == (0.02 if parameter.ndim > 1 else 0)


def test_from_scratch_no_layer_learns_less_than_the_head() -> None:
    net = build_classifier("timm/resnet10t", 2, {})
    recipe = validate(ClassifyRecipe, {"optim": {"layer_decay": 0.5}})
    assert set(layer_rates(net, recipe, pretrained=False).values()) == {1.0}
    rates = layer_rates(net, recipe, pretrained=True)
    assert (rates["fc.bias"], rates["layer4.0.conv1.weight"]) == (1.0, 0.5)


def test_without_mixing_targets_are_smoothed_one_hot() -> None:
    crops = torch.rand(3, 3, 4, 4)
    same, targets = Mixing(5, 0.1, 0.0, 0.0)(crops, torch.tensor([0, 4, 2]))
    assert same is crops
    expected = torch.full((3, 5), 0.02)
    expected[[0, 1, 2], [0, 4, 2]] = 0.92
    torch.testing.assert_close(targets, expected)


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_the_target_says_how_much_of_each_image_there_is(mixup: float, cutmix: float) -> None:
    """Image i is the plane i, so the mean of the mixed one tells its shares."""
    planes = torch.arange(4.0)[:, None, None, None].expand(4, 3, 16, 16).contiguous()
    rng = np.random.default_rng(0)
    mix, shares = Mixing(4, 0.0, mixup, cutmix), set()
    np.random.seed(int(rng.integers(99)))  # noqa: NPY002
    for _ in range(20):
        crops, targets = mix(planes, torch.arange(4))
        torch.testing.assert_close(crops.mean((1, 2, 3)), targets @ torch.arange(4.0))
        torch.testing.assert_close(targets.sum(1), torch.ones(4))
        shares.add(float(targets[0, 0]))
        assert float(planes[3].min()) == 3  # the crops handed in stay as they were
    assert len(shares) > 10


def test_an_odd_batch_cannot_be_paired() -> None:
    with pytest.raises(ConfigError, match=r"which has 5; make optim\.batch an even number"):
        Mixing(3, 0.1, 0.2, 0.0).check(5)
    Mixing(3, 0.1, 0.0, 0.0).check(5)


def test_losses_are_those_of_torch_on_soft_targets() -> None:
    logits = torch.randn(6, 4, dtype=torch.float64)
    targets = torch.rand(6, 4, dtype=torch.float64).softmax(1)
    ce = torch.nn.functional.cross_entropy(logits, targets)
    torch.testing.assert_close(classification_loss("ce")(logits, targets), ce)
    p = logits.sigmoid()
    bce = -(targets * p.log() + (1 - targets) * (1 - p).log()).mean()
    torch.testing.assert_close(classification_loss("bce")(logits, targets), bce)
