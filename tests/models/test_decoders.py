"""Decoders: geometry per axis, gradients everywhere, hidden cells only, official initialisation."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

from spark3d.errors import ConfigError
from spark3d.models.decoder import LightDecoder, OfficialDecoder, voxels_of_sites
from spark3d.models.densify import Densify
from spark3d.models.geometry import plan_climb, up_steps
from spark3d.models.hidden import cut_hidden, paste_hidden
from spark3d.sparse.cells import pack
from spark3d.sparse.mask import CellMask, random_mask
from spark3d.sparse.pyramid import Pyramid

STRIDES = {
    "resnet 2d": ((4, 4), (8, 8), (16, 16)),
    "segresnet 3d": ((1, 1, 1), (2, 2, 2), (4, 4, 4), (8, 8, 8)),
    "anisotropic": ((1, 1, 1), (1, 2, 2), (2, 4, 4), (2, 8, 8)),
    "coarse 1d": ((8,), (32,)),
}


@pytest.mark.parametrize("strides", STRIDES.values(), ids=STRIDES)
@pytest.mark.parametrize("kind", [OfficialDecoder, LightDecoder])
@pytest.mark.parametrize("norm", ["bn", "gn", "in"])
def test_every_stage_and_parameter_takes_part(strides: tuple, kind: type, norm: str) -> None:
    """Hidden cells come out in the size of cells; every parameter and stage gets a gradient."""
    ndim, cell = len(strides[0]), strides[-1]
    mask = random_mask(2, (2,) * ndim, 0.5, cell, torch.Generator().manual_seed(0))
    decoder = kind(strides, 2, width=16, norm=norm, min_width=4)
    channels = tuple(range(3, 3 + len(strides)))
    densify = Densify(channels, decoder.widths, ndim, "ln", decoder.folds)
    maps = [
        torch.randn(2, c, *(n // s for n, s in zip(mask.size, stride, strict=True)))
        for c, stride in zip(channels, strides, strict=True)
    ]
    maps = [m.mul(mask.at(m.shape[2:])).requires_grad_() for m in maps]
    out = decoder(densify(Pyramid(tuple(maps), mask, False)), mask)
    n_hidden = 2 * (2**ndim - mask.n_visible)
    assert out.shape == (n_hidden, 2, *cell)
    out.square().sum().backward()
    everything = [*decoder.named_parameters(), *densify.named_parameters()]
    assert [name for name, p in everything if p.grad is None] == []
    for m in maps:
        assert m.grad is not None
        assert m.grad.any()


def test_the_official_decoder_is_the_official_one() -> None:
    """Channels 768 to 24, five blocks, 23,183,115 parameters, initialised as published."""
    decoder = OfficialDecoder(((4, 4), (8, 8), (16, 16), (32, 32)), 3)
    assert decoder.widths == (96, 192, 384, 768)
    assert [block.conv2.out_channels for block in decoder.blocks] == [384, 192, 96, 48, 24]
    assert sum(p.numel() for p in decoder.parameters()) == 23_183_115
    up = decoder.blocks[0].up
    assert (up.kernel_size, up.stride, up.padding) == ((4, 4), (2, 2), (1, 1))
    assert_initialised_as_published(decoder)


def assert_initialised_as_published(decoder: OfficialDecoder) -> None:
    up, conv = decoder.blocks[0].up, decoder.blocks[0].conv1
    kaiming = (2 / (up.out_channels * 16)) ** 0.5
    assert up.weight.std().item() == pytest.approx(kaiming, rel=0.05)
    assert conv.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not up.bias.any()
    assert not decoder.proj.bias.any()


def test_an_initialisation_that_an_earlier_branch_shadows_is_caught() -> None:
    """SparK: the branch for every convolution came first, so transposed ones never met theirs."""

    def shadowed(module: nn.Module) -> None:
        if isinstance(module, nn.modules.conv._ConvNd):
            nn.init.trunc_normal_(module.weight, std=0.02)
        elif isinstance(module, nn.ConvTranspose2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    decoder = OfficialDecoder(((4, 4), (8, 8)), 1, 64)
    assert_initialised_as_published(decoder)
    decoder.apply(shadowed)
    with pytest.raises(AssertionError):
        assert_initialised_as_published(decoder)


def test_axes_that_do_not_double_keep_their_size() -> None:
    """Kernel, stride and padding are (1, 1, 0) along them (anisotropic networks)."""
    decoder = OfficialDecoder(STRIDES["anisotropic"], 1, width=16)
    assert [block.up.stride for block in decoder.blocks] == [(1, 2, 2), (2, 2, 2), (1, 2, 2)]
    assert decoder.blocks[0].up.kernel_size == (1, 4, 4)
    assert decoder.blocks[0].up.padding == (0, 1, 1)


@given(
    coarse=st.lists(st.integers(0, 5), min_size=1, max_size=3),
    fine=st.lists(st.integers(0, 5), min_size=3, max_size=3),
)
def test_steps_lead_from_the_coarse_stride_to_the_fine_one(
    coarse: list[int], fine: list[int]
) -> None:
    """The product of the factors is the ratio, in as few steps as the longest axis needs."""
    fine = fine[: len(coarse)]
    assume(all(c >= f for c, f in zip(coarse, fine, strict=True)))
    steps = up_steps(tuple(2**c for c in coarse), tuple(2**f for f in fine))
    assert len(steps) == max(c - f for c, f in zip(coarse, fine, strict=True))
    for axis, (c, f) in enumerate(zip(coarse, fine, strict=True)):
        product = 1
        for factors in steps:
            product *= factors[axis]
        assert product == 2 ** (c - f)


def test_light_decoder_stops_at_its_stride() -> None:
    """By default at 4, at the finest stage where that is coarser, never past the total stride."""
    assert LightDecoder(STRIDES["segresnet 3d"], 1).stop == (4, 4, 4)
    assert LightDecoder(STRIDES["coarse 1d"], 1).stop == (8,)
    assert LightDecoder(STRIDES["anisotropic"], 1).stop == (2, 4, 4)
    assert LightDecoder(STRIDES["resnet 2d"], 1, stop=8).stop == (8, 8)
    folded = LightDecoder(STRIDES["segresnet 3d"], 1)
    assert folded.folds == ((4, 4, 4), (2, 2, 2), (1, 1, 1), (1, 1, 1))
    assert folded.level == (1, 1, 1, 0)


def test_light_decoder_makes_no_map_finer_than_its_stride() -> None:
    """The largest tensor inside a forward has the sites of stride `stop` (that is the saving)."""
    strides = STRIDES["resnet 2d"]
    mask = random_mask(1, (2, 2), 0.5, (16, 16), torch.Generator().manual_seed(0))
    decoder = LightDecoder(strides, 1, width=64)
    sizes = []
    for module in decoder.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            module.register_forward_hook(lambda _m, _i, out: sizes.append(out.shape[-1]))
    maps = [
        torch.randn(1, width, 32 // stride[0], 32 // stride[0])
        for width, stride in zip(decoder.widths, strides, strict=True)
    ]
    decoder(maps, mask)
    assert max(sizes) == 32 // 4


def test_cells_smaller_than_the_stop_are_refused() -> None:
    """The message names both numbers."""
    mask = random_mask(1, (2, 2), 0.5, (4, 6), torch.Generator().manual_seed(0))
    decoder = LightDecoder(((4, 4), (8, 8)), 1, width=16)
    with pytest.raises(ConfigError, match=r"\(4, 6\).*\(4, 4\)"):
        decoder([], mask)


@pytest.mark.parametrize(("strides", "stop"), [(((3,), (9,)), (3,)), (((2,), (4,)), (8,))])
def test_impossible_geometry_is_refused(strides: tuple, stop: tuple) -> None:
    """Ratios that are no powers of two, and a stop beyond the deepest stage."""
    with pytest.raises(ConfigError, match=r"powers of two|coarser than"):
        plan_climb(strides, stop)


@given(
    grid=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    channels=st.integers(1, 2),
    seed=st.integers(0, 99),
)
def test_values_of_sites_are_laid_out_as_voxels(grid: list[int], channels: int, seed: int) -> None:
    """Site `g` and offset `o` give voxel `g * stride + o`, whatever the number of axes."""
    stride = (2, 3, 1)[: len(grid)]
    rng = torch.Generator().manual_seed(seed)
    size = [g * s for g, s in zip(grid, stride, strict=True)]
    voxels = torch.randn(2, channels, *size, generator=rng)
    values = torch.empty(2, *grid, channels, *stride)
    for index in torch.cartesian_prod(*[torch.arange(n) for n in size]).view(-1, len(grid)):
        site = [int(i) // s for i, s in zip(index, stride, strict=True)]
        offset = [int(i) % s for i, s in zip(index, stride, strict=True)]
        values[(slice(None), *site, slice(None), *offset)] = voxels[(..., *index.tolist())]
    flat = values.reshape(2, *grid, -1)
    assert torch.equal(voxels_of_sites(flat, channels, stride), voxels)


@given(
    ndim=st.integers(1, 3),
    ratio=st.floats(0, 1),
    channels=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_hidden_cells_are_cut_and_pasted(ndim: int, ratio: float, channels: int, seed: int) -> None:
    """Visible and hidden cells together are all voxels; pasting replaces the hidden ones only."""
    rng = torch.Generator().manual_seed(seed)
    mask = random_mask(2, (3, 2, 2)[:ndim], ratio, (2, 3, 1)[:ndim], rng)
    crops = torch.randn(2, channels, *mask.size, generator=rng)
    cells = cut_hidden(crops, mask)
    both = torch.cat([pack(crops, mask).flatten(), cells.flatten()])
    assert torch.equal(both.sort().values, crops.flatten().sort().values)
    complement = CellMask(~mask.visible, mask.cell_size, len(cells) // 2, ~mask.host)
    assert torch.equal(cells, pack(crops, complement).reshape(cells.shape))
    assert torch.equal(paste_hidden(crops, cells, mask), crops)
    emptied = paste_hidden(crops, torch.zeros_like(cells), mask)
    assert torch.equal(emptied, crops * mask.at(mask.size))


def test_a_map_that_does_not_fit_the_cells_is_refused() -> None:
    """The message names sites and cells."""
    mask = random_mask(1, (2, 2), 0.5, (4, 4), torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r"\(3, 4\) sites.*\(2, 2\) cells"):
        cut_hidden(torch.zeros(1, 1, 3, 4), mask)
