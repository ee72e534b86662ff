"""Packed equals reference over random masks, grids, cells, kernels, strides and groups."""

from typing import Any

import pytest
import torch
from both_backends import assert_both_equal, draw_mask
from hypothesis import assume, given
from hypothesis import strategies as st
from timm.layers.conv2d_same import Conv2dSame
from torch import nn

from spark3d.sparse import CellMask, packed
from spark3d.sparse.cells import Span
from spark3d.sparse.gather import Table

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
Axes = tuple[tuple[int, ...], ...]


def draw_any_mask(data: st.DataObject, cells: tuple[int, ...]) -> CellMask:
    """A mask of any ratio over cells of the given sides."""
    grids = st.tuples(*[st.integers(1, 3)] * len(cells)).filter(lambda g: max(g) > 1)
    grid, ratio = data.draw(grids), data.draw(st.floats(0.05, 0.95))
    batch, seed = data.draw(st.integers(1, 3)), data.draw(st.integers(0, 99))
    return draw_mask(grid, cells, ratio, batch, seed)


@st.composite
def windows(draw: st.DrawFn, ndim: int) -> Axes:
    """Cell, kernel, stride, padding and dilation per axis that keep the cells in place."""
    parts = []
    for _ in range(ndim):
        stride = draw(st.integers(1, 3))
        dilation = draw(st.integers(1, 2))
        kernel = draw(st.integers(1, 6 if ndim < 3 else 4))
        total = dilation * (kernel - 1) + 1 - stride
        padding = max(0, -(-total // 2))
        assume(padding * 2 - total < stride)
        cell = stride * draw(st.integers(1, 3 if ndim < 3 else 2))
        parts.append((cell, kernel, stride, padding, dilation))
    return tuple(zip(*parts, strict=True))


def crops_of(mask: CellMask, channels: int) -> torch.Tensor:
    return torch.randn(mask.batch, channels, *mask.size, dtype=torch.float64)


@pytest.mark.parametrize("ndim", [1, 2, 3])
@given(data=st.data())
def test_any_convolution(ndim: int, data: st.DataObject) -> None:
    cell, kernel, stride, padding, dilation = data.draw(windows(ndim))
    mask = draw_any_mask(data, cell)
    groups = data.draw(st.sampled_from([1, 2, 4]))
    layer = CONV[ndim](
        4,
        4 * data.draw(st.integers(1, 2)),
        kernel,
        stride,
        padding,
        dilation,
        groups,
        bias=data.draw(st.booleans()),
    )
    assert_both_equal(layer.double(), crops_of(mask, 4), mask)


@given(data=st.data())
def test_any_same_convolution(data: st.DataObject) -> None:
    """timm's SAME padding: as much behind as in front, or one more behind."""
    cell, kernel, stride, _, dilation = data.draw(windows(2))
    mask = draw_any_mask(data, cell)
    groups = data.draw(st.sampled_from([1, 4]))
    layer = Conv2dSame(4, 4, kernel, stride, 0, dilation, groups).double()
    assert_both_equal(layer, crops_of(mask, 4), mask)


@pytest.mark.parametrize("ndim", [1, 2, 3])
@given(data=st.data())
def test_any_pool(ndim: int, data: st.DataObject) -> None:
    cell, kernel, stride, padding, dilation = data.draw(windows(ndim))
    assume(all(2 * p <= k for p, k in zip(padding, kernel, strict=True)))
    mask = draw_any_mask(data, cell)
    layer = getattr(nn, f"MaxPool{ndim}d")(kernel, stride, padding, dilation)
    if max(dilation) == 1 and data.draw(st.booleans()):
        counted = data.draw(st.booleans())
        layer = getattr(nn, f"AvgPool{ndim}d")(kernel, stride, padding, False, counted)
    assert_both_equal(layer, crops_of(mask, 2), mask)


@pytest.mark.parametrize("ndim", [1, 2, 3])
@given(data=st.data())
def test_any_norm(ndim: int, data: st.DataObject) -> None:
    cell = data.draw(st.tuples(*[st.integers(1, 3)] * ndim))
    mask = draw_any_mask(data, cell)
    kinds = {
        "batch": lambda: getattr(nn, f"BatchNorm{ndim}d")(6),
        "instance": lambda: getattr(nn, f"InstanceNorm{ndim}d")(6, affine=True),
        "group": lambda: nn.GroupNorm(data.draw(st.sampled_from([1, 2, 3, 6])), 6),
    }
    layer = kinds[data.draw(st.sampled_from(sorted(kinds)))]().double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, 1.0, 0.5)
    sites = mask.batch * mask.n_visible * torch.Size(cell).numel()
    assume(sites > mask.batch)  # one site has no variance
    assert_both_equal(layer, 3 + crops_of(mask, 6), mask, tolerance=1e-9)


def shifted(right: Any) -> Any:
    def span(*args: Any) -> Span:
        found = right(*args)
        return found._replace(before=tuple(n + 1 for n in found.before))

    return span


FAULTS: dict[str, tuple[Any, str, Any]] = {
    "a halo shifted by one site": (packed, "window_span", shifted),
    "an adjoint that loses copies": (
        Table,
        "scatter",
        lambda right: lambda self, grads: right(self, grads) * (1 if self.inverse else 0.5),
    ),
    "hidden neighbours that are not zero": (
        Table,
        "gather",
        lambda right: lambda self, rows, fill=0.0: right(self, rows, fill + 1),
    ),
}


@pytest.mark.parametrize(("owner", "name", "wrong"), FAULTS.values(), ids=FAULTS)
def test_the_comparison_finds_errors(
    owner: Any, name: str, wrong: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    mask = draw_mask((3, 3), (4, 4))
    layer = nn.Conv2d(4, 4, 3, 2, 1).double()
    assert_both_equal(layer, crops_of(mask, 4), mask)
    monkeypatch.setattr(owner, name, wrong(getattr(owner, name)))
    with pytest.raises(AssertionError):
        assert_both_equal(nn.Conv2d(4, 4, 3, 2, 1).double(), crops_of(mask, 4), mask)
