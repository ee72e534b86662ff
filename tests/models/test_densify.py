"""Densify: norm of visible sites, then token, then projection; the same from both layouts."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from spark3d.errors import ConfigError
from spark3d.models import filled
from spark3d.models.densify import Densify
from spark3d.sparse.cells import pack
from spark3d.sparse.mask import CellMask, random_mask
from spark3d.sparse.pyramid import Pyramid

CHANNELS = (4, 6, 16)
STRIDES = (1, 2, 4)


def pyramids(ndim: int, ratio: float = 0.5, seed: int = 0) -> tuple[Pyramid, Pyramid, CellMask]:
    """The same random pyramid on the full grid and packed."""
    rng = torch.Generator().manual_seed(seed)
    mask = random_mask(2, (3,) * ndim, ratio, (4,) * ndim, rng)
    maps = []
    for channels, stride in zip(CHANNELS, STRIDES, strict=True):
        size = tuple(n // stride for n in mask.size)
        full = torch.randn(2, channels, *size, generator=rng, dtype=torch.float64)
        maps.append(full * mask.at(size))
    packed = tuple(pack(m, mask) for m in maps)
    return Pyramid(tuple(maps), mask, False), Pyramid(packed, mask, True), mask


def build(ndim: int, norm: str, **options: object) -> Densify:
    densify = Densify(CHANNELS, (8, 8, 16), ndim, norm, **options).double()
    for parameter in densify.parameters():
        nn.init.normal_(parameter)
    return densify


@pytest.mark.parametrize("whole_map", [True, False])
@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize("norm", ["bn", "ln", "gn", "in", "none"])
def test_packed_equals_the_full_grid(
    ndim: int, norm: str, folded: bool, whole_map: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Maps, gradients of every parameter and running statistics agree in float64, whether wide
    stages are made whole before the projection or not.
    """
    monkeypatch.setattr(filled, "ENOUGH", 10**6 if whole_map else 1)
    full, packed, _ = pyramids(ndim)
    folds = [(4,) * ndim, (1, 2, 2)[-ndim:], (1,) * ndim] if folded else None
    models = [build(ndim, norm, folds=folds), build(ndim, norm, folds=folds)]
    models[1].load_state_dict(models[0].state_dict())
    results = [model(pyramid) for model, pyramid in zip(models, (full, packed), strict=True)]
    for maps in results:
        torch.stack([m.square().sum() for m in maps]).sum().backward()
    torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-10)
    for (name, a), (_, b) in zip(
        models[0].named_parameters(), models[1].named_parameters(), strict=True
    ):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-9, msg=name)
    torch.testing.assert_close(dict(models[0].named_buffers()), dict(models[1].named_buffers()))


@given(ratio=st.floats(0.01, 0.99), seed=st.integers(0, 2**31))
def test_hidden_sites_hold_the_token_and_visible_ones_their_norm(ratio: float, seed: int) -> None:
    """Before the projection: exactly one vector at hidden sites, unit statistics elsewhere."""
    full, _, mask = pyramids(2, ratio, seed)
    densify = Densify(CHANNELS, CHANNELS, 2, "bn").double()
    for stage, features in zip(densify.stages, full.maps, strict=True):
        stage.proj = nn.Identity()
        sites = mask.at(features.shape[2:])[:, 0]
        out = stage(features, mask, False).movedim(1, -1)
        assert (out[~sites] == stage.token.flatten()).all()
        if len(out[sites]) > 8:
            assert out[sites].mean(0).abs().max() < 1e-9
            torch.testing.assert_close(out[sites].var(0, unbiased=False).mean().item(), 1.0, **TOL)


TOL = {"rtol": 1e-2, "atol": 1e-2}


def test_nothing_hidden_leaves_the_token_without_a_gradient() -> None:
    """The token is not read when every cell is visible."""
    _, packed, mask = pyramids(2, ratio=0.0)
    densify = build(2, "bn")
    assert mask.n_visible == 9
    torch.stack([m.sum() for m in densify(packed)]).sum().backward()
    assert all(not stage.token.grad.any() for stage in densify.stages)


def test_projections_are_those_of_the_paper() -> None:
    """1x1 at the deepest stage, none where widths agree, 3x3 elsewhere; strided where folded."""
    densify = Densify(CHANNELS, (8, 8, 8), 2)
    assert [stage.proj.kernel_size for stage in densify.stages] == [(3, 3), (3, 3), (1, 1)]
    same = Densify(CHANNELS, CHANNELS, 2)
    assert isinstance(same.stages[2].proj, nn.Identity)
    assert same.stages[0].proj.kernel_size == (3, 3)
    folded = Densify(CHANNELS, (8, 8, 16), 2, folds=[(4, 2), (2, 1), (1, 1)])
    assert [s.proj.stride for s in list(folded.stages)[:2]] == [(4, 2), (2, 1)]
    full, _, _ = pyramids(2)
    maps: tuple[Tensor, ...] = folded.double()(full)
    assert maps[0].shape[2:] == (3, 6)


def test_tokens_start_small_and_cut_at_one_sigma() -> None:
    """Truncated normal of .02, at most .02 in size (SparK's initialisation)."""
    token = Densify((4096,), (4096,), 3).stages[0].token
    assert token.shape == (1, 4096, 1, 1, 1)
    assert token.abs().max() <= 0.02
    assert 0.009 < token.std() < 0.013


def test_unknown_norm_is_refused() -> None:
    """The message lists the choices."""
    with pytest.raises(ConfigError, match="bn, ln, gn, in or none"):
        Densify(CHANNELS, CHANNELS, 2, "batch")
