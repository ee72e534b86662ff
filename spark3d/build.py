"""From recipes to objects: the only place where names become constructors."""

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning_fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.optim import Optimizer

from spark3d.classify_recipe import ClassifyRecipe
from spark3d.config import (
    AugmentSection,
    ComputeSection,
    DataSection,
    FinetuneRecipe,
    LossSection,
    OptimSection,
    PretrainRecipe,
    WindowSection,
    resolve,
)
from spark3d.data.augment import Affine, Augment, Flips, Intensity, Turns
from spark3d.data.crops import CropRule
from spark3d.data.intensity import Window
from spark3d.engine.optim import build_optimizer, parameter_groups
from spark3d.engine.precision import warn_of_slow_bfloat16
from spark3d.engine.schedule import learning_rate, weight_decay
from spark3d.errors import ConfigError, EnvironmentProblem
from spark3d.models.backbones import Backbone, build_backbone, synchronise_norms
from spark3d.models.decoder import LightDecoder, OfficialDecoder
from spark3d.models.densify import Densify
from spark3d.models.losses import DeepSupervision, DiceCrossEntropy
from spark3d.models.segmenter import build_segmenter
from spark3d.objectives.a2mim import A2MIM
from spark3d.objectives.base import Objective
from spark3d.objectives.localmim import HogSettings, LocalMIM
from spark3d.objectives.spark import SparK
from spark3d.recipe_sections import LocalMIMSection, SparKSection
from spark3d.sparse.encoder import SparseEncoder
from spark3d.weights.segmenters import ModelCard, load_model

T = TypeVar("T", PretrainRecipe, FinetuneRecipe, ClassifyRecipe)
LIGHT_WIDTH, OFFICIAL_WIDTH = 256, 768


def fabric(compute: ComputeSection, precision: str) -> Fabric:
    """Devices, ranks and precision; launched.

    Under torchrun or srun the launcher has decided how many processes there are; where the recipe
    says `auto`, they work together.
    """
    if compute.threads != "auto":
        torch.set_num_threads(compute.threads)
    devices, nodes, strategy = compute.devices, compute.nodes, compute.strategy
    if (processes := launched_processes()) is not None:
        local, nodes = processes
        devices = local if devices == "auto" else devices
        strategy = "ddp" if strategy == "auto" and local * nodes > 1 else strategy
    try:
        runner = Fabric(
            accelerator=compute.accelerator,
            devices=devices,
            num_nodes=nodes,
            strategy=strategy,
            precision=precision,  # type: ignore[arg-type]
        )
    except (MisconfigurationException, ImportError, ValueError, RuntimeError) as error:
        kind = ConfigError if isinstance(error, ValueError) else EnvironmentProblem
        raise kind(
            f"compute.accelerator={compute.accelerator}, devices={devices}, strategy={strategy}, "
            f"optim.precision={precision}: {error}"
        ) from error
    runner.launch()
    return runner


def warn_of_slow_precision(runner: Fabric, precision: str) -> None:
    """One line, on the first rank, where the CPU would emulate the precision asked for."""
    half = precision == "bf16-mixed" and runner.is_global_zero
    warn_of_slow_bfloat16(runner.device, half, "set optim.precision=32-true")


def settled(recipe: T) -> T:
    """The recipe with `optim.precision` as this machine has it, where that says `auto`."""
    compute, optim = recipe.compute, recipe.optim
    if optim.precision != "auto":
        return recipe
    wanted = compute.accelerator in ("auto", "gpu", "cuda")
    half = wanted and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return resolve(recipe, {"optim.precision": "bf16-mixed" if half else "32-true"})


def launched_processes() -> tuple[int, int] | None:
    """Processes per node and nodes as torchrun or srun started us; None if neither did."""
    if TorchElasticEnvironment.detect():
        return int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["GROUP_WORLD_SIZE"])
    if SLURMEnvironment.detect():
        nodes = int(os.environ.get("SLURM_NNODES", 1))
        return int(os.environ.get("SLURM_NTASKS", 1)) // nodes, nodes
    return None


def sizes(value: int | tuple[int, ...], ndim: int, key: str) -> tuple[int, ...]:
    """One number per axis.

    Raises:
        ConfigError: another number of axes.
    """
    given = (value,) * ndim if isinstance(value, int) else tuple(value)
    if len(given) != ndim or min(given) < 1:
        raise ConfigError(
            f"{key}={value} needs one positive number, or one for each of {ndim} axes"
        )
    return given


def backbone(
    name: str, ndim: int, in_channels: int, options: Mapping[str, Any], classes: int | None = None
) -> Backbone:
    """The named network; segmentation networks get their number of classes."""
    chosen = dict(options)
    if classes is not None and name in SEGMENTATION_NETWORKS:
        chosen["out_channels"] = classes
    return build_backbone(name, ndim, in_channels, **chosen)


