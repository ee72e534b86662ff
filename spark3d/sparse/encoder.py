"""A network as a masked encoder: visible cells in, a pyramid of stage outputs out."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from spark3d.sparse import functional, packed
from spark3d.sparse.cells import pack
from spark3d.sparse.convert import sparsify
from spark3d.sparse.convolution import ConvCase, Strategy, choose
from spark3d.sparse.geometry import nearest_sizes
from spark3d.sparse.mask import CellMask
from spark3d.sparse.pyramid import Pyramid
from spark3d.sparse.slot import MaskSlot, Run

Backend = Literal["packed", "reference"]


class SparseEncoder(nn.Module):
    """Runs an ordinary network on visible cells only and returns the outputs of its stages.

    The network is made mask-aware in place. Its forward is stopped once the last stage has been
    reached, so heads and decoders never run. Several encoders, several masks and plain dense
    inference coexist: the mask is set for the duration of one forward, in one thread.

    Args:
        network: the user's network; it keeps its parameters and their names.
        stages: dotted names of the submodules whose outputs are wanted, fine to coarse.
        ndim: spatial axes of the crops.
        backend: "packed" computes visible cells only; "reference" computes the full grid and
            empties hidden cells, which also serves cells smaller than the total stride.
        checkpoint: dotted names of submodules whose activations are recomputed in backward, to save
            memory.
        strategy: the rule that says how each packed convolution is computed; see `convolution.py`.

    Raises:
        ValueError: a name is not a submodule, or the network is mask-aware already.
    """

    def __init__(
        self,
        network: nn.Module,
        stages: Sequence[str],
        ndim: int,
        backend: Backend = "packed",
        checkpoint: Sequence[str] = (),
        strategy: Callable[[ConvCase], Strategy] = choose,
    ) -> None:
        super().__init__()
        names = dict(network.named_modules(remove_duplicate=False))
        unknown = [name for name in stages if name not in names]
        if unknown or not stages:
            raise ValueError(
                f"stages={list(stages)}: the network has no submodules {unknown}; its first ones "
                f"are {list(names)[1:12]}"
            )
        if backend not in ("packed", "reference"):
            raise ValueError(f'backend={backend!r}; choose "packed" or "reference"')
        if ndim not in (1, 2, 3):
            raise ValueError(f"ndim={ndim}; crops have 1, 2 or 3 spatial axes")
        self.slot = MaskSlot()
        sparsify(network, self.slot, checkpoint)
        self.network = network
        self.stages = tuple(stages)
        self.ndim = ndim
        self.backend: Backend = backend
        self.strategy = strategy

    def forward(self, crops: Float[Tensor, "b c *size"], mask: CellMask) -> Pyramid:
        """Encode the visible cells of `crops`; nothing of the hidden ones is read.

        Raises:
            ValueError: crops and mask differ in size, or a layer's stride does not fit the cells.
            TypeError: a layer without a masked meaning is reached.
        """
        self._check(crops, mask)
        x, run = self._enter(crops, mask)
        with self.slot.use(run):
            maps = stage_outputs(self.network, self.stages, x)
        if self.backend == "reference":
            maps = tuple(functional.hide(y, mask) for y in maps)
        return Pyramid(maps, mask, packed=self.backend == "packed")

    def dense(self, crops: Float[Tensor, "b c *size"]) -> tuple[Tensor, ...]:
        """The same stages on whole crops, nothing hidden, each `(b, c_i, *size_i)`."""
        with self.slot.use(None):
            return stage_outputs(self.network, self.stages, crops)

    def _enter(self, crops: Tensor, mask: CellMask) -> tuple[Tensor, Run]:
        """What the network gets instead of the crops, and where its layers look for the mask."""
        if self.backend == "packed":
            layout = packed.Layout(mask, self.strategy)
            return pack(crops, mask), Run(packed, layout, mask.batch)
        return functional.hide(crops, mask), Run(functional, mask, mask.batch)

    def _check(self, crops: Tensor, mask: CellMask) -> None:
        size = tuple(crops.shape[2:])
        if len(size) != self.ndim or mask.ndim != self.ndim:
            raise ValueError(
                f"crops {tuple(crops.shape)} and a grid {mask.grid} for an encoder of {self.ndim} "
                "spatial axes"
            )
        if crops.shape[0] != mask.batch or size != mask.size:
            raise ValueError(
                f"crops of {crops.shape[0]} x {size} voxels, but the mask covers {mask.batch} x "
                f"{mask.size} ({mask.grid} cells of {mask.cell_size}); "
                + (nearest_sizes(size, mask.cell_size) or "draw the mask for the crops' size")
            )


def stage_outputs(network: nn.Module, stages: Sequence[str], x: Tensor) -> tuple[Tensor, ...]:
    """The outputs of the named submodules; the forward of `network` ends with the last of them.

    Raises:
        ValueError: the forward never reaches a stage, runs one more than once, or changes its
            output afterwards.
        TypeError: a stage returns something else than a tensor.
    """
    found: dict[str, Tensor] = {}
    versions: dict[str, int] = {}
    with _capture(network, stages, found, versions), suppress(_Reached):
        network(x)
    missing = [name for name in stages if name not in found]
    if missing:
        raise ValueError(f"the forward of the network never reached the stages {missing}")
    for name, output in found.items():
        if _version(output) != versions[name]:
            raise ValueError(
                f"stage {name!r}: a later layer changes its output in place (an activation with "
                "inplace=True?); name that layer as the stage, or set inplace=False"
            )
    return tuple(found[name] for name in stages)


def _version(output: Tensor) -> int:
    """How often a tensor was changed in place; 0 where nobody counts."""
    counted = not (output.is_inference() or torch.compiler.is_compiling())
    return output._version if counted else 0


@contextmanager
def _capture(
    network: nn.Module, stages: Sequence[str], found: dict[str, Tensor], versions: dict[str, int]
) -> Iterator[None]:
    """Collect the outputs of the stages of this thread's forward in `found`; stop at the last."""
    this_thread = threading.local()
    this_thread.runs = True

    def keep(name: str, output: Any) -> None:
        if not getattr(this_thread, "runs", False):
            return
        if not isinstance(output, Tensor):
            raise TypeError(f"stage {name!r} returns {type(output).__name__}, not a tensor")
        if name in found:
            raise ValueError(
                f"stage {name!r} runs more than once in a forward; name one that does not"
            )
        found[name], versions[name] = output, _version(output)
        if len(found) == len(stages):
            raise _Reached

    def hook(name: str) -> Any:
        return lambda module, inputs, output: keep(name, output)

    handles = [network.get_submodule(name).register_forward_hook(hook(name)) for name in stages]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Reached(Exception):
    """Every stage has been reached; the rest of the network need not run."""
