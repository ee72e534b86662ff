"""Which cells of each crop the encoder may see (SparK, sec. 3.1).

Cells of `cell_size` voxels per axis tile a crop; every sample of a batch shows the same number of
them, which keeps shapes static when visible cells are stacked on the batch axis.

K. Tian et al., "Designing BERT for convolutional networks: sparse and hierarchical masked
modeling", ICLR 2023.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from jaxtyping import Bool
from torch import Tensor

from spark3d.sparse.gather import to_device
from spark3d.sparse.geometry import GeometryError

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class CellMask:
    """Visible cells of a batch of crops.

    Attributes:
        visible: `(b, *grid)`, True where the encoder may see; the same number of True in every
            sample.
        cell_size: voxels of a cell, one number per axis.
        n_visible: visible cells of one sample (counted here unless given, which costs a device
            synchronisation).
        host: the same map on the CPU: what is counted in it makes no device wait.
        tables: the index tables built so far, see `remember`.
    """

    visible: Bool[Tensor, "b *grid"]
    cell_size: tuple[int, ...]
    n_visible: int = -1
    host: Tensor = field(default=None, repr=False)  # pyright: ignore[reportAssignmentType]
    tables: dict[Any, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "cell_size", tuple(int(side) for side in self.cell_size))
        if len(self.cell_size) != self.visible.ndim - 1 or min(self.cell_size) < 1:
            raise ValueError(
                f"cell_size={self.cell_size} needs one positive number per axis of the grid "
                f"{self.grid}"
            )
        if self.host is None:
            object.__setattr__(self, "host", self.visible.cpu())
        if self.n_visible < 0:
            object.__setattr__(self, "n_visible", _equal_count(self.host))

    @property
    def batch(self) -> int:
        """Samples in the batch."""
        return self.visible.shape[0]

    @property
    def grid(self) -> tuple[int, ...]:
        """Cells per axis."""
        return tuple(self.visible.shape[1:])

    @property
    def ndim(self) -> int:
        """Spatial axes."""
        return self.visible.ndim - 1

    @property
    def size(self) -> tuple[int, ...]:
        """Voxels of the crop per axis."""
        return tuple(g * side for g, side in zip(self.grid, self.cell_size, strict=True))

    def to(self, device: torch.device | str) -> "CellMask":
        """The same mask with `visible` on `device`; nothing is counted again."""
        return CellMask(
            to_device(self.visible, device), self.cell_size, self.n_visible, self.host, self.tables
        )

    def remember(self, key: Hashable, build: Callable[[], T]) -> T:
        """What `build` returned when `key` was first asked of this mask: tables are built once."""
        if key not in self.tables:
            self.tables[key] = build()
        return self.tables[key]

    def at(self, size: Sequence[int]) -> Bool[Tensor, "b 1 *size"]:
        """The mask on a map of `size` sites per axis.

        Along an axis finer than the grid each cell is repeated. Along a coarser one a site is
        visible if any of its cells is, which is what a sparse strided convolution yields.

        Raises:
            ValueError: the sites of an axis neither divide the grid nor are a multiple of it.
        """
        if len(size) != self.ndim:
            raise GeometryError(f"a map of {tuple(size)} sites under a mask of {self.ndim} axes")
        out = self.visible.unsqueeze(1)
        for axis, (sites, cells) in enumerate(zip(size, self.grid, strict=True), start=2):
            if sites % cells == 0:
                out = out if sites == cells else out.repeat_interleave(sites // cells, dim=axis)
            elif cells % sites == 0:
                out = out.unflatten(axis, (sites, cells // sites)).any(dim=axis + 1)
            else:
                raise GeometryError(
                    f"a map of {tuple(size)} sites does not fit {self.grid} cells along axis "
                    f"{axis - 2}: {sites} is neither a multiple nor a divisor of {cells}"
                )
        return out


def visible_count(cells: int, ratio: float) -> int:
    """How many of `cells` stay visible when the share `ratio` is hidden: at least 1, at most `cells
    - 1`.

    Rounds half to even, as the official code does (SparK). A ratio of exactly 0 hides nothing.

    Raises:
        ValueError: `ratio` outside [0, 1], or fewer than two cells to choose from.
    """
    if not 0 <= ratio <= 1:
        raise ValueError(f"the share of hidden cells must lie in [0, 1], not {ratio}")
    if ratio == 0:
        return cells
    if cells < 2:
        raise ValueError(
            f"a crop of {cells} cell cannot be masked: take smaller cells or a larger crop"
        )
    return max(1, min(cells - 1, round(cells * (1 - ratio))))


def random_mask(
    batch: int,
    grid: Sequence[int],
    ratio: float,
    cell_size: Sequence[int],
    rng: torch.Generator,
    foreground: Bool[Tensor, "b *grid"] | None = None,
) -> CellMask:
    """Draw visible cells uniformly, the same number in every sample, on the CPU.

    Args:
        batch: samples.
        grid: cells per axis.
        ratio: share of hidden cells, in [0, 1].
        cell_size: voxels of a cell per axis.
        rng: CPU generator; its state alone decides the draw.
        foreground: cells of the body, `(batch, *grid)`. They are served first: the share `ratio` of
            the body is hidden and the rest of the visible budget falls on cells outside, so that a
            crop with much air neither hides nor shows only air. A budget that one side cannot take
            goes to the other.
    """
    cells = 1
    for side in grid:
        cells *= side
    count = visible_count(cells, ratio)
    noise = torch.rand(batch, cells, generator=rng)
    if foreground is not None:
        noise = _body_first(noise, foreground.cpu().reshape(batch, cells), ratio, count)
    order = noise.argsort(dim=1)[:, :count]
    visible = torch.zeros(batch, cells, dtype=torch.bool).scatter_(1, order, True)
    return CellMask(visible.view(batch, *grid), tuple(cell_size), count)


def _body_first(noise: Tensor, body: Tensor, ratio: float, count: int) -> Tensor:
    """Shift the draw so that `round(n_body * (1 - ratio))` body cells come first, then the air,
    then the rest.
    """
    shifted = noise.clone()
    for row, inside in zip(shifted, body, strict=True):
        quota = min(count, round(int(inside.sum()) * (1 - ratio)))
        chosen = torch.where(inside, row, torch.inf).argsort()[:quota]
        row[inside] += 2.0
        row[chosen] -= 4.0
    return shifted


def _equal_count(visible: Tensor) -> int:
    counts = visible.flatten(1).sum(dim=1)
    if int(counts.min()) != int(counts.max()) or int(counts.min()) < 1:
        raise ValueError(
            "every sample must show the same number of cells, at least one, but they show "
            f"{counts.tolist()}"
        )
    return int(counts[0])
