"""From classification recipes to objects, as `build` does for the others."""

from pathlib import Path

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.optim import Optimizer

from spark3d import build
from spark3d.classify_recipe import ClassifyRecipe
from spark3d.data.image_transforms import ImageChanges
from spark3d.data.labelled_images import LabelledImages, TrainingImages, ValidationImages
from spark3d.engine.averaging import Average
from spark3d.engine.optim import build_optimizer, rated_groups
from spark3d.errors import ConfigError
from spark3d.models.backbones import Backbone, synchronise_norms
from spark3d.models.classifier import build_classifier, layer_numbers
from spark3d.models.mixing import Mixing, classification_loss
from spark3d.weights.classifiers import ClassifierCard, load_classifier_weights
from spark3d.weights.exchange import LoadReport, load_into
from spark3d.weights.passport import Passport


def crop_size(recipe: ClassifyRecipe) -> tuple[int, int]:
    """Rows and columns of the network's input."""
    rows, columns = build.sizes(recipe.images.crop, recipe.dims, "images.crop")
    return rows, columns


def training_images(recipe: ClassifyRecipe, part: LabelledImages) -> TrainingImages:
    """The numbered stream of changed crops."""
    section = recipe.augment
    changes = ImageChanges(section.scale, section.flip, section.policy, section.erase)
    return TrainingImages(part, crop_size(recipe), recipe.seed, changes, recipe.images.repeats)


def validation_images(recipe: ClassifyRecipe, part: LabelledImages) -> ValidationImages:
    """The middles of the validation images."""
    return ValidationImages(part, crop_size(recipe), recipe.images.evaluation_share)


def classifier(
    recipe: ClassifyRecipe,
    classes: int,
    weights: tuple[dict[str, Tensor], Passport] | None,
    synchronised: bool = False,
) -> tuple[Backbone, nn.Module, LoadReport | None]:
    """The network with fresh head, and encoder weights loaded if there are any.

    Args:
        recipe: Resolved.
        classes: Outputs.
        weights: Encoder weights and their passport; None for a start from scratch.
        synchronised: Batch norms take their statistics over all ranks.

    Returns:
        The backbone as measured, its network (the one to train), and what was loaded.
    """
    model = recipe.model
    net = build_classifier(model.backbone, classes, model.options, model.drop_path)
    report = None
    if weights is not None:
        state, passport = weights
        report = load_into(net.network, state, passport=passport, backbone=model.backbone)
    network = synchronise_norms(net.network) if synchronised else net.network
    return net, network.to(memory_format=torch.channels_last), report  # type: ignore[call-overload]


def layer_rates(net: Backbone, recipe: ClassifyRecipe, pretrained: bool) -> dict[str, float]:
    """Learning rate of every parameter relative to the head's: it falls with depth.

    From scratch all rates are the head's, so that one recipe serves both arms of a comparison.

    Raises:
        ConfigError: `optim.layer_blocks` does not fit the network.
    """
    layers = layer_numbers(net, recipe.optim.layer_blocks)
    last, decay = max(layers.values()), recipe.optim.layer_decay if pretrained else 1.0
    return {name: decay ** (last - layer) for name, layer in layers.items()}


def set_up(
    runner: Fabric, network: nn.Module, recipe: ClassifyRecipe, rates: dict[str, float]
) -> tuple[nn.Module, Optimizer]:
    """Wrap network and optimiser."""
    optim = recipe.optim
    optimizer = build_optimizer(
        optim.name,
        rated_groups(network, rates),
        optim.lr,
        optim.betas,
        optim.momentum,
        always_adapt=optim.always_adapt,
        bias_correction=optim.bias_correction,
    )
    return runner.setup(network, optimizer)  # type: ignore[return-value]


def average(recipe: ClassifyRecipe, network: nn.Module) -> Average | None:
    """The running average of the weights, if the recipe asks for one."""
    optim = recipe.optim
    return Average(network, optim.ema, optim.ema_warmup) if optim.ema > 0 else None


def mixing(recipe: ClassifyRecipe, classes: int) -> Mixing:
    """Soft targets, and mixed images where the recipe says so."""
    return Mixing(classes, recipe.loss.smoothing, recipe.mix.mixup, recipe.mix.cutmix)


def loss(recipe: ClassifyRecipe) -> nn.Module:
    """On logits and soft targets."""
    return classification_loss(recipe.loss.name)


def load_classifier(path: Path) -> tuple[nn.Module, ClassifierCard]:
    """Rebuild the network of a classification run, in evaluation mode on the CPU.

    Args:
        path: The run's folder or its `model.safetensors`.

    Raises:
        DataError: files missing or damaged.
        ConfigError: the weights do not fit the network their card describes.
    """
    state, card = load_classifier_weights(path)
    network = build_classifier(card.backbone, len(card.classes), card.options).network
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise ConfigError(f"{path}: weights and card disagree: {error}") from None
    return network.eval(), card
