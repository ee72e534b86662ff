"""Backbones: stages where they are said to be, keys as the library has them, clear refusals."""

import pytest
import timm
import torch
from monai.networks.nets.segresnet import SegResNet

from spark3d.errors import ConfigError, EnvironmentProblem
from spark3d.models import resenc
from spark3d.models.backbones import Backbone, build_backbone
from spark3d.models.segmenter import stage_outputs
from spark3d.sparse.encoder import SparseEncoder
from spark3d.sparse.mask import CellMask

ANISOTROPIC = {
    "strides": ((1, 1, 1), (1, 2, 2), (2, 2, 2)),
    "kernel_size": ((1, 3, 3), 3, 3),
    "filters": (4, 8, 8),
}
CASES = [
    ("monai/segresnet", 2, {"init_filters": 8}),
    ("monai/segresnet", 3, {"init_filters": 8, "blocks_down": (1, 1, 1)}),
    ("monai/dynunet", 2, {"filters": (4, 8, 8, 8, 8)}),
    ("monai/dynunet", 3, ANISOTROPIC),
    ("monai/mednext_s", 2, {"init_filters": 8}),
    ("monai/mednext_b", 3, {"init_filters": 4}),
    ("monai/resnet18", 3, {"widen_factor": 0.25}),
    ("monai/resnet10", 2, {"widen_factor": 0.25, "no_max_pool": True}),
    ("timm/resnet18", 2, {}),
    ("timm/resnet18", 3, {}),
    ("timm/convnext_atto", 2, {}),
    ("timm/convnextv2_atto", 3, {}),
    ("timm/efficientnet_b0", 2, {}),
    ("timm/regnety_002", 2, {}),
]