SEGMENTATION_NETWORKS = (
    "monai/segresnet",
    "monai/dynunet",
    "monai/mednext_s",
    "monai/mednext_b",
    "monai/mednext_m",
    "monai/mednext_l",
    "nnunet/resenc",
)


def densify_norm(network: nn.Module) -> Literal["bn", "ln", "gn"]:
    """The norm of SparK's densify that goes with an encoder's own: batch, layer or group norm."""
    kinds = [type(m).__name__.lower() for m in network.modules()]
    if any("batchnorm" in kind for kind in kinds):
        return "bn"
    return "gn" if any("groupnorm" in k or "instancenorm" in k for k in kinds) else "ln"


def objective(recipe: PretrainRecipe, synchronised: bool = False) -> Objective:
    """The network, its encoder and the task around it, on the CPU.

    Args:
        recipe: resolved.
        synchronised: batch norms of the encoder take their statistics over all ranks.
    """
    model, section, ndim = recipe.model, recipe.objective, recipe.dims
    net = backbone(model.backbone, ndim, model.in_channels, model.options)
    network = synchronise_norms(net.network) if synchronised else net.network
    encoder = SparseEncoder(network, net.stages, ndim, backend=model.backend)
    if isinstance(section, SparKSection):
        return spark(section, net, encoder)
    if isinstance(section, LocalMIMSection):
        assert recipe.mask.cell_size != "auto", "the recipe is not resolved"
        cell = sizes(recipe.mask.cell_size, ndim, "mask.cell_size")
        return LocalMIM(
            encoder,
            cell,
            model.in_channels,
            section.taps,
            section.target,
            section.width,
            section.kernel,
            hog_settings(section, recipe.data.spacing_mm if ndim > 2 else None),
            section.body,
        )
    return A2MIM(
        encoder,
        model.in_channels,
        section.token_at,
        section.mode,
        section.fourier,
        section.focal,
        section.average_spectrum,
        section.replacement,
        section.visible_weight,
        fill_from_visible=section.fill_from_visible,
        head_norm=section.head_norm,
        detach=section.detach,
        fourier_focal=section.fourier_focal,
        head_rank=section.head_rank,
        add_mean=section.add_mean,
    )


def hog_settings(section: LocalMIMSection, spacing_mm: object) -> HogSettings:
    """How histograms are made; gradients per mm where voxels are not cubes."""
    spacing = None
    if isinstance(spacing_mm, tuple) and max(spacing_mm) > min(spacing_mm):
        spacing = tuple(s / min(spacing_mm) for s in spacing_mm)
    soft = None if section.soft == "auto" else section.soft
    return HogSettings(section.bins, soft, spacing, section.floor)


def spark(section: SparKSection, net: Backbone, encoder: SparseEncoder) -> SparK:
    """SparK with its decoder at full resolution, or the light one that stops before it."""
    width = section.decoder_width
    if section.decoder == "official":
        width = OFFICIAL_WIDTH if width == "auto" else width
        decoder = OfficialDecoder(net.strides, net.in_channels, width, section.decoder_norm)
    else:
        width = light_width(net.channels[-1]) if width == "auto" else width
        stop = section.stop_stride
        stop = None if stop == "auto" else sizes(stop, net.ndim, "objective.stop_stride")
        decoder = LightDecoder(net.strides, net.in_channels, width, stop, section.decoder_norm)
    norm = densify_norm(net.network) if section.densify_norm == "auto" else section.densify_norm
    dense = Densify(net.channels, decoder.widths, net.ndim, norm, decoder.folds)
    return SparK(encoder, dense, decoder, section.eps, section.min_variance, section.flat_weight)


