"""One encoder under test: run again and again on the same crops, mask and random numbers, with
hooks on every layer.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from spark3d.sparse.encoder import Backend, SparseEncoder
from spark3d.sparse.mask import CellMask
from spark3d.sparse.pyramid import Pyramid

Hook = Callable[[int, str, Tensor], Tensor | None]
"""Sees the number of the call in its forward, the layer's name and its output; may replace it."""


class Trial:
    """One encoder with crops and a mask, run under hooks and the same random numbers each time."""

    def __init__(self, encoder: SparseEncoder, crops: Tensor, mask: CellMask, seed: int) -> None:
        self.encoder, self.crops, self.mask, self.seed = encoder, crops, mask, seed
        self.chosen = encoder.backend
        self.fits_packed = True
        self.rows = mask.batch * mask.n_visible
        self.known: dict[Backend, tuple[Pyramid, list[Tensor]]] = {}
        self.names = {layer: name for name, layer in encoder.network.named_modules() if name}

    def run(
        self,
        backend: Backend,
        crops: Tensor | None = None,
        mask: CellMask | None = None,
        hook: Hook | None = None,
    ) -> Pyramid:
        """The pyramid; `hook` sees every layer's output."""
        self.encoder.backend = backend
        torch.manual_seed(self.seed)
        with self._hooked(hook), torch.no_grad():
            # batch statistics move the running ones: every run starts from the same
            before = [buffer.clone() for buffer in self.encoder.buffers()]
            pyramid = self.encoder(crops if crops is not None else self.crops, mask or self.mask)
            for buffer, value in zip(self.encoder.buffers(), before, strict=True):
                buffer.copy_(value)
        return pyramid

    def outputs(self, backend: Backend) -> tuple[Pyramid, list[Tensor]]:
        """The pyramid, and what every layer gave at visible sites; computed once."""
        if backend not in self.known:
            seen: list[Tensor] = []
            pyramid = self.run(backend, hook=lambda n, name, y: seen.append(self.visible(n, y)))
            self.known[backend] = pyramid, seen
        self.encoder.backend = backend
        return self.known[backend]

    @contextmanager
    def _hooked(self, hook: Hook | None) -> Iterator[None]:
        calls = itertools.count()

        def on(layer: nn.Module, inputs: Any, output: Any) -> Tensor | None:
            del inputs
            if hook is None or not isinstance(output, Tensor):
                return None
            return hook(next(calls), self.names[layer], output)

        handles = [layer.register_forward_hook(on) for layer in self.names]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def find_maps(self) -> tuple[Pyramid, tuple[tuple[int, ...], ...]]:
        """Learn which axes of every layer's output are those of the crop: the ones that change
        with its size, so that channels-last maps (a ConvNeXt's norms) are known for what they are.

        Returns:
            The pyramid of the reference, and the strides of its stages.
        """
        mask, shapes = self.mask, ([], [])
        maps = self.run("reference", hook=_note(shapes[0]))
        strides = [tuple(n // m for n, m in zip(mask.size, y.shape[2:], strict=True)) for y in maps]
        whole = [math.lcm(c, s) for c, s in zip(mask.cell_size, strides[-1], strict=True)]
        other = [n - w if n > 2 * w else n + w for n, w in zip(mask.size, whole, strict=True)]
        grid = [n // c for n, c in zip(other, mask.cell_size, strict=True)]
        everything = CellMask(torch.ones(mask.batch, *grid, dtype=torch.bool), mask.cell_size)
        crops = self.crops.new_ones(*self.crops.shape[:2], *other)
        self.run("reference", crops, everything.to(crops.device), _note(shapes[1]))
        self.axes = [
            tuple(axis for axis, (n, m) in enumerate(zip(*pair, strict=True)) if n != m)
            for pair in zip(*shapes, strict=True)
        ]
        return maps, tuple(strides)

    def axes_of(self, call: int, y: Tensor) -> tuple[int, ...]:
        """The spatial axes of the output of the `call`-th layer; none if it is no dense map."""
        axes = self.axes[call]
        if self.encoder.backend != "reference" or y.shape[0] != self.mask.batch:
            return ()
        return axes if len(axes) == self.mask.ndim and axes[0] > 0 else ()

    def visible(self, call: int, y: Tensor) -> Tensor:
        """A copy of an output, hidden sites emptied where it is a dense map."""
        return self.where_hidden(self.axes_of(call, y), y, torch.zeros_like(y))

    def where_hidden(self, axes: tuple[int, ...], y: Tensor, other: Tensor) -> Tensor:
        """A copy of `y` with the hidden sites along the spatial `axes` taken from `other`."""
        if not axes:
            return y.clone()
        keep = self.mask.at([y.shape[axis] for axis in axes])
        shape = [n if axis in (0, *axes) else 1 for axis, n in enumerate(y.shape)]
        return torch.where(keep.view(shape), y, other)


def _note(shapes: list[tuple[int, ...]]) -> Hook:
    """A hook that collects the shapes of all outputs."""
    return lambda call, name, y: shapes.append(tuple(y.shape))
