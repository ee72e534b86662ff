"""Masks: equal counts, official rounding, what a cell is on finer and coarser maps, the body."""

import math

import pytest
import torch
from both_backends import draw_mask
from hypothesis import given
from hypothesis import strategies as st

from spark3d.sparse.mask import CellMask, random_mask, visible_count

grids = st.lists(st.integers(1, 5), min_size=1, max_size=3).filter(lambda g: math.prod(g) > 1)


@given(grid=grids, ratio=st.floats(0.01, 1), seed=st.integers(0, 2**32))
def test_every_sample_shows_the_same_number_of_cells(
    grid: list[int], ratio: float, seed: int
) -> None:
    mask = draw_mask(grid, [2] * len(grid), ratio, batch=3, seed=seed)
    cells = math.prod(grid)
    expected = max(1, min(cells - 1, round(cells * (1 - ratio))))
    assert mask.visible.flatten(1).sum(1).tolist() == [expected] * 3
    assert mask.n_visible == expected
    assert mask.size == tuple(2 * g for g in grid)


@pytest.mark.parametrize(("side", "expected"), [(7, 20), (3, 4), (2, 2)])
def test_counts_are_those_of_the_official_code(side: int, expected: int) -> None:
    assert visible_count(side * side, 0.6) == expected


def test_the_generator_alone_decides_the_draw() -> None:
    first, again, other = (draw_mask((6, 6), (2, 2), seed=seed).visible for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    torch.manual_seed(99)
    assert torch.equal(first, draw_mask((6, 6), (2, 2), seed=3).visible)


def test_every_cell_is_shown_equally_often() -> None:
    mask = random_mask(4000, (3, 3), 0.6, (1, 1), torch.Generator().manual_seed(0))
    share = mask.visible.float().mean(0)
    assert (share - 4 / 9).abs().max() < 0.04


def test_a_share_of_zero_hides_nothing() -> None:
    assert draw_mask((2, 3), (1, 1), ratio=0.0).visible.all()


@pytest.mark.parametrize("ratio", [-0.1, 1.1, math.nan])
def test_ratios_outside_zero_to_one_are_refused(ratio: float) -> None:
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
        visible_count(9, ratio)


def test_a_single_cell_cannot_be_masked() -> None:
    with pytest.raises(ValueError, match="smaller cells or a larger crop"):
        visible_count(1, 0.5)


def test_unequal_counts_are_refused() -> None:
    with pytest.raises(ValueError, match=r"same number of cells.*\[2, 1\]"):
        CellMask(torch.tensor([[True, True], [True, False]]), (4,))


def test_a_cell_size_for_another_number_of_axes_is_refused() -> None:
    with pytest.raises(ValueError, match="one positive number per axis"):
        CellMask(torch.ones(1, 2, 2, dtype=torch.bool), (4,))


@given(grid=grids, factor=st.integers(1, 3), seed=st.integers(0, 99))
def test_on_finer_maps_each_cell_is_repeated(grid: list[int], factor: int, seed: int) -> None:
    mask = draw_mask(grid, [2] * len(grid), seed=seed)
    fine = mask.at([factor * g for g in grid])
    expected = mask.visible[:, None]
    for axis in range(2, 2 + len(grid)):
        expected = expected.repeat_interleave(factor, dim=axis)
    assert torch.equal(fine, expected)


def test_on_coarser_maps_a_site_is_visible_if_any_of_its_cells_is() -> None:
    visible = torch.zeros(1, 4, 4, dtype=torch.bool)
    visible[0, 1, 0] = visible[0, 2, 2] = True
    mask = CellMask(visible, (2, 2))
    assert mask.at((2, 2))[0, 0].tolist() == [[True, False], [False, True]]
    assert mask.at((2, 4))[0, 0].tolist() == [
        [True, False, False, False],
        [False, False, True, False],
    ]


@pytest.mark.parametrize("size", [(5, 4), (4, 3), (4,)])
def test_maps_that_do_not_fit_are_refused(size: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="a map of"):
        draw_mask((4, 4), (2, 2)).at(size)


@given(seed=st.integers(0, 99), n_body=st.integers(0, 25), ratio=st.floats(0.1, 0.9))
def test_the_share_hidden_holds_inside_the_body(seed: int, n_body: int, ratio: float) -> None:
    rng = torch.Generator().manual_seed(seed)
    body = torch.zeros(2, 25, dtype=torch.bool)
    body[:, torch.randperm(25, generator=rng)[:n_body]] = True
    mask = random_mask(2, (5, 5), ratio, (4, 4), rng, foreground=body.view(2, 5, 5))
    count = visible_count(25, ratio)
    quota = min(count, round(n_body * (1 - ratio)))
    expected = max(quota, count - (25 - n_body))
    assert (mask.visible & body.view(2, 5, 5)).flatten(1).sum(1).tolist() == [expected] * 2
    assert mask.n_visible == count


def test_moving_a_mask_keeps_its_count_and_tables() -> None:
    mask = draw_mask((3, 3), (2, 2))
    mask.remember("key", lambda: 5)
    moved = mask.to("cpu")
    assert (moved.n_visible, moved.remember("key", lambda: 6)) == (mask.n_visible, 5)
