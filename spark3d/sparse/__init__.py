"""The mask-aware core: masks, packed cells and masked layers, in any number of dimensions."""

from spark3d.sparse.cells import pack, unpack
from spark3d.sparse.convert import MASKED, register_masked, restore_dense, sparsify
from spark3d.sparse.encoder import SparseEncoder
from spark3d.sparse.geometry import pad_crops
from spark3d.sparse.layers import Masked, Pointwise
from spark3d.sparse.mask import CellMask, random_mask, visible_count
from spark3d.sparse.pyramid import Pyramid

__all__ = [
    "MASKED",
    "CellMask",
    "Masked",
    "Pointwise",
    "Pyramid",
    "SparseEncoder",
    "pack",
    "pad_crops",
    "random_mask",
    "register_masked",
    "restore_dense",
    "sparsify",
    "unpack",
    "visible_count",
]
