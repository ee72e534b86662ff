"""A running average of the weights, which is often better than the last ones (timm's EMA)."""

from timm.utils.model_ema import ModelEmaV3
from torch import nn


class Average:
    """The exponential moving average of a network's parameters and buffers.

    Args:
        network: Whose weights are averaged, from its present ones on.
        decay: Share of the old average that an update keeps.
        warmup: Let the share rise to `decay` over the first updates, so that a short run does not
            average its initial weights; step `n` keeps at most `1 - (1 + n) ** (-2 / 3)`.
    """

    def __init__(self, network: nn.Module, decay: float, warmup: bool) -> None:
        self._ema = ModelEmaV3(network, decay=decay, use_warmup=warmup)
        self._warmup = warmup

    @property
    def network(self) -> nn.Module:
        """The averaged network, in evaluation mode."""
        return self._ema.module

    def update(self, network: nn.Module, step: int) -> None:
        """Take in the weights after `step` (from 1): a function of the step alone."""
        self._ema.update(network, step + 1 if self._warmup else None)
