"""The convolution of a map with one vector at hidden sites: the same numbers as on the full map."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from spark3d.models.filled import ENOUGH, filled_conv, worthwhile
from spark3d.models.hidden import fill_hidden
from spark3d.sparse.mask import CellMask, random_mask

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
CELL, GRID = (4, 2, 3), (3, 4, 2)


def draw(ndim: int, ratio: float, seed: int, channels: int = 3) -> tuple[CellMask, Tensor, Tensor]:
    """A mask, packed cells stored channels-last, and a vector."""
    rng = torch.Generator().manual_seed(seed)
    mask = random_mask(2, GRID[:ndim], ratio, CELL[:ndim], rng)
    cells = (2 * mask.n_visible, *CELL[:ndim], channels)
    x = torch.randn(cells, generator=rng, dtype=torch.float64).movedim(-1, 1)
    vector = torch.randn(1, channels, *(1,) * ndim, generator=rng, dtype=torch.float64)
    return mask, x.requires_grad_(), vector.requires_grad_()


def both_ways(conv: Any, mask: CellMask, x: Tensor, vector: Tensor) -> tuple[Tensor, Tensor]:
    """On the full map, and from what is known."""
    return (
        conv(fill_hidden(x, vector, mask)),
        filled_conv(x, vector, conv.weight, conv.bias, mask),
    )


@given(
    kernel=st.lists(st.sampled_from([1, 3, 5]), min_size=1, max_size=3),
    ratio=st.floats(0.0, 0.99),
    bias=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_map_and_gradients_are_those_of_the_full_map(
    kernel: list[int], ratio: float, bias: bool, seed: int
) -> None:
    mask, x, vector = draw(len(kernel), ratio, seed)
    padding = [k // 2 for k in kernel]
    conv = CONVOLUTIONS[len(kernel)](3, 2, kernel, padding=padding, bias=bias).double()  # type: ignore[arg-type]
    wanted, found = both_ways(conv, mask, x, vector)
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)
    ends = [x, vector, *conv.parameters()]
    weights = torch.randn(wanted.shape, dtype=torch.float64)
    expected = torch.autograd.grad(wanted, ends, weights)
    got = torch.autograd.grad(found, ends, weights)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_two_runs_give_the_same_bits() -> None:
    mask, x, vector = draw(3, 0.6, 0)
    conv = nn.Conv3d(3, 2, 3, padding=1)
    runs = []
    for _ in range(2):
        y = filled_conv(x.float(), vector.float(), conv.weight, conv.bias, mask)
        runs.append((y, *torch.autograd.grad(y.square().sum(), [x, vector, *conv.parameters()])))
    assert all(map(torch.equal, *runs))


def test_it_keeps_the_visible_rows_and_no_full_map() -> None:
    """What autograd saves is packed rows, weight and nothing larger."""
    mask, x, vector = draw(3, 0.9, 0)
    conv = nn.Conv3d(3, 2, 3, padding=1).double()
    saved: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        filled_conv(x, vector, conv.weight, conv.bias, mask)
    rows = (x.numel() // 3 + 1) * 3
    assert sorted(saved) == sorted([rows, conv.weight.numel()])


def test_it_is_taken_where_it_was_faster() -> None:
    """Many channels, full precision, on a CPU; never a strided convolution or none."""
    wide, narrow = torch.empty(1, ENOUGH, 2, 2), torch.empty(1, ENOUGH - 1, 2, 2)
    conv = nn.Conv2d(ENOUGH, 4, 3, padding=1)
    assert worthwhile(conv, wide)
    assert not worthwhile(conv, narrow)
    assert not worthwhile(conv, wide.bfloat16())
    assert not worthwhile(conv, wide.to("meta"))
    assert not worthwhile(nn.Conv2d(ENOUGH, 4, 2, 2), wide)
    assert not worthwhile(nn.Identity(), wide)
    with torch.autocast("cpu", torch.bfloat16):
        assert not worthwhile(conv, wide)


@pytest.mark.parametrize("ratio", [0.0, 0.5])
def test_the_vector_learns_from_hidden_sites_alone(ratio: float) -> None:
    mask, x, vector = draw(2, ratio, 1)
    conv = nn.Conv2d(3, 2, 3, padding=1).double()
    y = filled_conv(x, vector, conv.weight, conv.bias, mask)
    (grad,) = torch.autograd.grad(y.sum(), vector)
    assert bool(grad.any()) == (ratio > 0)
