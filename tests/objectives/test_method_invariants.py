"""Properties of the targets and losses of LocalMIM and A2MIM that no other file holds."""

from dataclasses import replace

import pytest
import torch
from objective_cases import CASES, make_localmim
from torch.nn import functional as F

from spark3d.models.taps import TapDecoder
from spark3d.objectives.fourier import composite, fourier_loss
from spark3d.objectives.hog import gradients, hog, orientation_axes, votes
from spark3d.objectives.localmim import LocalMIM, tap_loss
from spark3d.sparse.encoder import SparseEncoder
from spark3d.sparse.mask import CellMask, random_mask, visible_count

RNG = torch.Generator().manual_seed(5)
IMAGE = torch.randn(1, 1, 24, 24, generator=RNG, dtype=torch.float64)
VOLUME = torch.randn(1, 1, 12, 12, 12, generator=RNG, dtype=torch.float64)


def test_hard_votes_go_to_the_nearest_axis() -> None:
    """Sectors by angle are the cells around K axes (away from the border, where axes tie)."""
    g = gradients(IMAGE)[..., 1:-1, 1:-1]
    nearest = torch.einsum("ka,na...->nk...", orientation_axes(2, 9), g).abs().argmax(1)
    assert torch.equal(votes(g, 9, soft=False).argmax(1), nearest)


def test_twice_the_bins_are_halves_of_the_bins() -> None:
    g = gradients(IMAGE)
    pairs = votes(g, 18, soft=False).unflatten(1, (9, 2)).sum(2)
    torch.testing.assert_close(pairs, votes(g, 9, soft=False))


def test_a_cell_of_eight_is_the_mean_of_its_cells_of_four() -> None:
    """Before the histograms are given unit length."""
    voted = votes(gradients(IMAGE), 9, soft=False)
    small, large = F.avg_pool2d(voted, 4), F.avg_pool2d(voted, 8)
    torch.testing.assert_close(F.avg_pool2d(small, 2), large)
    unit = F.normalize(large, dim=1)
    torch.testing.assert_close(hog(IMAGE, (8, 8)), unit)


def test_turning_an_image_turns_its_histograms() -> None:
    """Cells turn with it and bins move by half their number; in mirror images bins change ends."""
    inner = (..., slice(1, -1), slice(1, -1))
    plain = hog(IMAGE, (4, 4), bins=18)
    turned = hog(IMAGE.rot90(1, (2, 3)), (4, 4), bins=18)
    torch.testing.assert_close(turned[inner], plain.rot90(1, (2, 3)).roll(9, 1)[inner])
    mirrored = hog(IMAGE.flip(3), (4, 4), bins=18)
    torch.testing.assert_close(mirrored[inner], plain.flip(3).flip(1)[inner])


def test_cyclic_permutations_of_the_axes_permute_the_bins() -> None:
    axes = orientation_axes(3)
    order = (axes @ axes.roll(1, 1).mT).abs().argmax(0)
    assert sorted(order.tolist()) == list(range(10))
    turned = hog(VOLUME.permute(0, 1, 4, 2, 3), (4, 4, 4))
    wanted = torch.empty_like(turned)
    wanted[:, order] = hog(VOLUME, (4, 4, 4)).permute(0, 1, 4, 2, 3)
    torch.testing.assert_close(turned, wanted)


def test_quarter_turns_do_not_permute_the_ten_axes() -> None:
    """Unlike flips and cyclic permutations: some axis comes to lie between two others."""
    axes = orientation_axes(3)
    turned = torch.stack([axes[:, 0], axes[:, 2], -axes[:, 1]], dim=1)
    assert (axes @ turned.mT).abs().max(0).values.min() < 0.99
    mirrored = axes * torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64)
    torch.testing.assert_close((axes @ mirrored.mT).abs().max(0).values, torch.ones(10).double())


def test_a_volume_that_is_constant_along_depth_has_the_gradients_of_its_slice() -> None:
    """Times the sum (1, 2, 1) of the smoothing along depth, and none along it."""
    found = gradients(IMAGE[:, :, None].expand(-1, -1, 5, -1, -1))
    assert found[:, 0].abs().max() < 1e-12
    flat = gradients(IMAGE)[:, :, None].expand(-1, -1, 5, -1, -1)
    torch.testing.assert_close(found[:, 1:], 4 * flat)


