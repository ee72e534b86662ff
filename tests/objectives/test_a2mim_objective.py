"""A2MIM: fill, token inside the network, losses on hidden voxels, refusals."""

import pytest
import torch
from objective_cases import CASES, Case, make_a2mim, make_spark
from torch import nn
from torch.nn import functional as F

from spark3d.errors import ConfigError
from spark3d.models.decoder import voxels_of_sites
from spark3d.objectives.a2mim import A2MIM, MaskToken, mean_fill
from spark3d.objectives.fourier import composite, focal_l1, fourier_loss, spatial_loss
from spark3d.sparse.encoder import SparseEncoder
from spark3d.sparse.mask import random_mask

CASE = CASES["segresnet 2d"]


def test_the_fill_is_the_mean() -> None:
    """Visible voxels stay; a constant crop is unchanged; the visible mean leaks nothing."""
    crops, mask = CASE.batch(channels=2)
    sites = mask.at(mask.size).expand_as(crops)
    filled = mean_fill(crops, mask)
    assert torch.equal(filled[sites], crops[sites])
    means = crops.mean((2, 3), keepdim=True).expand_as(crops)
    torch.testing.assert_close(filled[~sites], means[~sites])
    constant = torch.full_like(crops, 3.0)
    torch.testing.assert_close(mean_fill(constant, mask), constant)
    other = crops.where(mask.at(mask.size), 9.0)
    assert torch.equal(mean_fill(crops, mask, True), mean_fill(other, mask, True))
    assert not torch.equal(mean_fill(crops, mask), mean_fill(other, mask))


def test_the_token_leaves_visible_sites_alone() -> None:
    """In every mode; fading starts as a replacement up to 1e-6 of the features."""
    x = torch.randn(1, 4, 6, 6)
    visible = torch.rand(1, 1, 6, 6) < 0.5
    for mode in ("replace", "residual", "fading"):
        out = MaskToken(4, 2, mode)(x, visible)
        assert torch.equal(out[visible.expand_as(x)], x[visible.expand_as(x)])
    fading = MaskToken(4, 2, "fading")
    difference = fading(x, visible) - fading.token
    assert (difference.abs() <= 1.01e-6 * x.abs() + 1e-8)[~visible.expand_as(x)].all()
    with pytest.raises(ConfigError, match="replace, residual, fading"):
        MaskToken(4, 2, "add")


@pytest.mark.parametrize(
    ("key", "place"),
    [
        ("resnet 2d", "layer4"),
        ("convnext 2d", "stages.3.blocks"),
        ("mednext 3d", "bottleneck"),
        ("dynunet 3d", "bottleneck"),
    ],
)
def test_the_token_enters_before_the_last_stage(key: str, place: str) -> None:
    """After a separate down-sampling where there is one; it alone carries what is hidden there."""
    case = CASES[key]
    model = make_a2mim(case)
    assert model.token_at == place
    crops, mask = case.batch()
    before = model.predict(crops, mask).detach()
    model.token.token.data += 1
    assert not torch.equal(model.predict(crops, mask), before)
    assert not model.encoder.network.get_submodule(place)._forward_pre_hooks


def test_the_place_of_the_token_can_be_chosen() -> None:
    """Any module on the way; others are refused by name."""
    model = make_a2mim(CASES["resnet 2d"], token_at="layer2")
    assert model.token.token.shape == (1, 8, 1, 1)
    with pytest.raises(ConfigError, match="layer9"):
        make_a2mim(CASES["resnet 2d"], token_at="layer9")
    with pytest.raises(ConfigError, match="is not run before"):
        make_a2mim(CASES["segresnet 2d"], token_at="up_layers.0")


def test_hidden_content_matters_only_through_the_mean() -> None:
    """Shuffling hidden voxels within the crop changes no prediction (spec, 14)."""
    crops, mask = CASE.batch()
    model = make_a2mim(CASE).eval()
    hidden = ~mask.at(mask.size)[0, 0]
    values = crops[0, 0][hidden]
    other = crops.clone()
    other[0, 0, hidden] = values[torch.randperm(len(values))]
    with torch.no_grad():
        a, b = model.predict(crops, mask), model.predict(other, mask)
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_perfect_prediction_has_no_loss() -> None:
    """Both losses are 0 without NaN (spec, 4)."""
    crops, mask = CASE.batch()
    hidden = ~mask.at(mask.size)
    assert spatial_loss(crops, crops, hidden) == 0
    same = crops.clone().requires_grad_()
    loss = fourier_loss(composite(same, crops, hidden), crops)
    loss.backward()
    assert loss < 1e-12
    assert same.grad is not None
    assert same.grad.isfinite().all()


def test_gradients_at_visible_voxels() -> None:
    """None from the spatial loss; from the spectrum only the weight that is left (spec, 10)."""
    crops, mask = CASE.batch()
    hidden = ~mask.at(mask.size)
    predicted = torch.randn_like(crops).requires_grad_()
    spatial_loss(predicted, crops, hidden).backward()
    assert not predicted.grad[~hidden].any()
    assert predicted.grad[hidden].all()
    for weight in (0.0, 1e-3):
        predicted.grad = None
        whole = composite(predicted, crops, hidden, weight)
        fourier_loss(whole, crops).backward()
        assert bool(predicted.grad[~hidden].any()) == (weight > 0)


