"""Encoder weights: written whole, read back equal, refused with a remedy when they do not fit."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from spark3d.errors import ConfigError, DataError
from spark3d.models.backbones import Backbone, build_backbone
from spark3d.models.segmenter import build_segmenter, stage_outputs
from spark3d.weights.exchange import (
    adapt_channels,
    load_encoder,
    load_into,
    passport_path,
    save_encoder,
)
from spark3d.weights.passport import Passport

NETWORKS = [
    ("monai/segresnet", 3, {"init_filters": 8}),
    ("monai/dynunet", 3, {"filters": (4, 8, 8, 8, 8)}),
    ("monai/mednext_s", 2, {"init_filters": 4}),
    ("monai/resnet10", 3, {"widen_factor": 0.125}),
    ("timm/convnext_atto", 2, {}),
]
every_network = pytest.mark.parametrize(("name", "ndim", "options"), NETWORKS)


def state_of(backbone: Backbone) -> dict[str, Tensor]:
    """The encoder's part of the state, every number changed so that loading shows."""
    state = backbone.network.state_dict()
    return {key: state[key].clone() + 1 for key in backbone.encoder_keys}


def passport_of(backbone: Backbone) -> Passport:
    return Passport(
        backbone=backbone.name,
        ndim=backbone.ndim,
        in_channels=backbone.in_channels,
        options=dict(backbone.options),
        spacing_mm=(1.5, 1.5, 2.0),
        intensity={"clip_hu": [-200, 300]},
        objective="spark",
        content_hashes=("a1", "b2"),
        steps=7,
    )


