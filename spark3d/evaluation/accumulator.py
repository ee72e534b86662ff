"""Weighted sums of overlapping windows, one window thick, that give up finished rows."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

EMPTY_LOGIT = -20.0
"""Logit of every class but the background (0) where no window was run."""


class Accumulator:
    """Sums of `weight * logits` over the rows `[origin, origin + thickness)` along one axis.

    Windows must come in the order of their start along `axis`. Rows before the start of the next
    window can change no more: `advance` divides them by their weights, where they lie, and hands
    them out.

    Args:
        classes: number of logits per voxel.
        size: voxels of the whole volume.
        thickness: voxels of a window along `axis`.
        axis: the axis along which rows get finished.
        device: where the sums live; `classes + 1` float32 per voxel of `thickness` rows.
    """

    def __init__(
        self, classes: int, size: Sequence[int], thickness: int, axis: int, device: torch.device
    ) -> None:
        shape = [thickness if a == axis else n for a, n in enumerate(size)]
        self.logits = torch.zeros((classes, *shape), device=device)
        self.weight = torch.zeros(shape, device=device)
        self.axis = axis
        self.origin = 0
        self.thickness = thickness

    @staticmethod
    def size_in_bytes(classes: int, size: Sequence[int], thickness: int, axis: int) -> int:
        """Memory of the sums and of their weights, in bytes."""
        voxels = thickness
        for a, n in enumerate(size):
            voxels *= 1 if a == axis else n
        return 4 * voxels * (classes + 1)

    def add(self, where: Sequence[slice], logits: Tensor, weight: Tensor) -> None:
        """Add the logits `(classes, *window)` of one window with the weights `(*window)`."""
        at = where[self.axis]
        local = [
            slice(at.start - self.origin, at.stop - self.origin) if a == self.axis else s
            for a, s in enumerate(where)
        ]
        self.logits[(slice(None), *local)].addcmul_(logits.to(self.logits.device), weight)
        self.weight[tuple(local)].add_(weight)

    def advance(self, origin: int) -> Iterator[tuple[int, Tensor]]:
        """Hand out the rows from the present origin up to `origin` as (first row, mean logits).

        The logits are a view of the sums, good until the next rows are asked for.
        """
        while self.origin < origin:
            rows = min(origin - self.origin, self.thickness)
            yield self.origin, self._finished(rows)
            for sums, axis in ((self.logits, self.axis + 1), (self.weight, self.axis)):
                _move_up(sums, axis, rows)
            self.origin += rows

    def _finished(self, rows: int) -> Tensor:
        """The first rows' sums divided by their weights, in place."""
        weight = self.weight.narrow(self.axis, 0, rows)
        seen = weight > 0
        done = self.logits.narrow(self.axis + 1, 0, rows).div_(weight.where(seen, 1))
        if not bool(seen.all()):
            done[1:].masked_fill_(~seen, EMPTY_LOGIT)
        return done


def _move_up(sums: Tensor, axis: int, rows: int) -> None:
    """Drop the first rows; the others move to the front in pieces that do not overlap, then 0."""
    rest = sums.shape[axis] - rows
    for first in range(0, rest, rows):
        n = min(rows, rest - first)
        sums.narrow(axis, first, n).copy_(sums.narrow(axis, first + rows, n))
    sums.narrow(axis, rest, rows).zero_()