def test_opposite_errors_cancel_in_the_averaged_spectrum() -> None:
    """A quirk of the official loss that the switch removes (spec, 7)."""
    target = torch.zeros(2, 1, 8, 8)
    error = torch.randn(1, 1, 8, 8)
    predicted = torch.cat([error, -error])
    assert fourier_loss(predicted, target, average=True) < 1e-10
    assert fourier_loss(predicted, target, average=False) > 0.01
    one, zero = predicted[:1], target[:1]
    torch.testing.assert_close(fourier_loss(one, zero), fourier_loss(one, zero, average=False))


def test_a_single_wave() -> None:
    """Amplitude a at an integer frequency: two bins, loss a^2 / 2 (spec, 9), in any dimension."""
    steps = torch.arange(16, dtype=torch.float64)
    for ndim in (1, 2, 3):
        wave = 0.3 * torch.cos(2 * torch.pi * 3 * steps / 16)
        error = wave.view(16, *(1,) * (ndim - 1)).expand(*(16,) * ndim)[None, None]
        loss = fourier_loss(error, torch.zeros_like(error))
        torch.testing.assert_close(loss.item(), 0.3**2 / 2)


def test_a_length_of_one_changes_nothing() -> None:
    """A crop with one slice gives the 2D losses (spec, 15)."""
    a, b = torch.randn(2, 1, 8, 8), torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(fourier_loss(a[:, :, None], b[:, :, None]), fourier_loss(a, b))


def test_focal_l1() -> None:
    """Below the absolute error, about d^2 / 10 near 0, the error itself when large (spec, 13)."""
    d = torch.linspace(0, 60, 400, dtype=torch.float64)
    loss = (
        focal_l1(d, torch.zeros_like(d))
        if d.ndim > 2
        else focal_l1(d[None, None], 0 * d[None, None])[0, 0]
    )
    assert (loss <= d).all()
    assert loss[0] == 0
    torch.testing.assert_close(
        loss[-1] / d[-1], torch.ones((), dtype=torch.float64), rtol=1e-4, atol=0
    )
    near = torch.full((1, 1, 1), 1e-3, dtype=torch.float64)
    torch.testing.assert_close(focal_l1(near, 0 * near), 0.1 * near**2, rtol=1e-3, atol=0)


def test_the_head_is_laid_out_as_a_pixel_shuffle() -> None:
    """In 2D the order is PyTorch's own."""
    values = torch.randn(2, 3 * 16, 5, 6)
    found = voxels_of_sites(values.movedim(1, -1), 3, (4, 4))
    assert torch.equal(found, F.pixel_shuffle(values, 4))


def test_replacements() -> None:
    """Each kind at visible voxels; an unknown one lists the choices."""
    y, x = torch.randn(1, 2, 4, 4), torch.randn(1, 2, 4, 4)
    hidden = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    hidden[..., :2] = True
    seen = ~hidden.expand_as(x)
    mean = x.mean((2, 3), keepdim=True).expand_as(x)
    for kind, wanted in (("mixed", (x + y) / 2), ("target", x), ("prediction", y), ("mean", mean)):
        out = composite(y, x, hidden, 0.0, kind)
        torch.testing.assert_close(out[seen], wanted[seen])
        assert torch.equal(out[~seen], y[~seen])
    with pytest.raises(ValueError, match="mixed"):
        composite(y, x, hidden, 0.0, "zero")


def test_it_serves_networks_that_cannot_be_masked() -> None:
    """A network with a layer that has no masked meaning trains all the same."""
    network = nn.Sequential(
        nn.Conv2d(1, 8, 4, stride=4),
        nn.LocalResponseNorm(3),
        nn.Conv2d(8, 16, 2, stride=2),
    )
    model = A2MIM(SparseEncoder(network, ["0", "2"], 2), 1)
    mask = random_mask(2, (2, 2), 0.5, (8, 8), torch.Generator().manual_seed(0))
    crops = torch.randn(2, 1, *mask.size)
    with pytest.raises(TypeError, match="cannot be masked"):
        model.encoder(crops, mask)
    model(crops, mask).total.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_it_serves_backbones_that_masking_refuses() -> None:
    """SparK names the layer of timm that it cannot mask, A2MIM trains."""
    options = {"channels": (8, 16, 24, 32), "layers": (1, 1, 1, 1)}
    case = Case("timm/resnetblur18", 2, (32, 32), (2, 2), options)
    crops, mask = case.batch()
    with pytest.raises(TypeError, match=r"BlurPool2d\) cannot be masked"):
        make_spark(case)(crops, mask)
    model = make_a2mim(case)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    losses = []
    for _ in range(4):
        optimiser.zero_grad()
        loss = model(crops, mask).total
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert set(model.encoder_state()) == set(case.backbone().encoder_keys)