def segresnet(**options: object) -> Backbone:
    return build_backbone("monai/segresnet", 3, 1, init_filters=8, **options)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Weights of a small SegResNet on disk."""
    backbone = segresnet()
    path = tmp_path / "encoder.safetensors"
    save_encoder(path, state_of(backbone), passport_of(backbone))
    return path


@every_network
def test_weights_travel(name: str, ndim: int, options: dict, tmp_path: Path) -> None:
    """Save, load, put into a fresh segmenter: its stages are those of the first network."""
    first = build_backbone(name, ndim, 1, **options)
    first.network.load_state_dict(state_of(first), strict=False)
    state = {k: v for k, v in first.network.state_dict().items() if k in first.encoder_keys}
    path = tmp_path / "encoder.safetensors"
    save_encoder(path, state, passport_of(first))
    loaded, passport = load_encoder(path)
    assert loaded.keys() == set(first.encoder_keys)
    again = build_backbone(
        passport.backbone, passport.ndim, passport.in_channels, **passport.options
    )
    segmenter = build_segmenter(again, 2)
    report = load_into(segmenter, loaded, passport=passport, backbone=name)
    assert (report.coverage, report.missing, report.unused) == (1.0, (), ())
    assert set(report.matched) == set(first.encoder_keys)
    crops = torch.randn(1, 1, *(2 * s for s in first.stride))
    with torch.no_grad():
        for a, b in zip(
            stage_outputs(first.network.eval(), first.stages, crops),
            stage_outputs(again.network.eval(), again.stages, crops),
            strict=True,
        ):
            assert torch.equal(a, b)


@every_network
def test_the_decoder_stays_as_it_was(name: str, ndim: int, options: dict) -> None:
    """Exactly the tensors that the report calls untouched keep their values."""
    backbone = build_backbone(name, ndim, 1, **options)
    segmenter = build_segmenter(backbone, 2)
    before = {key: value.clone() for key, value in segmenter.state_dict().items()}
    report = load_into(segmenter, state_of(backbone))
    after = segmenter.state_dict()
    same = {key for key, value in after.items() if torch.equal(value, before[key])}
    assert same == set(report.untouched)
    assert same


def test_the_passport_says_everything(saved: Path) -> None:
    """JSON on disk has the fields a reader needs, the hash of the file and the versions."""
    note = json.loads(passport_path(saved).read_text())
    assert note["backbone"] == "monai/segresnet"
    assert note["spacing_mm"] == [1.5, 1.5, 2.0]
    assert note["content_hashes"] == ["a1", "b2"]
    assert {"python", "spark3d", "torch", "monai"} <= note["versions"].keys()
    assert len(note["sha256"]) == 64
    _, passport = load_encoder(saved)
    assert passport.spacing_mm == (1.5, 1.5, 2.0)
    assert passport == Passport.from_json(passport.to_json())


def test_no_half_written_file_is_left(saved: Path) -> None:
    """Only the two files stand in the folder, and saving again replaces them."""
    assert {p.name for p in saved.parent.iterdir()} == {"encoder.safetensors", "encoder.json"}
    before = saved.read_bytes()
    save_encoder(saved, {"a": torch.zeros(1)}, Passport("x/y", 3, 1))
    assert saved.read_bytes() != before
    assert load_encoder(saved)[1].backbone == "x/y"
    assert len(list(saved.parent.iterdir())) == 2


@pytest.mark.parametrize("damage", ["cut", "flip", "gone", "no passport", "bad json", "newer"])
def test_damage_is_named_with_the_remedy(saved: Path, damage: str) -> None:
    """A data error with the file's name; nothing is returned."""
    note = passport_path(saved)
    data = bytearray(saved.read_bytes())
    if damage == "cut":
        saved.write_bytes(data[: len(data) // 2])
    elif damage == "flip":
        data[-1] ^= 1
        saved.write_bytes(data)
    elif damage == "gone":
        saved.unlink()
    elif damage == "no passport":
        note.unlink()
    elif damage == "bad json":
        note.write_text("{")
    else:
        note.write_text(json.dumps({**json.loads(note.read_text()), "format": 99}))
    with pytest.raises(DataError, match=r"encoder\.(safetensors|json).*(copy|two files|upgrade)"):
        load_encoder(saved)


def test_a_file_that_is_no_safetensors_is_refused(saved: Path) -> None:
    """Also when its hash agrees with the passport (someone hashed the wrong file)."""
    saved.write_bytes(b"not weights")
    note = json.loads(passport_path(saved).read_text())
    passport_path(saved).write_text(json.dumps({**note, "sha256": ""}))
    with pytest.raises(DataError, match="cannot be read"):
        load_encoder(saved)


def test_less_than_the_coverage_is_refused_and_changes_nothing() -> None:
    """Another width covers too little; the network keeps every value."""
    state = state_of(segresnet())
    other = build_backbone("monai/segresnet", 3, 1, init_filters=16).network
    before = {key: value.clone() for key, value in other.state_dict().items()}
    with pytest.raises(ConfigError, match=r"cover 0\.0% .*options of the weights' passport"):
        load_into(other, state)
    assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items())


def test_a_deeper_network_is_not_covered_by_a_shallow_encoder() -> None:
    """All weights fit, but most of the network would stay untrained: refused, unless allowed."""
    state = state_of(segresnet(blocks_down=(1, 1, 1, 1)))
    deeper = segresnet(blocks_down=(1, 2, 2, 4)).network
    with pytest.raises(ConfigError, match=r"of the network get nothing \(down_layers"):
        load_into(deeper, state)
    report = load_into(deeper, state, min_coverage=0.1)
    assert report.missing
    assert not report.unused
    assert 0.1 < report.coverage < 0.9


def test_another_backbone_is_refused() -> None:
    """The names of the passport and of the network must agree."""
    backbone = segresnet()
    with pytest.raises(ConfigError, match=r"monai/segresnet.*monai/dynunet"):
        load_into(
            backbone.network,
            state_of(backbone),
            passport=passport_of(backbone),
            backbone="monai/dynunet",
        )
    with pytest.raises(ConfigError, match=r"cover 0\.0%"):
        load_into(build_backbone("monai/dynunet", 3, 1).network, state_of(backbone))


def test_other_input_channels_are_adapted() -> None:
    """The stem counts as reshaped; equal channels give the response of the first network."""
    one = build_backbone("timm/resnet18", 2, 1)
    three = build_backbone("timm/resnet18", 2, 3)
    state = {k: one.network.state_dict()[k] for k in one.encoder_keys}
    report = load_into(three.network, state)
    assert report.reshaped == ("conv1.weight",)
    assert report.coverage == 1.0
    assert "1 reshaped" in str(report)
    image = torch.randn(1, 1, 64, 64)
    with torch.no_grad():
        a = stage_outputs(one.network.eval(), one.stages, image)
        b = stage_outputs(three.network.eval(), three.stages, image.expand(-1, 3, -1, -1))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("new", [1, 2, 5])
def test_every_convolution_that_reads_the_input_is_adapted(new: int) -> None:
    """A residual DynUNet has a shortcut beside its first convolution."""
    options = {"filters": (4, 4, 8), "strides": (1, 2, 2), "res_block": True}
    three = build_backbone("monai/dynunet", 2, 3, **options)
    other = build_backbone("monai/dynunet", 2, new, **options)
    state = {k: three.network.state_dict()[k] for k in three.encoder_keys}
    report = load_into(other.network, state, 1.0)
    assert report.reshaped == (
        "input_block.conv1.conv.weight",
        "input_block.conv3.conv.weight",
    )
    image = torch.randn(1, 1, 16, 16)
    with torch.no_grad():
        a, b = (
            stage_outputs(net.network.eval(), net.stages, image.expand(-1, n, -1, -1))
            for net, n in ((three, 3), (other, new))
        )
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@given(old=st.integers(1, 5), new=st.integers(1, 5), ndim=st.integers(1, 3))
def test_adapted_channels_keep_their_sum(old: int, new: int, ndim: int) -> None:
    """The response to channels that are all equal does not change."""
    weight = torch.randn(4, old, *(3,) * ndim, dtype=torch.float64)
    adapted = adapt_channels(weight, torch.Size((4, new, *(3,) * ndim)))
    assert adapted is not None
    torch.testing.assert_close(adapted.sum(1), weight.sum(1))
    assert adapt_channels(weight, torch.Size((5, new, *(3,) * ndim))) is None
    assert adapt_channels(weight, torch.Size((4, new, *(5,) * ndim))) is None


def test_inner_convolutions_are_never_adapted() -> None:
    """Only convolutions that read the input may differ in theirs."""
    backbone = segresnet()
    state = state_of(backbone)
    key = "down_layers.3.1.conv1.conv.weight"
    state[key] = state[key][:, :1]
    report = load_into(backbone.network, state, min_coverage=0.1)
    assert report.unused == (key,)
    assert report.reshaped == ()


def test_the_report_reads_as_one_line() -> None:
    """Counts of matched, reshaped and missing tensors, and the coverage."""
    backbone = segresnet()
    line = str(load_into(backbone.network, state_of(backbone)))
    assert "58 matched, 0 reshaped, 0 missing, 0 unused (100.0% of the encoder)" in line
    assert "\n" not in line
