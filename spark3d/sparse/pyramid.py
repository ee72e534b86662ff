"""What an encoder returns: the outputs of its stages, fine to coarse."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from spark3d.sparse.cells import unpack
from spark3d.sparse.mask import CellMask


@dataclass(frozen=True, eq=False)
class Pyramid:
    """Stage outputs of one forward, fine to coarse.

    Attributes:
        maps: packed `(b * n_visible, c_i, *cell_i)` or dense `(b, c_i, *size_i)`, zero where
            hidden.
        mask: what was visible.
        packed: which of the two layouts `maps` has.
    """

    maps: tuple[Tensor, ...]
    mask: CellMask
    packed: bool

    def __len__(self) -> int:
        return len(self.maps)

    def __getitem__(self, index: int) -> Tensor:
        return self.maps[index]

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.maps)

    def dense(self) -> "Pyramid":
        """The same stages as maps on the full grid, `(b, c_i, *size_i)`, zero where hidden."""
        if not self.packed:
            return self
        return Pyramid(tuple(unpack(x, self.mask) for x in self.maps), self.mask, packed=False)
