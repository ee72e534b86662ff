"""LayerNorm over the channels of channels-first maps, for any number of axes."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from spark3d.sparse.layers import Masked
from spark3d.sparse.slot import Run


class MaskedChannelNorm(Masked):
    """A norm over channels works on each site alone: the dense layer is exact on packed cells."""

    def masked(self, run: Run, x: Tensor) -> Tensor:
        del run
        return self.dense_class.forward(self, x)


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of `(b, c, *size)`, eps 1e-6 as in ConvNeXt."""

    __masked_class__ = MaskedChannelNorm

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__(channels, eps=eps)

    def forward(self, input: Float[Tensor, "b c *size"]) -> Float[Tensor, "b c *size"]:
        return super().forward(input.movedim(1, -1)).movedim(-1, 1)