def light_width(deepest: int) -> int:
    """Width of the light decoder under an encoder whose last stage has `deepest` channels.

    Half as many again, in steps of 32, but 256 at most. Beside a small encoder a wider one takes
    most of the step, and in the same time the encoder learns no more (docs/results/decoders.md).
    """
    return min(LIGHT_WIDTH, -(-3 * deepest // 64) * 32)


def network_kind(recipe: FinetuneRecipe) -> dict[str, Any]:
    """What rebuilds the network of a resolved recipe; it stands in the model's card."""
    model = recipe.model
    return {
        "name": model.backbone,
        "ndim": recipe.dims,
        "in_channels": model.in_channels,
        "options": dict(model.options),
        "decoder": {
            "decoder": model.decoder,
            "feature_size": model.feature_size,
            "deep_supervision": model.deep_supervision,
        },
    }


def segmentation_network(kind: Mapping[str, Any], classes: int) -> tuple[nn.Module, Backbone]:
    """The network of a `network_kind`, and the backbone in it.

    Raises:
        ConfigError: parts that do not go together.
    """
    net = backbone(kind["name"], kind["ndim"], kind["in_channels"], network_options(kind), classes)
    return build_segmenter(net, classes, **dict(kind.get("decoder", {}))), net


def network_options(kind: Mapping[str, Any]) -> dict[str, Any]:
    """Options of the backbone of a `network_kind`, with those of deep supervision where it is its
    own.
    """
    name, options, decoder = kind["name"], dict(kind["options"]), kind.get("decoder", {})
    own = name in SEGMENTATION_NETWORKS and decoder.get("decoder", "auto") == "auto"
    if own and decoder.get("deep_supervision", False) and name != "monai/segresnet":
        options["deep_supervision"] = True
        if name == "monai/dynunet":
            options.setdefault("deep_supr_num", len(options.get("strides", (1,) * 5)) - 2)
    return options


@dataclass(frozen=True)
class LoadedSegmenter:
    """A fine-tuned network and how to feed it.

    Attributes:
        network: In evaluation mode, on the CPU: `(b, c, *size)` to logits `(b, k, *size)`.
        spacing_mm: Voxel size it reads.
        window: Maps physical intensities to its range.
        crop: Window of prediction, voxels per axis.
        labels: Name of every foreground class.
        card: All that is known of it.
    """

    network: nn.Module
    spacing_mm: tuple[float, ...]
    window: Window
    crop: tuple[int, ...]
    labels: dict[int, str]
    card: ModelCard


def load_segmenter(path: Path) -> LoadedSegmenter:
    """Rebuild the network of a fine-tuning run (its folder or its `model.safetensors`).

    Raises:
        DataError: files missing or damaged.
        ConfigError: the weights do not fit the network their card describes.
    """
    state, card = load_model(path)
    network, _ = segmentation_network(card.backbone, card.out_channels)
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise ConfigError(f"{path}: weights and card disagree: {error}") from None
    labels = {int(number): name for number, name in card.labels.items()}
    return LoadedSegmenter(
        network.eval(), card.spacing_mm, Window(**card.window), card.crop, labels, card
    )


def segmentation_loss(
    section: LossSection, classes: int, deep_supervision: bool = False
) -> nn.Module:
    """Dice plus cross-entropy on logits `(b, k, *size)` and labels `(b, *size)`."""
    weights = None
    if section.foreground_weight != 1:
        weights = [1.0] + [section.foreground_weight] * (classes - 1)
    loss = DiceCrossEntropy(
        weights,
        section.dice_weight,
        section.ce_weight,
        section.include_background,
        section.batch_dice,
        section.squared,
        section.smooth,
    )
    return DeepSupervision(loss) if deep_supervision else loss


def set_up(
    runner: Fabric,
    module: nn.Module,
    optim: OptimSection,
    slower: Collection[str] = (),
    ratio: float = 1.0,
) -> tuple[nn.Module, Optimizer]:
    """Wrap module and optimiser; `ratio` scales the rates of the `slower` parameters."""
    inside = frozenset(slower)
    groups = parameter_groups(module, lambda name: name in inside, ratio)
    optimizer = build_optimizer(optim.name, groups, optim.lr, optim.betas, optim.momentum)
    return runner.setup(module, optimizer)  # type: ignore[return-value]


def step_settings(optim: OptimSection, step: int) -> tuple[float, float]:
    """Learning rate and weight decay of one step, counted from 0."""
    lr = learning_rate(
        step,
        optim.steps,
        optim.lr,
        optim.warmup,
        optim.schedule,
        optim.warmup_start,
        optim.final,
    )
    return lr, weight_decay(step, optim.steps, optim.weight_decay, optim.weight_decay_end)


def window(section: WindowSection) -> Window:
    """The intensity window of a resolved recipe."""
    return Window(**section.model_dump())


def crop_rule(data: DataSection, labelled: bool) -> CropRule:
    """Crops on the body, or around classes for labelled cases."""
    kind = "balanced" if labelled else "foreground"
    return CropRule(kind, data.body_fraction, data.class_crops, jitter=data.jitter)


def augment(section: AugmentSection, spacing_mm: tuple[float, ...]) -> Augment:
    """The random changes of a crop."""
    affine = Affine(
        section.affine,
        section.degrees,
        section.zoom,
        section.stretch,
        spacing_mm,
        margin=0.25 if section.affine else 0.0,
    )
    intensity = Intensity(section.intensity, section.scale, section.shift, section.noise)
    return Augment(affine, Flips(section.flips, section.swap), intensity, Turns(section.rot90))
