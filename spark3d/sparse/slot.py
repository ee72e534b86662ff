"""Where the layers of one encoder find the mask of the forward that is running."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from spark3d.sparse.geometry import Padding
from spark3d.sparse.rows import RowNorm


class Operations(Protocol):
    """What a backend offers; `functional.py` defines the meaning. `where` is the mask in that
    backend's form.
    """

    def dense_size(self, x: Tensor, where: Any, /) -> tuple[int, ...]: ...
    def conv(
        self,
        x: Tensor,
        where: Any,
        weight: Tensor,
        bias: Tensor | None,
        stride: Sequence[int],
        padding: Padding,
        dilation: Sequence[int],
        groups: int,
        /,
    ) -> Tensor: ...
    def max_pool(
        self,
        x: Tensor,
        where: Any,
        kernel: Sequence[int],
        stride: Sequence[int],
        padding: Padding,
        dilation: Sequence[int],
        /,
    ) -> Tensor: ...
    def avg_pool(
        self,
        x: Tensor,
        where: Any,
        kernel: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        ceil_mode: bool,
        count_include_pad: bool,
        /,
    ) -> Tensor: ...
    def row_norm(self, x: Tensor, where: Any, norm: RowNorm, /) -> Tensor: ...
    def group_norm(
        self,
        x: Tensor,
        where: Any,
        groups: int,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        /,
    ) -> Tensor: ...
    def sample_mean(self, x: Tensor, where: Any, /) -> Tensor: ...
    def sample_max(self, x: Tensor, where: Any, /) -> Tensor: ...
    def sample_l2(self, x: Tensor, where: Any, /) -> Tensor: ...
    def over_sites(self, values: Tensor, x: Tensor, where: Any, /) -> Tensor: ...


class Run(NamedTuple):
    """One masked forward: the backend's operations, the mask in its form, and the samples of the
    batch.
    """

    ops: Operations
    where: Any
    batch: int


class MaskSlot:
    """Holds the running forward of one encoder, separately for each thread; None means a dense
    forward.
    """

    def __init__(self) -> None:
        self._local = threading.local()

    @property
    def run(self) -> Run | None:
        """The masked forward that is running in this thread, if any."""
        return getattr(self._local, "run", None)

    @property
    def told(self) -> bool:
        """Whether this thread is inside `use`, so that None means a dense forward on purpose."""
        return getattr(self._local, "told", False)

    @contextmanager
    def use(self, run: Run | None) -> Iterator[None]:
        """Make `run` the running forward; the former one is back afterwards, whatever happens."""
        before = self.run, self.told
        self._local.run, self._local.told = run, True
        try:
            yield
        finally:
            self._local.run, self._local.told = before

    def __reduce__(self) -> tuple[type["MaskSlot"], tuple[()]]:
        return MaskSlot, ()


class LayerSlot(NamedTuple):
    """What conversion gives each layer: the slot of its encoder, its dotted name, and why it is
    refused, if it is.
    """

    slot: MaskSlot
    name: str
    refusal: str = ""
