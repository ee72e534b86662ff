"""Packing: exact round trips, halos are slices of the padded map, adjoints are transposes."""

import math

import pytest
import torch
import torch.nn.functional as F
from both_backends import draw_mask
from hypothesis import given
from hypothesis import strategies as st

from spark3d.sparse.cells import Span, column_table, from_rows, halo_table, pack, to_rows, unpack
from spark3d.sparse.gather import gather

CPU = torch.device("cpu")


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[int], list[int], list[int], list[int], int]:
    """Grid, cell, sites read before and after each cell, and a seed."""
    axes = draw(st.integers(1, 3))
    side = st.integers(1, 4 if axes < 3 else 3)
    numbers = [draw(st.lists(side, min_size=axes, max_size=axes)) for _ in range(2)]
    grid, cell = numbers
    before = draw(st.lists(st.integers(-1, 6), min_size=axes, max_size=axes))
    after = draw(st.lists(st.integers(0, 6), min_size=axes, max_size=axes))
    if math.prod(grid) == 1:
        grid = [2, *grid[1:]]
    return grid, cell, before, after, draw(st.integers(0, 99))


@given(case=cases())
def test_packing_and_unpacking_keep_visible_cells_and_nothing_else(case: tuple) -> None:
    grid, cell, _, _, seed = case
    mask = draw_mask(grid, cell, seed=seed)
    x = torch.randn(2, 3, *mask.size)
    packed = pack(x, mask)
    assert packed.shape == (2 * mask.n_visible, 3, *cell)
    assert torch.equal(unpack(packed, mask), x.masked_fill(~mask.at(mask.size), 0))
    assert torch.equal(unpack(packed, mask, 7.0), x.masked_fill(~mask.at(mask.size), 7))


@given(case=cases())
def test_a_halo_is_a_slice_of_the_padded_map(case: tuple) -> None:
    grid, cell, before, after, seed = case
    mask = draw_mask(grid, cell, seed=seed)
    x = torch.randn(2, 2, *mask.size).masked_fill(~mask.at(mask.size), 0)
    length = [max(1, b + p + a) for b, p, a in zip(before, cell, after, strict=True)]
    span = Span(tuple(before), tuple(length))
    rows = gather(to_rows(pack(x, mask)), halo_table(mask, cell, span, CPU))
    found = from_rows(rows, 2 * mask.n_visible, length)
    padded = F.pad(x, (12, 12) * len(grid))
    for number, (sample, *index) in enumerate(mask.host.nonzero().tolist()):
        begin = [12 + i * p - b for i, p, b in zip(index, cell, before, strict=True)]
        slices = tuple(slice(b, b + n) for b, n in zip(begin, length, strict=True))
        assert torch.equal(found[number], padded[(sample, slice(None), *slices)])


@given(case=cases(), fill=st.sampled_from([0.0, 2.0]))
def test_the_adjoint_is_the_transpose(case: tuple, fill: float) -> None:
    grid, cell, before, after, seed = case
    mask = draw_mask(grid, cell, seed=seed)
    length = [max(1, b + p + a) for b, p, a in zip(before, cell, after, strict=True)]
    table = halo_table(mask, cell, Span(tuple(before), tuple(length)), CPU)
    n_rows = 2 * mask.n_visible * math.prod(cell)
    rows = torch.randn(n_rows, 2, dtype=torch.float64, requires_grad=True)
    taken = gather(rows, table, fill)
    weights = torch.randn_like(taken)
    (grad,) = torch.autograd.grad((taken * weights).sum(), rows)
    expected = torch.zeros(n_rows + 1, 2, dtype=torch.float64)
    expected.index_add_(0, table.index, weights)
    torch.testing.assert_close(grad, expected[:-1])


def test_gradients_of_packing_and_unpacking_are_each_other() -> None:
    mask = draw_mask((3, 1), (1, 2))
    x = torch.randn(2, 2, *mask.size, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: pack(x, mask), x)
    cells = pack(x, mask).detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda c: unpack(c, mask), cells)


def test_columns_are_the_windows_of_a_halo() -> None:
    mask = draw_mask((3, 3), (4, 2))
    span = Span((1, 2), (5, 5))
    window = ((2, 3), (2, 1), (2, 1))
    rows = torch.arange(2.0 * mask.n_visible * 8)[:, None]
    halo = from_rows(
        halo_table(mask, (4, 2), span, CPU).gather(rows), 2 * mask.n_visible, span.length
    )
    columns = column_table(mask, (4, 2), span, window, CPU).gather(rows)
    expected = F.unfold(halo, (2, 3), dilation=(2, 1), stride=(2, 1)).movedim(1, 2)
    assert torch.equal(columns.view(expected.shape), expected)


def test_tables_are_built_once_per_mask() -> None:
    mask = draw_mask((3, 3), (2, 2))
    span = Span((1, 1), (4, 4))
    assert halo_table(mask, (2, 2), span, CPU) is halo_table(mask, (2, 2), span, CPU)


def test_packed_tensors_are_stored_channels_last() -> None:
    mask = draw_mask((2, 2, 2), (2, 2, 2))
    packed = pack(torch.randn(2, 3, 4, 4, 4), mask)
    assert packed.is_contiguous(memory_format=torch.channels_last_3d)


def test_maps_that_cells_do_not_tile_are_refused() -> None:
    with pytest.raises(ValueError, match="enlarge the cells"):
        pack(torch.zeros(2, 1, 3, 4), draw_mask((2, 2), (2, 2)))
