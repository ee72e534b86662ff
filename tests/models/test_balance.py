"""Balancing changes the spread of SegResNet's stages and nothing that a norm would not undo."""

import pytest
import torch
from torch import nn

from spark3d.errors import ConfigError
from spark3d.models.backbones import build_backbone
from spark3d.models.balance import (
    balance_stages,
    can_balance,
    free_norms,
    free_weights,
    restore_norms,
    stage_spreads,
)


@pytest.mark.parametrize("ndim", [2, 3])
def test_stages_get_the_spread_asked_for_and_keep_their_features(ndim: int) -> None:
    options = {"init_filters": 8, "blocks_down": (1, 2, 1), "blocks_up": (1, 1)}
    network = build_backbone("monai/segresnet", ndim, 1, **options).network.double()
    crops = torch.randn(3, 1, *(16,) * ndim, dtype=torch.float64)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(3)
        before = network.encode(crops)[1]
    factors = balance_stages(network, (0.5, 0.7, 0.9), crops)
    assert stage_spreads(network, crops) == pytest.approx((0.5, 0.7, 0.9), rel=1e-3)
    after = network.encode(crops)[1]
    for old, new, factor in zip(before, after, factors, strict=True):
        assert torch.allclose(old * factor, new, rtol=1e-3, atol=1e-4)


def test_other_networks_are_refused() -> None:
    assert not can_balance(nn.Conv2d(1, 1, 1))
    with pytest.raises(ConfigError, match=r"model\.balance=false"):
        stage_spreads(nn.Conv2d(1, 1, 1), torch.zeros(1, 1, 4, 4))


@pytest.mark.parametrize(("norm", "allowed"), [("batch", False), ("instance", True)])
def test_running_statistics_forbid_it(norm: str, allowed: bool) -> None:
    """In evaluation a batch norm divides by the scale of before, so the features would change."""
    options = {"init_filters": 8, "blocks_down": (1, 1), "blocks_up": (1,), "norm": norm}
    network = build_backbone("monai/segresnet", 2, 1, **options).network
    assert can_balance(network) == allowed
    if not allowed:
        with pytest.raises(ConfigError, match=r"running statistics .*model\.balance=false"):
            stage_spreads(network, torch.zeros(1, 1, 16, 16))


def test_free_norms_are_restored_without_changing_the_stages() -> None:
    options = {"init_filters": 8, "blocks_down": (1, 2, 1), "blocks_up": (1, 1)}
    network = build_backbone("monai/segresnet", 3, 1, **options).network.double()
    crops = torch.randn(3, 1, 16, 16, 16, dtype=torch.float64)
    norms, before = free_norms(network), stage_spreads(network, crops)
    assert len(norms) == 4
    with torch.no_grad():
        for weight in free_weights(network).values():
            weight.mul_(2.5)
    assert free_norms(network) == pytest.approx({k: 2.5 * v for k, v in norms.items()})
    restore_norms(network, norms)
    assert free_norms(network) == pytest.approx(norms)
    assert stage_spreads(network, crops) == pytest.approx(before, rel=1e-6)
