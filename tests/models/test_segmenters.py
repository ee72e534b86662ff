"""Segmentation networks over every backbone, and the 3D twins of timm networks."""

import pytest
import timm
import torch

from spark3d.errors import ConfigError
from spark3d.models.backbones import build_backbone
from spark3d.models.segmenter import PyramidSegmenter, build_segmenter, encoder_of, stage_outputs

CASES = [
    ("monai/segresnet", 3, {"init_filters": 8, "out_channels": 5}, (16, 16, 16)),
    ("monai/dynunet", 2, {"filters": (4, 8, 8, 8, 8), "out_channels": 5}, (32, 32)),
    ("monai/mednext_s", 3, {"init_filters": 4, "out_channels": 5}, (32, 32, 32)),
    ("monai/resnet10", 3, {"widen_factor": 0.125}, (32, 32, 32)),
    ("monai/resnet10", 3, {"widen_factor": 0.125, "conv1_t_stride": (1, 2, 2)}, (16, 32, 32)),
    ("monai/resnet10", 2, {"conv1_t_stride": 1, "no_max_pool": True}, (32, 32)),
    ("timm/convnext_atto", 2, {}, (64, 64)),
]


@pytest.mark.parametrize(("name", "ndim", "options", "size"), CASES)
def test_logits_cover_the_crop_and_train_everything(
    name: str, ndim: int, options: dict, size: tuple[int, ...]
) -> None:
    """One logit per class and voxel; every parameter that is not frozen gets a gradient."""
    backbone = build_backbone(name, ndim, 2, **options)
    segmenter = build_segmenter(backbone, 5)
    logits = segmenter(torch.randn(2, 2, *size))
    assert logits.shape == (2, 5, *size)
    logits.square().mean().backward()
    idle = [n for n, p in segmenter.named_parameters() if p.requires_grad and p.grad is None]
    assert idle == []


def test_networks_with_a_decoder_of_their_own_are_returned_themselves() -> None:
    """Same module, same keys; the wrong number of classes is refused with the remedy."""
    backbone = build_backbone("monai/segresnet", 3, 1, init_filters=8, out_channels=3)
    assert build_segmenter(backbone, 3) is backbone.network
    assert encoder_of(backbone.network) is backbone.network
    with pytest.raises(ConfigError, match="pass out_channels=4"):
        build_segmenter(backbone, 4)


def test_the_encoder_inside_keeps_its_keys() -> None:
    """The state of the backbone loads strictly into the encoder of the segmenter."""
    backbone = build_backbone("timm/convnext_atto", 2, 1)
    segmenter = build_segmenter(backbone, 2)
    assert isinstance(segmenter, PyramidSegmenter)
    fresh = build_backbone("timm/convnext_atto", 2, 1)
    encoder_of(segmenter).load_state_dict(fresh.network.state_dict(), strict=True)


@pytest.mark.parametrize("network", ["resnet18", "convnext_atto", "convnextv2_atto"])
@pytest.mark.parametrize("depth", ["centre", "flat"])
def test_a_volume_constant_along_depth_gives_the_features_of_its_slice(
    network: str, depth: str
) -> None:
    """2D weights in the 3D twin reproduce the 2D features at every depth."""
    flat = timm.create_model(network, num_classes=0, in_chans=1).eval().double()
    for parameter in flat.parameters():
        torch.nn.init.normal_(parameter, std=0.3) if parameter.ndim > 1 else None
    twin = build_backbone(f"timm/{network}", 3, 1, depth=depth)
    twin.network.double()
    shapes = {key: value.shape for key, value in twin.network.state_dict().items()}
    fitting = {
        key: value if value.shape == shapes[key] else inflated(value, depth)
        for key, value in flat.state_dict().items()
    }
    twin.network.load_state_dict(fitting)
    image = torch.randn(1, 1, 32, 32, dtype=torch.float64)
    volume = image.unsqueeze(2).expand(-1, -1, 32, -1, -1)
    wanted = stage_outputs(flat, twin.stages, image)
    with torch.no_grad():
        found = stage_outputs(twin.network.eval(), twin.stages, volume)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b.unsqueeze(2).expand_as(a))


def inflated(weight: torch.Tensor, depth: str) -> torch.Tensor:
    """The 2D kernel in the middle of as many slices as it is high, or of one."""
    slices = weight.shape[-1] if depth == "centre" else 1
    out = weight.new_zeros(*weight.shape[:2], slices, *weight.shape[2:])
    out[:, :, (slices - 1) // 2] = weight
    return out


def test_mean_inflation_agrees_away_from_the_ends() -> None:
    """The middle slice of the stem sees no border, so it equals the 2D stem."""
    torch.manual_seed(0)
    flat = timm.create_model("resnet18", num_classes=0, in_chans=1).eval()
    torch.manual_seed(0)
    twin = build_backbone("timm/resnet18", 3, 1, depth="mean").network.eval()
    image = torch.randn(1, 1, 32, 32)
    wanted = flat.conv1(image)
    found = twin.conv1(image.unsqueeze(2).expand(-1, -1, 32, -1, -1))
    torch.testing.assert_close(found[:, :, 8], wanted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found[:, :, 0], wanted, atol=1e-3)
