"""From a fine-tuning recipe to its network and optimiser, encoder weights loaded."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.optim import Optimizer

from spark3d.build import network_kind, segmentation_network
from spark3d.config import FinetuneOptimSection, FinetuneRecipe
from spark3d.engine.optim import build_optimizer, rated_groups
from spark3d.models.backbones import Backbone
from spark3d.models.balance import (
    balance_stages,
    can_balance,
    free_norms,
    restore_norms,
    stage_spreads,
)
from spark3d.models.segmenter import encoder_of
from spark3d.models.statistics import estimate_statistics, hold_statistics
from spark3d.weights.exchange import LoadReport, load_into
from spark3d.weights.passport import Passport


@dataclass(frozen=True)
class Segmenter:
    """A network to fine-tune.

    Attributes:
        network: On the CPU, encoder weights loaded.
        report: Of that; None for a start from scratch.
        rates: Learning rate relative to the rest, of every key that came from the encoder weights.
        holds: The encoder's batch norms keep the statistics of pre-training.
    """

    network: nn.Module
    report: LoadReport | None = None
    rates: Mapping[str, float] = field(default_factory=dict)
    holds: bool = False

    def ready(self, frozen: bool) -> None:
        """Put the network in the mode of a training step; a frozen encoder holds its statistics.

        The fresh norms of a decoder never do: they have none worth holding.
        """
        self.network.train()
        if self.holds or frozen:
            hold_statistics(self.network, self.rates)


def segmenter(
    recipe: FinetuneRecipe,
    classes: int,
    weights: tuple[dict[str, Tensor], Passport] | None,
    crops: Callable[[], Tensor],
) -> Segmenter:
    """The segmentation network, with encoder weights loaded if there are any.

    Args:
        recipe: Resolved.
        classes: Background included.
        weights: Encoder weights and their passport; None for a start from scratch.
        crops: Gives a batch of training crops, by which stages are balanced and statistics made.

    Raises:
        ConfigError: the weights are of another backbone or cover less than 95 % of the encoder.
    """
    model = recipe.model
    network, net = segmentation_network(network_kind(recipe), classes)
    if weights is None:
        return Segmenter(network)
    state, passport = weights
    if can_balance(network) if model.balance == "auto" else model.balance:
        batch = crops()
        fresh, norms = stage_spreads(network, batch), free_norms(network)
        report = load_into(network, state, passport=passport, backbone=model.backbone)
        restore_norms(network, norms)
        balance_stages(network, fresh, batch)
    else:
        report = load_into(network, state, passport=passport, backbone=model.backbone)
    if model.batch_norm == "estimate":
        estimate_statistics(network, crops())
    rates = encoder_rates(network, net, report, recipe.optim)
    return Segmenter(network, report, rates, model.batch_norm == "hold")


def encoder_rates(
    network: nn.Module, net: Backbone, report: LoadReport, optim: FinetuneOptimSection
) -> dict[str, float]:
    """Learning rates, relative to the rest, of what came from the encoder weights.

    The deepest stage gets `encoder_lr_ratio * layer_decay`, every finer one `layer_decay` times the
    rate of the next (BEiT, arXiv 2106.08254, with the stages of a pyramid as layers). Names are
    those in the whole network.
    """
    inside = encoder_of(network)
    prefix = next(name for name, module in network.named_modules() if module is inside)
    dot = f"{prefix}." if prefix else ""
    depth = dict(zip(net.encoder_keys, net.depths, strict=True))
    deepest = len(net.stages)
    return {
        dot + key: optim.encoder_lr_ratio * optim.layer_decay ** (deepest - depth.get(key, 0))
        for key in (*report.matched, *report.reshaped)
    }


def set_up(
    runner: Fabric, segmenter: Segmenter, optim: FinetuneOptimSection
) -> tuple[nn.Module, Optimizer]:
    """Wrap the network and its optimiser."""
    groups = rated_groups(segmenter.network, segmenter.rates)
    optimizer = build_optimizer(optim.name, groups, optim.lr, optim.betas, optim.momentum)
    return runner.setup(segmenter.network, optimizer)  # type: ignore[return-value]
