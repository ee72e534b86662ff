"""A running average of the weights, which is often better than the last ones (timm's EMA)."""

import torch
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn


class Average:
    """The exponential moving average of a network's parameters and buffers.

    Tensors that a network has under several names count once.

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
        decay = self._ema.get_decay(step + 1 if self._warmup else None)
        old, new = _tensors(self.network), _tensors(network)
        moving = [n for n, value in enumerate(old) if value.is_floating_point()]
        with torch.no_grad():  # one call for all, as timm does
            pair = [old[n] for n in moving], [new[n] for n in moving]
            torch._foreach_lerp_(*pair, 1.0 - decay)  # pyright: ignore[reportPrivateImportUsage]
            for n in set(range(len(old))).difference(moving):
                old[n].copy_(new[n])


def _tensors(network: nn.Module) -> list[Tensor]:
    """What the state dict holds, each tensor once."""
    state = network.state_dict(keep_vars=True)
    return list({id(value): value for value in state.values()}.values())
