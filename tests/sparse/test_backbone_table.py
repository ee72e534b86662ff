"""The contract over the full-size networks that recipes name; long, so behind the marker slow."""

import pytest
from contract import assert_gradients_equal, assert_proof_holds, assert_round_trip
from small_networks import Small

from spark3d.models.backbones import build_backbone

pytestmark = pytest.mark.slow
FLAT = {
    "strides": (1, (1, 2, 2), 2, 2),
    "kernel_size": ((1, 3, 3), (1, 3, 3), 3, 3),
    "filters": (16, 32, 64, 128),
    "res_block": True,
}
TIMM = (
    "resnet18",
    "resnet50",
    "convnext_tiny",
    "convnext_small",
    "convnext_base",
    "convnextv2_tiny",
    "efficientnet_b0",
    "regnety_002",
    "regnety_016",
)
MONAI = (
    "monai/resnet18",
    "monai/resnet50",
    "monai/segresnet",
    "monai/dynunet",
    "monai/mednext_s",
    "monai/mednext_b",
    "nnunet/resenc",
)
LINES = ("monai/resnet18", "monai/resnet50", "nnunet/resenc")
TABLE = (
    *((f"timm/{name}", 2, {}) for name in TIMM),
    *(("timm/" + name, 3, {}) for name in ("resnet18", "resnet50", "convnext_tiny")),
    *((name, ndim, {}) for name in MONAI for ndim in (2, 3)),
    *((name, 1, {}) for name in LINES),
    ("monai/dynunet", 3, FLAT),
    ("monai/mednext_s", 3, {"global_resp_norm": True}),
    ("monai/segresnet", 3, {"dropout_prob": 0.2}),
)
every = pytest.mark.parametrize(
    ("name", "ndim", "options"), TABLE, ids=lambda v: "options" if isinstance(v, dict) else str(v)
)


def named(name: str, ndim: int, options: dict) -> Small:
    """Two cells along the last axes, one along the first of three; more where instance norms would
    see two visible sites: over so few, rounding errors grow with every layer.
    """
    if name.startswith("nnunet"):
        pytest.importorskip("dynamic_network_architectures", reason="needs the extra `nnunet`")
    channels = 3 if name.startswith("timm") else 1
    net = build_backbone(name, ndim, channels, **options)
    few = (1, 2, 2)[-ndim:] if ndim > 1 else (4,)
    many = (1, 3, 3)[-ndim:] if ndim > 1 else (12,)
    cells = many if name.startswith("nnunet") else few
    size = tuple(n * s for n, s in zip(cells, net.stride, strict=True))
    return Small(
        lambda: build_backbone(name, ndim, channels, **options).network,
        net.stages,
        size,
        net.stride,
        channels,
    )


@every
def test_the_proof_holds(name: str, ndim: int, options: dict) -> None:
    assert_proof_holds(named(name, ndim, options))


@every
def test_gradients_of_both_backends_are_equal(name: str, ndim: int, options: dict) -> None:
    assert_gradients_equal(named(name, ndim, options))


@every
def test_keys_and_weights_survive_a_round_trip(name: str, ndim: int, options: dict) -> None:
    assert_round_trip(named(name, ndim, options))
