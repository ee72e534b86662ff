"""Conversions: which keys, which shapes, and features that stay what they were."""

from dataclasses import replace

import pytest
import torch
from checkpoints import CONVNEXT, RESNET, make, to_meta_names
from torch import Tensor

from spark3d.errors import ConfigError
from spark3d.models.backbones import Backbone, build_backbone
from spark3d.models.segmenter import stage_outputs
from spark3d.weights import convert
from spark3d.weights.convert import Converted, change_channels, import_foreign, inflate_to_3d
from spark3d.weights.equality import agree
from spark3d.weights.exchange import load_into
from spark3d.weights.foreign import Foreign
from spark3d.weights.passport import Passport

NETWORKS = {"resnet": RESNET, "convnext": CONVNEXT}
every_network = pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)


def imported(network: tuple[str, dict], state: dict[str, Tensor], **more: object) -> Converted:
    found = Foreign(state, "", (), ())
    return import_foreign(found, "theirs.pth", f"timm/{network[0]}", 2, options=network[1], **more)


def filled(done: Converted) -> Backbone:
    """The network of converted weights, as a reader would build it from the passport."""
    about = done.passport
    backbone = build_backbone(about.backbone, about.ndim, about.in_channels, **about.options)
    load_into(backbone.network, done.state, 1.0)
    return backbone


def stages(backbone: Backbone, crops: Tensor) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return stage_outputs(backbone.network.double().eval(), backbone.stages, crops.double())


@every_network
@pytest.mark.parametrize("prefix", ["", "module."])
def test_checkpoints_of_timm_are_imported(network: tuple[str, dict], prefix: str) -> None:
    """Every encoder key, the classifier left out, and the library's own features."""
    theirs = make(network)
    done = imported(network, {prefix + k: v for k, v in theirs.state_dict().items()})
    ours = filled(done)
    assert set(done.report.matched) == set(ours.encoder_keys) == set(done.state)
    assert done.report.missing == ()
    left = done.report.left_out["not part of the encoder"]
    assert set(left) | set(done.state) == set(theirs.state_dict())
    assert all(key.startswith(("fc.", "head.")) for key in left)
    image = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        wanted = theirs.double().forward_features(image.double())
    torch.testing.assert_close(stages(ours, image)[-1], wanted, rtol=1e-12, atol=1e-12)


def test_metas_convnext_is_imported() -> None:
    theirs = make(CONVNEXT)
    done = imported(CONVNEXT, to_meta_names(theirs.state_dict()))
    state = theirs.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in done.state.items())
    assert done.report.left_out["not part of the encoder"]


def test_counters_that_old_checkpoints_lack_count_as_missing() -> None:
    """Before torch 0.4 batch norms had no counter; anything else that lacks is refused."""
    state = make(RESNET).state_dict()
    old = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    done = imported(RESNET, old)
    assert done.report.missing
    assert all(key.endswith("num_batches_tracked") for key in done.report.missing)
    assert done.report.missing[0] in "\n".join(done.report.lines())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"layer1.0.extra": torch.zeros(2)}, r"1 keys that it lacks \(layer1\.0\.extra\)"),
        (
            {"layer4.0.conv1.weight": None},
            r"nothing for 1 of its keys \(layer4\.0\.conv1\.weight\)",
        ),
        ({"layer4.0.bn1.bias": torch.zeros(3)}, r"layer4\.0\.bn1\.bias is 3, in timm/resnet10t 32"),
    ],
)
def test_unknown_missing_and_odd_keys_are_one_line(change: dict, said: str) -> None:
    state = {**make(RESNET).state_dict(), **change}
    with pytest.raises(ConfigError, match=said) as caught:
        imported(RESNET, {key: value for key, value in state.items() if value is not None})
    assert "--as" in str(caught.value)
    assert "\n" not in str(caught.value)


@every_network
@pytest.mark.parametrize(("theirs", "ours"), [(3, 1), (1, 3), (3, 4)])
def test_channels_are_adapted_on_import(network: tuple[str, dict], theirs: int, ours: int) -> None:
    """Equal channels keep their features; RGB to one channel is the sum of the weights."""
    source = make(network, theirs)
    done = imported(network, source.state_dict(), in_channels=ours)
    ((key, old, new),) = done.report.reshaped
    assert (old[1], new[1], done.passport.in_channels) == (theirs, ours, ours)
    grey = torch.randn(1, 1, 64, 64).double()
    with torch.no_grad():
        wanted = source.double().forward_features(grey.expand(-1, theirs, -1, -1))
    found = stages(filled(done), grey.expand(-1, ours, -1, -1))[-1]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    if ours == 1:
        torch.testing.assert_close(done.state[key], source.state_dict()[key].float().sum(1, True))
    assert "input channels" in done.passport.history[-1]


