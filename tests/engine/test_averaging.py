"""The running average of weights: its own recurrence, a function of the step alone."""

import copy

import pytest
import torch
from monai.networks.nets.dynunet import DynUNet
from torch import nn

from spark3d.engine.averaging import Average


@pytest.mark.parametrize("warmup", [False, True])
def test_it_follows_its_recurrence_and_resumes_exactly(warmup: bool) -> None:
    network = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    average = Average(network, 0.9, warmup)
    expected = copy.deepcopy(network.state_dict())
    rng = torch.Generator().manual_seed(0)
    for step in range(1, 9):
        with torch.no_grad():
            for value in network.parameters():
                value.add_(torch.randn(value.shape, generator=rng))
            network[1].running_mean.add_(1.0)
        if step == 5:  # as after a restart
            state = copy.deepcopy(average.network.state_dict())
            average = Average(network, 0.9, warmup)
            average.network.load_state_dict(state)
        average.update(network, step)
        decay = min(0.9, 1 - (1 + step) ** (-2 / 3)) if warmup else 0.9
        for key, value in network.state_dict().items():
            if value.is_floating_point():
                expected[key] = decay * expected[key] + (1 - decay) * value
    found = average.network.state_dict()
    for key, value in expected.items():
        if value.is_floating_point():
            torch.testing.assert_close(found[key], value)
    assert not average.network.training


@pytest.mark.parametrize("res_block", [False, True])
def test_tensors_under_several_names_count_once(res_block: bool) -> None:
    """DynUNet has its blocks a second time as skip layers; reference in float64."""
    given = {"kernel_size": (3, 3, 3), "strides": (1, 2, 2), "filters": (2, 3, 4)}
    up = {"upsample_kernel_size": (2, 2), "norm_name": "batch", "res_block": res_block}
    network = DynUNet(2, 1, 2, **given, **up)
    names = network.state_dict(keep_vars=True)
    assert len({id(value) for value in names.values()}) < len(names)
    average = Average(network, 0.9, warmup=False)
    expected = {key: value.double() for key, value in network.state_dict().items()}
    rng = torch.Generator().manual_seed(0)
    for step in range(1, 6):
        with torch.no_grad():
            for value in [*network.parameters(), *network.buffers()]:
                value.add_(torch.randn(value.shape, generator=rng).abs().to(value.dtype))
        average.update(network, step)
        for key, value in network.state_dict().items():
            if value.is_floating_point():
                expected[key] = 0.9 * expected[key] + 0.1 * value.double()
            else:
                expected[key] = value.double()
    for key, value in average.network.state_dict().items():
        torch.testing.assert_close(value.double(), expected[key], rtol=1e-5, atol=1e-6)
