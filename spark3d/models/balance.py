"""Give a pre-trained SegResNet the scales of a fresh one, which leaves its features as they are.

The stages of SegResNet are sums of residual branches without a norm at their end, and every branch
begins with one. Pre-training can therefore let a stage's scale grow at no cost: after 2400 steps
the deepest stage of a small network was 19 times as wide as at the start. In the segmentation
network the decoder adds stages to each other without a norm between, and the deep ones drown the
fine ones. Every branch normalises what it reads, so a stage can be scaled by any factor by scaling
the convolutions that write into it, and the encoder computes the same normalised features.

Convolutions between two norms have a free scale too. Theirs grows in pre-training, and the larger a
scale-free weight, the smaller the change that a step of the optimiser makes to what it computes:
without mending it, one learning rate would mean less to a pre-trained encoder than to a fresh one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from monai.networks.nets.segresnet import SegResNet
from torch import Tensor, nn

from spark3d.errors import ConfigError


def can_balance(network: nn.Module) -> bool:
    """Whether a rule is known for this network: a SegResNet whose norms keep no statistics.

    Running statistics are of the scales before, and at inference a norm would not undo the factor.
    """
    kept = any(name.endswith("running_mean") for name, _ in network.named_buffers())
    return isinstance(network, SegResNet) and not kept


def stage_spreads(network: nn.Module, crops: Float[Tensor, "b c *size"]) -> tuple[float, ...]:
    """Standard deviation of every stage's output over a batch of whole crops, fine to coarse.

    Raises:
        ConfigError: No rule is known for this network, see `can_balance`.
    """
    if not (isinstance(network, SegResNet) and can_balance(network)):
        raise ConfigError(
            f"stages of this {type(network).__name__} cannot be balanced, only those of SegResNet "
            "without running statistics (batch norm); set model.balance=false"
        )
    training = network.training
    network.eval()
    with torch.no_grad():
        _, stages = network.encode(crops)
    network.train(training)
    return tuple(float(stage.float().std()) for stage in stages)


def free_weights(network: nn.Module) -> dict[str, nn.Parameter]:
    """The kernels of the encoder whose scale the next norm undoes, by name."""
    if not isinstance(network, SegResNet):
        return {}
    named = network.named_parameters()
    return {
        k: v for k, v in named if k.startswith("down_layers") and k.endswith("conv1.conv.weight")
    }


def free_norms(network: nn.Module) -> dict[str, float]:
    """Euclidean norms of the `free_weights`."""
    return {name: float(weight.detach().norm()) for name, weight in free_weights(network).items()}


def restore_norms(network: nn.Module, wanted: Mapping[str, float]) -> None:
    """Scale the `free_weights` to the given norms, in place; features change by the norms' eps."""
    with torch.no_grad():
        for name, weight in free_weights(network).items():
            weight.mul_(wanted[name] / weight.norm())


def balance_stages(
    network: nn.Module, wanted: Sequence[float], crops: Float[Tensor, "b c *size"]
) -> tuple[float, ...]:
    """Scale the stages of `network` to standard deviations `wanted` on `crops`, in place.

    Args:
        network: A SegResNet.
        wanted: One number a stage, fine to coarse, such as the `stage_spreads` of a fresh network.
        crops: A batch as the network will see it.

    Returns:
        The factor of every stage.

    Raises:
        ConfigError: No rule is known for this network.
    """
    found = stage_spreads(network, crops)
    assert isinstance(network, SegResNet)
    factors = tuple(w / f for w, f in zip(wanted, found, strict=True))
    with torch.no_grad():
        network.get_parameter("convInit.conv.weight").mul_(factors[0])
        for i, stage in enumerate(network.down_layers):
            if i > 0:
                entry = network.get_parameter(f"down_layers.{i}.0.conv.weight")
                entry.mul_(factors[i] / factors[i - 1])
            for j in range(1, len(list(stage.children()))):
                network.get_parameter(f"down_layers.{i}.{j}.conv2.conv.weight").mul_(factors[i])
    return factors