@every_network
@pytest.mark.parametrize("depth", ["mean", "centre", "flat"])
def test_inflation_keeps_the_features_of_a_constant_volume(
    network: tuple[str, dict], depth: str
) -> None:
    """With zero padding, as networks run: everywhere, or with "mean" away from the ends."""
    source = imported(network, make(network).state_dict())
    done = inflate_to_3d(source.state, source.passport, depth)
    ours, flat = filled(done), filled(source)
    assert {key for key, *_ in done.report.reshaped} | set(done.report.matched) == set(done.state)
    assert done.passport.options["depth"] == depth
    image = torch.randn(1, 3, 32, 32)
    slices = {"mean": 192, "centre": 64, "flat": 2}[depth]
    wanted = stages(flat, image)
    found = stages(ours, image.unsqueeze(2).expand(-1, -1, slices, -1, -1))
    for plane, volume, stride in zip(wanted, found, ours.strides, strict=True):
        inner = slice(None)
        if depth == "mean" and stride[0] > 8:
            continue  # stages that see farther than the volume's ends
        if depth == "mean":
            inner = slice(64 // stride[0], -64 // stride[0])
        middle = volume[:, :, inner]
        assert middle.shape[2] > 0
        torch.testing.assert_close(
            middle, plane.unsqueeze(2).expand_as(middle), rtol=1e-5, atol=1e-6
        )
    ends = (found[0][:, :, 0] - wanted[0]).abs().max()
    assert bool(ends > 1e-3) == (depth == "mean")


def test_networks_that_monai_has_in_2d_and_3d_are_inflated() -> None:
    """Under their own keys; the flat twin is one of timm's networks only."""
    passport = Passport("monai/segresnet", 2, 1, {"init_filters": 8, "blocks_down": (1, 1)})
    state = convert.encoder_state(convert.rebuilt(passport))
    done = inflate_to_3d(state, passport, "mean")
    assert done.passport.ndim == 3
    assert "depth" not in done.passport.options
    with pytest.raises(ConfigError, match="no flat 3D twin"):
        inflate_to_3d(state, passport, "flat")


def test_what_cannot_be_inflated_is_refused() -> None:
    source = imported(RESNET, make(RESNET).state_dict())
    with pytest.raises(ConfigError, match="mean, centre, flat"):
        inflate_to_3d(source.state, source.passport, "thick")
    with pytest.raises(ConfigError, match="3D already"):
        inflate_to_3d(source.state, replace(source.passport, ndim=3))
    other = Passport("timm/efficientnet_b0", 2, 3)
    state = convert.encoder_state(convert.rebuilt(other))
    with pytest.raises(ConfigError, match="no 3D twin"):
        inflate_to_3d(state, other)


def test_a_conversion_that_changes_features_is_not_handed_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The comparison is a real one: with wrong weights it refuses."""
    source = imported(RESNET, make(RESNET).state_dict())
    monkeypatch.setattr(
        convert, "inflate", lambda w, _depth, n: w.unsqueeze(2).repeat_interleave(n, 2)
    )
    with pytest.raises(ConfigError, match=r"not so: a volume .* nothing was written"):
        inflate_to_3d(source.state, source.passport, "mean")
    a = [torch.ones(2, 2)]
    assert "largest difference 1e-07" in agree("x", ["s"], a, [a[0] + 1e-7])
    with pytest.raises(ConfigError, match="stage s differs by"):
        agree("x", ["s"], a, [a[0] * float("nan")])
    with pytest.raises(ConfigError, match=r"s is \(2, 2\) and \(1, 2\)"):
        agree("x", ["s"], a, [torch.ones(1, 2)])


def test_history_tells_every_conversion() -> None:
    source = imported(RESNET, make(RESNET).state_dict())
    grey = change_channels(source.state, source.passport, 1)
    deep = inflate_to_3d(grey.state, grey.passport)
    assert deep.passport.history == (
        "imported from theirs.pth",
        "input channels 3 -> 1",
        "inflated from 2D to 3D, depth=mean",
    )
    assert Passport.from_json(deep.passport.to_json()) == deep.passport
