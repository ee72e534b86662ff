"""LocalMIM: histograms, independent taps, refusals."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from objective_cases import CASES, make_localmim

from spark3d.errors import ConfigError
from spark3d.models.taps import blocks_to_reach
from spark3d.objectives.hog import glyphs, hog, orientation_axes
from spark3d.objectives.localmim import hidden_share, tap_loss
from spark3d.sparse.mask import random_mask


@given(
    ndim=st.sampled_from([2, 3]),
    scale=st.floats(0.1, 50).flatmap(lambda a: st.sampled_from([a, -a])),
    offset=st.floats(-100, 100),
    soft=st.booleans(),
    seed=st.integers(0, 99),
)
def test_hog_ignores_scale_sign_and_offset(
    ndim: int, scale: float, offset: float, soft: bool, seed: int
) -> None:
    """HOG(a x + b) = HOG(x); every channel's histogram has unit length and no negative entry.

    Hard votes in 3D are left out: at the reflected border axes tie exactly, and rounding decides.
    """
    soft = soft or ndim == 3
    rng = torch.Generator().manual_seed(seed)
    crops = torch.randn(2, 2, *(8,) * ndim, generator=rng, dtype=torch.float64)
    plain = hog(crops, (4,) * ndim, soft=soft)
    changed = hog(scale * crops + offset, (4,) * ndim, soft=soft)
    torch.testing.assert_close(changed, plain, rtol=1e-6, atol=1e-6)
    assert (plain >= 0).all()
    lengths = plain.unflatten(1, (2, -1)).norm(dim=2)
    torch.testing.assert_close(lengths, torch.ones_like(lengths))


@pytest.mark.parametrize("soft", [True, False])
@pytest.mark.parametrize("ndim", [2, 3])
def test_a_ramp_along_an_axis_of_the_histogram_fills_one_bin(ndim: int, soft: bool) -> None:
    """Inside the crop, away from the reflected border."""
    axes = orientation_axes(ndim)
    places = torch.stack(torch.meshgrid(*[torch.arange(12.0)] * ndim, indexing="ij")).double()
    for k, axis in enumerate(axes):
        ramp = torch.einsum("a,a...->...", axis, places)[None, None]
        found = hog(ramp, (4,) * ndim, soft=soft)[0]
        inner = found[(slice(None), *(1,) * ndim)]
        assert inner.argmax() == k
        torch.testing.assert_close(inner[k].item(), 1.0)


def test_noise_floor_and_spacing() -> None:
    """With a floor, noise in flat cells stays short; with a spacing, gradients are per mm."""
    noise = 1e-3 * torch.randn(1, 1, 8, 8)
    assert hog(noise, (4, 4)).norm(dim=1).min() > 0.99
    assert hog(noise, (4, 4), floor=1.0).norm(dim=1).max() < 0.05
    size = torch.arange(8.0)
    diagonal = (size[:, None] + size)[None, None].expand(1, 1, 8, 8)
    even = hog(diagonal, (8, 8), bins=2)
    stretched = hog(diagonal, (8, 8), bins=18, spacing=(1.0, 10.0))
    assert even.shape == (1, 2, 1, 1)
    assert stretched.argmax() in (0, 17)


def test_hog_of_a_size_that_does_not_fit_is_refused() -> None:
    """The message names both numbers."""
    with pytest.raises(ValueError, match=r"\(8, 10\).*\(4, 4\)"):
        hog(torch.zeros(1, 1, 8, 10), (4, 4))


def test_glyphs_show_edges_across_their_gradients() -> None:
    """A gradient along the rows stands for a line along the columns."""
    lines = glyphs((9, 9), 9)
    assert lines.shape == (9, 9, 9)
    assert glyphs((4, 4, 4)).shape == (10, 4, 4, 4)
    middle_row = lines[0][4]
    assert middle_row.min() > lines[0][0].max()


@pytest.mark.parametrize("backend", ["packed", "reference"])
def test_hidden_voxels_change_only_the_target(backend: str) -> None:
    """Predictions of every tap are bitwise the same whatever is hidden."""
    case = CASES["segresnet 2d"]
    crops, mask = case.batch()
    model = make_localmim(case, backend).eval()
    other = crops.where(mask.at(mask.size), torch.randn_like(crops))
    with torch.no_grad():
        for a, b in zip(model.predict(crops, mask), model.predict(other, mask), strict=True):
            assert torch.equal(a, b)


def test_backends_agree() -> None:
    """Packed and reference give the same losses in float64."""
    case = CASES["resnet 3d"]
    crops, mask = case.batch()
    losses = []
    for backend in ("packed", "reference"):
        torch.manual_seed(0)
        model = make_localmim(case, backend).double()
        losses.append(model(crops.double(), mask).total.detach())
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-10, atol=0)


def test_taps_are_local() -> None:
    """The loss of a tap reaches no stage deeper than its own, and the losses add up."""
    case = CASES["resnet 2d"]
    crops, mask = case.batch()
    model = make_localmim(case)
    losses = model(crops, mask)
    torch.testing.assert_close(losses.total.detach(), sum(losses.parts.values()))
    assert list(losses.parts) == ["stride_4x4", "stride_8x8", "stride_16x16", "stride_32x32"]
    predicted = model.predict(crops, mask)[0]
    predicted.square().sum().backward()
    network = model.encoder.network
    assert all(p.grad is None for p in network.layer2.parameters())
    assert all(p.grad is not None for p in network.layer1.parameters())


def test_each_loss_counts_hidden_sites_only() -> None:
    """Zero for the target whatever stands at visible sites, no gradient there (spec, 9)."""
    mask = random_mask(2, (2, 2), 0.5, (8, 8), torch.Generator().manual_seed(0))
    target = torch.randn(2, 9, 4, 4, dtype=torch.float64)
    sites = mask.at((4, 4))
    right = target.where(~sites, torch.randn_like(target))
    assert tap_loss(right, target, mask) == 0
    predicted = torch.randn_like(target).requires_grad_()
    tap_loss(predicted, target, mask).backward()
    wanted = (2 * (predicted.detach() - target) / (9 * (~sites).sum())).where(~sites, 0)
    torch.testing.assert_close(predicted.grad, wanted)


def test_share_of_coarse_sites() -> None:
    """A site over four cells of which three are hidden counts three quarters."""
    visible = torch.tensor([[[True, False], [False, False]]])
    mask = random_mask(1, (2, 2), 0.75, (4, 4), torch.Generator().manual_seed(0))
    assert hidden_share(mask, (1, 1)).item() == 0.75
    assert hidden_share(mask, (4, 2)).shape == (1, 1, 4, 2)
    assert hidden_share(mask, (4, 2)).mean() == 0.75
    assert visible.sum() == mask.visible.sum()
    with pytest.raises(ValueError, match="does not fit"):
        hidden_share(mask, (3, 2))


def test_taps_are_chosen_and_refused() -> None:
    """By default strides of 4 and more; finer ones and unknown ones are named."""
    case = CASES["segresnet 3d"]
    assert make_localmim(case).strides == ((4, 4, 4), (8, 8, 8))
    assert make_localmim(case, taps=["down_layers.3"]).strides == ((8, 8, 8),)
    assert len(make_localmim(case, target="voxels").strides) == 4
    with pytest.raises(ConfigError, match=r"finer than 4 .*down_layers.2.*down_layers.3"):
        make_localmim(case, taps=["down_layers.1"])
    with pytest.raises(
        ConfigError, match=r"\['layer9'\] are not stages; they are \['down_layers.0'"
    ):
        make_localmim(case, taps=["layer9"])
    with pytest.raises(ConfigError, match=r"leave out the deepest stage down_layers.3, .*after do"):
        make_localmim(case, taps=["down_layers.2"])
    with pytest.raises(ConfigError, match="use target=voxels"):
        make_localmim(CASES["dynunet 3d"], target="hog")
    with pytest.raises(ConfigError, match="hog, voxels"):
        make_localmim(case, target="edges")


def test_voxel_pictures_are_in_units_of_the_crop() -> None:
    """A perfect prediction of voxels gives the crop back."""
    case = CASES["dynunet 3d"]
    crops, mask = case.batch()
    model = make_localmim(case)
    perfect = model._target(crops, model.strides[0])
    model.predict = lambda _crops, _mask: (perfect,)  # type: ignore[method-assign]
    torch.testing.assert_close(model.reconstruct(crops, mask), crops, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("sites", "blocks"), [(8, 2), (4, 1), (2, 1), (1, 1), (16, 3)])
def test_bodies_are_deep_enough_to_see_out_of_a_cell(sites: int, blocks: int) -> None:
    """2, 1, 1, 1 blocks for cells of 32 voxels at strides 4 to 32 (spec, decoder)."""
    assert blocks_to_reach(sites) == blocks