@pytest.mark.parametrize("ndim", [2, 3])
def test_a_hidden_cell_sees_visible_ones_as_far_as_the_body_reaches(ndim: int) -> None:
    """The prediction changes iff the visible site is within half the kernel, once a block."""
    visible = torch.zeros(1, *(9,) * ndim, dtype=torch.bool)
    visible[(0, 4, *(4,) * (ndim - 1))] = True
    mask = CellMask(visible, (1,) * ndim)
    torch.manual_seed(0)
    decoder = TapDecoder(4, 3, ndim, width=8, blocks=2, kernel=3).double().eval()
    maps = torch.randn(1, 4, *(9,) * ndim, generator=RNG, dtype=torch.float64)
    other = maps.clone()
    other[(0, 0, *(4,) * ndim)] += 1  # not all channels: their norm would see no change
    with torch.no_grad():
        change = (decoder(other, mask, False) - decoder(maps, mask, False)).abs().amax(1)[0]
    places = torch.stack(torch.meshgrid(*[torch.arange(9)] * ndim, indexing="ij"))
    assert torch.equal(change > 0, (places - 4).abs().amax(0) <= 2)


@pytest.mark.parametrize("backend", ["packed", "reference"])
def test_taps_after_the_next_downsampling_as_in_the_official_swin(backend: str) -> None:
    """Stages may be any sub-modules: those that make the map coarser, and the last stage."""
    stages = ["stages.1.downsample", "stages.2.downsample", "stages.3"]
    case = CASES["convnext 2d"]
    later = replace(case, options={**case.options, "stages": stages})
    crops, mask = later.batch()
    torch.manual_seed(0)
    model = make_localmim(later, backend).double()
    assert model.strides == ((8, 8), (16, 16), (32, 32))
    losses = model(crops.double(), mask)
    losses.total.backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    hidden = crops.where(mask.at(mask.size), 7.0)
    model.eval()
    for a, b in zip(*(model.predict(c.double(), mask) for c in (crops, hidden)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("crops", "bins"), [(IMAGE, 9), (VOLUME, 10)])
def test_predicting_nothing_costs_one_over_the_bins(crops: torch.Tensor, bins: int) -> None:
    """Where every cell has texture: the trivial baseline of a tap."""
    ndim = crops.ndim - 2
    mask = random_mask(1, (3,) * ndim, 0.6, (crops.shape[2] // 3,) * ndim, RNG)
    target = hog(crops, (4,) * ndim)
    loss = tap_loss(torch.zeros_like(target), target, mask)
    torch.testing.assert_close(loss, torch.tensor(1 / bins, dtype=torch.float64))


def test_every_tap_is_a_model_of_its_own() -> None:
    """The loss of one of four taps is that of a model whose other decoders are others."""
    case = CASES["resnet 2d"]
    crops, mask = case.batch()
    whole = make_localmim(case, "reference").double()
    losses = whole(crops.double(), mask)
    for order in range(len(whole.taps)):
        backbone = case.backbone()
        encoder = SparseEncoder(backbone.network, backbone.stages, 2, "reference")
        other = LocalMIM(encoder, case.cell, 1, width=16, kernel=3).double()
        other.encoder.load_state_dict(whole.encoder.state_dict())
        other.decoders[order].load_state_dict(whole.decoders[order].state_dict())
        found, parts = other(crops.double(), mask).parts, losses.parts
        name = list(parts)[order]
        torch.testing.assert_close(found[name], parts[name])
        assert all(not torch.isclose(found[key], parts[key]) for key in parts if key != name)


def test_the_fourier_loss_scales_as_the_square_without_logarithm() -> None:
    error, nothing = IMAGE, torch.zeros_like(IMAGE)
    plain = fourier_loss(error, nothing, log=False)
    torch.testing.assert_close(fourier_loss(2 * error, nothing, log=False), 4 * plain)
    with_log = fourier_loss(error, nothing)
    assert not torch.isclose(fourier_loss(2 * error, nothing), 4 * with_log)
    assert 0 <= with_log <= error.square().mean()


@pytest.mark.parametrize(
    ("replacement", "weight", "moves"),
    [("mixed", 0.0, True), ("prediction", 0.0, True), ("target", 0.0, False), ("mean", 0.0, False)],
)
def test_visible_predictions_in_the_spectrum(replacement: str, weight: float, moves: bool) -> None:
    """They change the value where the replacement holds some of them."""
    hidden = torch.zeros(1, 1, 24, 24, dtype=torch.bool)
    hidden[..., :8] = True
    predicted = torch.randn(1, 1, 24, 24, generator=RNG, dtype=torch.float64)
    other = torch.where(hidden, predicted, predicted + 1)
    values = [
        fourier_loss(composite(p, IMAGE, hidden, weight, replacement), IMAGE)
        for p in (predicted, other)
    ]
    assert bool(values[0] != values[1]) == moves


def test_published_numbers_of_hidden_cells() -> None:
    """SparK rounds, A2MIM rounds the hidden cells up: 30 of 49 are its recipe's .61 here."""
    assert [visible_count(n, 0.6) for n in (49, 9, 4)] == [20, 4, 2]
    assert 49 - visible_count(49, 0.61) == 30
    assert visible_count(49, 0.75) == 12  # LocalMIM: int(49 / 4)