@pytest.mark.parametrize(("name", "ndim", "options"), CASES)
def test_stages_have_the_channels_and_strides_that_are_stated(
    name: str, ndim: int, options: dict
) -> None:
    """A real forward agrees with the one on shapes, and nothing of the network has changed."""
    backbone = build_backbone(name, ndim, 1, **options)
    assert {p.device.type for p in backbone.network.parameters()} == {"cpu"}
    size = tuple(2 * s for s in backbone.stride)
    with torch.no_grad():
        maps = stage_outputs(backbone.network.eval(), backbone.stages, torch.randn(1, 1, *size))
    for found, channels, stride in zip(maps, backbone.channels, backbone.strides, strict=True):
        expected = tuple(n // s for n, s in zip(size, stride, strict=True))
        assert found.shape == (1, channels, *expected)


@pytest.mark.parametrize(("name", "ndim", "options"), CASES)
def test_encoder_keys_are_exactly_what_the_stages_depend_on(
    name: str, ndim: int, options: dict
) -> None:
    """Every parameter among them gets a gradient from the stages, and no other does."""
    backbone = build_backbone(name, ndim, 1, **options)
    crops = torch.randn(2, 1, *(2 * s for s in backbone.stride))
    maps = stage_outputs(backbone.network, backbone.stages, crops)
    torch.stack([m.square().mean() for m in maps]).sum().backward()
    reached = {n for n, p in backbone.network.named_parameters() if p.grad is not None}
    parameters = dict(backbone.network.named_parameters())
    assert reached == {k for k in backbone.encoder_keys if k in parameters}
    state = backbone.network.state_dict()
    assert set(backbone.encoder_keys) <= state.keys()
    assert len(set(backbone.encoder_keys)) == len(backbone.encoder_keys)


def test_keys_are_those_of_the_library() -> None:
    """The network loads strictly what the library's own constructor gives, and back."""
    ours = build_backbone("monai/segresnet", 3, 1, init_filters=8, out_channels=3)
    theirs = SegResNet(3, 8, 1, 3)
    theirs.load_state_dict(ours.network.state_dict(), strict=True)
    ours = build_backbone("timm/convnext_atto", 2, 3)
    theirs = timm.create_model("convnext_atto", num_classes=0)
    ours.network.load_state_dict(theirs.state_dict(), strict=True)


def test_default_strides() -> None:
    """MONAI's ResNet reaches 32 as timm's; SegResNet stays at 8; options change them per axis."""
    assert build_backbone("monai/resnet18", 3, 1).strides == tuple((s,) * 3 for s in (4, 8, 16, 32))
    assert build_backbone("monai/segresnet", 3, 1).stride == (8, 8, 8)
    flat = build_backbone("monai/resnet10", 3, 1, conv1_t_stride=(1, 2, 2), no_max_pool=True)
    assert flat.strides == ((1, 2, 2), (2, 4, 4), (4, 8, 8), (8, 16, 16))
    assert build_backbone("monai/dynunet", 3, 1, **ANISOTROPIC).strides[1:] == (
        (1, 2, 2),
        (2, 4, 4),
    )


def test_stages_can_be_chosen() -> None:
    """Names given by the user replace the usual ones and end in the options for the passport."""
    backbone = build_backbone("timm/resnet18", 2, 3, stages=["act1", "layer2"])
    assert backbone.strides == ((2, 2), (8, 8))
    assert "layer4.0.conv1.weight" not in backbone.encoder_keys
    assert backbone.options["stages"] == ["act1", "layer2"]


@pytest.mark.parametrize(
    ("name", "ndim", "options", "message"),
    [
        ("monai/segresnt", 3, {}, "try monai/segresnet"),
        ("timm/resnet5", 2, {}, "close names: resnet50"),
        ("timm/efficientnet_b0", 3, {}, "has no 3D twin"),
        ("timm/ecaresnet26t", 3, {}, "is a EcaModule, which has no 3D counterpart; choose"),
        ("timm/resnest14d", 3, {}, "is a SplitAttn, which has no 3D counterpart"),
        ("timm/resnet18", 1, {}, "2 or 3 axes"),
        ("monai/segresnet", 3, {"filters": 3}, "does not take these options"),
        ("monai/segresnet", 1, {}, "in 1D: .*can only be 2 or 3"),
        ("monai/dynunet", 3, {"strides": []}, "options in 3D .IndexError: .*lengths"),
        ("timm/resnet18", 2, {"act_layer": "nope"}, "options in 2D .KeyError: 'nope'"),
        ("monai/mednext_s", 1, {}, "options in 1D .AssertionError: .*2 or 3"),
        ("monai/segresnet", 3, {"stages": ["layer1"]}, "sub-modules are .*down_layers.0"),
        ("timm/resnet18", 2, {"stages": ["layer1", "conv1"]}, "coarser"),
        ("timm/resnet18", 2, {"stages": ["layer1", "layer1.0"]}, "must be a whole multiple"),
        ("timm/vit_tiny_patch16_224", 2, {}, "cannot take an input"),
    ],
)
def test_refusals_name_what_is_wrong(name: str, ndim: int, options: dict, message: str) -> None:
    """Every mistake of a user ends in a configuration error that says what to change."""
    with pytest.raises(ConfigError, match=message):
        build_backbone(name, ndim, 1, **options)


@pytest.mark.parametrize("maxpool", [False, True])
def test_squeeze_excite_in_3d_pools_over_all_axes(maxpool: bool) -> None:
    """As in 2D over an image of the same values; masked, with all cells visible, the same."""
    flat = build_backbone("timm/seresnet18", 2, 1).network.eval()
    deep = build_backbone("timm/seresnet18", 3, 1, depth="flat").network.eval()
    one = flat.get_submodule("layer1.0.se")
    twin = deep.get_submodule("layer1.0.se")
    one.add_maxpool = twin.add_maxpool = maxpool  # type: ignore[assignment]
    for there, here in zip(twin.parameters(), one.parameters(), strict=True):
        there.data = here.data.view_as(there)
    x = torch.randn(2, 64, 4, 6, 8)
    wanted = one(x.flatten(2, 3)).view_as(x)
    torch.testing.assert_close(twin(x), wanted)
    mask = CellMask(torch.ones(2, 1, 1, 1, dtype=torch.bool), (32, 32, 32), 1)
    encoder = SparseEncoder(deep, ("layer1",), 3, backend="reference").eval()
    crops = torch.randn(2, 1, 32, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(encoder(crops, mask).maps[0], encoder.dense(crops)[0])


@pytest.mark.skipif(resenc.ResidualEncoderUNet is not None, reason="the extra is installed")
def test_the_optional_network_says_how_to_install_it() -> None:
    """Without the extra the error is one of the environment, with the command that helps."""
    with pytest.raises(EnvironmentProblem, match=r"spark3d\[nnunet\]"):
        build_backbone("nnunet/resenc", 3, 1)


def test_the_residual_encoder_of_nnunet() -> None:
    """With the extra, each convolution counts once although it is registered twice."""
    pytest.importorskip("dynamic_network_architectures")
    options = {"features": (4, 8, 8), "strides": (1, 2, (1, 2, 2)), "blocks": (1, 1, 1)}
    backbone: Backbone = build_backbone("nnunet/resenc", 3, 1, **options)
    assert backbone.strides == ((1, 1, 1), (2, 2, 2), (2, 4, 4))
    assert backbone.segments
    assert not any("decoder" in key for key in backbone.encoder_keys)
