"""SparK: predict the voxels of hidden cells, each normalised by itself, from a masked pyramid.

K. Tian, Y. Jiang, Q. Diao, C. Lin, L. Wang, Z. Yuan, "Designing BERT for convolutional networks:
sparse and hierarchical masked modeling", ICLR 2023, arXiv 2301.03580.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from spark3d.models.decoder import LightDecoder, OfficialDecoder
from spark3d.models.densify import Densify
from spark3d.models.hidden import cut_hidden, paste_hidden
from spark3d.objectives.base import Losses, Objective
from spark3d.objectives.targets import normalise_cells
from spark3d.sparse.encoder import SparseEncoder
from spark3d.sparse.mask import CellMask


class SparK(Objective):
    """Masked encoder, densify, decoder, and the mean squared error of the hidden cells.

    Args:
        encoder: The masked encoder.
        densify: Fills the hidden sites of its stages; channels of `encoder`, widths of `decoder`.
        decoder: Predicts the voxels of the hidden cells.
        eps: Added to the variance of a cell, in squared units of the crop (1e-6 officially).
        min_variance: Hidden cells that vary less are flat, in squared units of the crop (0: none
            is, officially).
        flat_weight: How much the error of a flat cell counts, from 0 (it is left out) to 1.
    """

    def __init__(
        self,
        encoder: SparseEncoder,
        densify: Densify,
        decoder: OfficialDecoder | LightDecoder,
        eps: float = 1e-6,
        min_variance: float = 0.0,
        flat_weight: float = 0.0,
    ) -> None:
        super().__init__(encoder)
        self.densify = densify
        self.decoder = decoder
        self.eps = eps
        self.min_variance = min_variance
        self.flat_weight = flat_weight

    def forward(self, crops: Float[Tensor, "b c *size"], mask: CellMask) -> Losses:
        """Weighted mean over the hidden cells of the batch of each cell's mean squared error.

        Zero, with zero gradients, where no cell counts.
        """
        target = normalise_cells(cut_hidden(crops, mask), self.eps, self.min_variance)
        predicted = self.predict(crops, mask).to(target.voxels.dtype)
        errors = (predicted - target.voxels).square().flatten(1).mean(1)
        share = target.counted.to(errors.dtype)
        weight = share + self.flat_weight * (1 - share)
        least = torch.finfo(weight.dtype).tiny
        total = (errors * weight).sum() / weight.sum().clamp(min=least)
        parts = {"voxels": total.detach(), "counted": share.sum() / max(1, len(share))}
        return Losses(total, parts)

    def predict(
        self, crops: Float[Tensor, "b c *size"], mask: CellMask
    ) -> Float[Tensor, "n c *cell"]:
        """Voxels of the hidden cells, in units of each cell's own spread."""
        return self.decoder(self.densify(self.encoder(crops, mask)), mask)

    def reconstruct(
        self, crops: Float[Tensor, "b c *size"], mask: CellMask
    ) -> Float[Tensor, "b c *size"]:
        """Visible cells as given; hidden ones as predicted, with their own true mean and spread."""
        target = normalise_cells(cut_hidden(crops, mask), self.eps)
        voxels = target.undo(self.predict(crops, mask)).to(crops.dtype)
        return paste_hidden(crops, voxels, mask)
