"""A2MIM: what its public code leaves off by default, and what 3D needs."""

import pytest
import torch
from objective_cases import CASES, make_a2mim
from torch import nn

from spark3d.errors import ConfigError
from spark3d.models.decoder import voxels_of_sites
from spark3d.objectives.a2mim import A2MIM, MaskToken, fill_values
from spark3d.objectives.fourier import composite, focal_l1, fourier_loss, plain_fourier_loss

RNG = torch.Generator().manual_seed(3)
CASE = CASES["segresnet 2d"]


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=RNG, dtype=torch.float64)


@pytest.mark.parametrize("mode", ["residual", "fading"])
def test_detached_features_keep_their_value_and_pass_no_gradient(mode: str) -> None:
    """At hidden sites; visible ones pass theirs on, and token and factor learn as before."""
    visible = torch.rand(1, 1, 6, 6, generator=RNG) < 0.5
    outs, grads = [], []
    for detach in (False, True):
        torch.manual_seed(0)
        token = MaskToken(4, 2, mode, detach).double()
        x = torch.arange(144.0, dtype=torch.float64).view(1, 4, 6, 6).requires_grad_()
        outs.append(token(x, visible))
        outs[-1].square().sum().backward()
        grads.append((x.grad, token.token.grad))
    torch.testing.assert_close(*outs)
    sites = visible.expand(1, 4, 6, 6)
    torch.testing.assert_close(grads[0][0][sites], grads[1][0][sites])
    assert grads[0][0][~sites].any()
    assert not grads[1][0][~sites].any()
    torch.testing.assert_close(grads[0][1], grads[1][1])


def test_nothing_is_kept_to_detach_where_the_token_replaces() -> None:
    with pytest.raises(ConfigError, match="leave detach out"):
        MaskToken(4, 2, "replace", detach=True)


@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize("focal", [True, False])
def test_the_plain_fourier_loss_is_the_mean_over_frequencies(ndim: int, focal: bool) -> None:
    """Of the modulus of every sample's spectral error, by the definition of the transform."""
    size = (4, 3, 2)[:ndim]
    y, x = noise(2, 2, *size).requires_grad_(), noise(2, 2, *size)
    error = (y - x).to(torch.complex128)
    for axis, n in enumerate(size, start=2):
        k = torch.arange(n, dtype=torch.float64)
        wave = torch.exp(-2j * torch.pi * k[:, None] * k / n) / n**0.5
        error = (error.movedim(axis, -1) @ wave).movedim(-1, axis)
    modulus = error.abs()
    wanted = (focal_l1(modulus, torch.zeros_like(modulus)) if focal else modulus).mean()
    found = plain_fourier_loss(y, x, focal)
    torch.testing.assert_close(found, wanted)
    (a,), (b,) = torch.autograd.grad(found, y), torch.autograd.grad(wanted, y)
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("focal", [True, False])
def test_the_plain_fourier_loss_of_a_perfect_prediction(focal: bool) -> None:
    x = noise(1, 1, 4, 4)
    y = x.clone().requires_grad_()
    loss = plain_fourier_loss(y, x, focal)
    loss.backward()
    assert loss < 1e-100
    assert y.grad is not None
    assert not y.grad.any()


@pytest.mark.parametrize("ndim", [2, 3])
def test_the_gradient_of_the_fourier_loss(ndim: int) -> None:
    """2 / (C prod S) Re IFFT(w D) / B times the share of the prediction (spec, 6)."""
    size = (6, 4, 3)[:ndim]
    y, x = noise(2, 3, *size).requires_grad_(), noise(2, 3, *size)
    hidden = torch.rand(2, 1, *size, generator=RNG) < 0.5
    whole = composite(y, x, hidden, 1e-3)
    fourier_loss(whole, x).backward()
    axes = tuple(range(2, 2 + ndim))
    error = torch.fft.fftn(whole.detach() - x, dim=axes, norm="ortho").mean(0, keepdim=True)
    weight = torch.log1p(error.abs())
    weight = weight / weight.max()
    back = torch.fft.ifftn(weight * error, dim=axes, norm="ortho").real
    share = torch.where(hidden, 1.0, 1e-3).to(y.dtype)
    wanted = 2 / (3 * x[0, 0].numel()) * back / 2 * share
    torch.testing.assert_close(y.grad, wanted)


def test_a_head_of_two_maps_is_one_of_low_rank() -> None:
    """No activation between them: together they are one map of their product; fewer weights."""
    case = CASES["mednext 3d"]
    full, low = make_a2mim(case), make_a2mim(case, head_rank=2).double()
    count = [sum(p.numel() for p in model.head.parameters()) for model in (full, low)]
    assert count[1] < count[0] / 10
    crops, mask = case.batch()
    features = noise(1, low.found.channels[-1], 2, 1, 1)
    assert isinstance(low.head, nn.Sequential)
    first, second = low.head
    assert isinstance(first, nn.Conv3d)
    assert isinstance(second, nn.Conv3d)
    assert first.bias is not None
    assert second.bias is not None
    weight = second.weight.flatten(1) @ first.weight.flatten(1)
    bias = second.weight.flatten(1) @ first.bias + second.bias
    wanted = torch.einsum("oi,bi...->bo...", weight, features) + bias.view(1, -1, 1, 1, 1)
    torch.testing.assert_close(low.head(features), wanted)
    low(crops.double(), mask).total.backward()
    assert all(p.grad is not None and p.grad.any() for p in low.head.parameters())


@pytest.mark.parametrize("visible_only", [True, False])
def test_the_head_can_predict_deviations_from_the_fill(visible_only: bool) -> None:
    crops, mask = CASE.batch()
    torch.manual_seed(0)
    plain = make_a2mim(CASE, fill_from_visible=visible_only).eval()
    torch.manual_seed(0)
    added = make_a2mim(CASE, fill_from_visible=visible_only, add_mean=True).eval()
    with torch.no_grad():
        difference = added.predict(crops, mask) - plain.predict(crops, mask)
    mean = fill_values(crops, mask, visible_only).expand_as(crops)
    torch.testing.assert_close(difference, mean, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{"fourier_focal": False}, {"detach": True, "mode": "fading"}])
def test_variants_train_every_parameter(options: dict) -> None:
    crops, mask = CASE.batch()
    model = make_a2mim(CASE, **options)
    losses = model(crops, mask)
    losses.total.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert isinstance(model, A2MIM)
    total = losses.parts["spatial"] + 0.5 * losses.parts["fourier"]
    torch.testing.assert_close(losses.total.detach(), total)


def test_a_network_without_depth_gives_the_2d_losses() -> None:
    """A crop of one slice: pixel shuffle, spatial and spectral error are those of 2D (spec, 15)."""
    values = noise(1, 2, 2, 16)
    flat = voxels_of_sites(values, 1, (4, 4))
    deep = voxels_of_sites(values[:, None], 1, (1, 4, 4))
    assert torch.equal(deep[:, :, 0], flat)
    x = noise(1, 1, 8, 8)
    for loss in (fourier_loss, lambda a, b: plain_fourier_loss(a, b, True)):
        torch.testing.assert_close(loss(deep, x[:, :, None]), loss(flat, x))
