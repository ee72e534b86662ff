"""Batch-norm statistics when a pre-trained encoder is fine-tuned: held, or estimated anew.

A masked pre-training keeps running statistics of visible voxels only, of crops with most cells
hidden. Dense crops differ, so the choice is the recipe's: move on from them, hold them, or replace
them by those of a few dense crops before the first step.
"""

from __future__ import annotations

from collections.abc import Container

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

BatchNorm = nn.modules.batchnorm._BatchNorm


def hold_statistics(network: nn.Module, keys: Container[str]) -> None:
    """Let batch norms of a network in training use, and keep, their running statistics.

    `network.train()` undoes it; weights and biases of the norms train on.

    Args:
        network: In training.
        keys: Of its state dict; the norms whose running statistics are among them are held.
    """
    for name, module in network.named_modules(remove_duplicate=False):
        if isinstance(module, BatchNorm) and f"{name}.running_mean" in keys:
            module.eval()


def estimate_statistics(network: nn.Module, crops: Float[Tensor, "b c *size"]) -> None:
    """Replace all running statistics by their mean over the `crops`, two at a time.

    torch's generator is put back; without batch norms nothing happens.
    """
    with torch.random.fork_rng(devices=[]):
        update_bn(crops.split(2), network)
