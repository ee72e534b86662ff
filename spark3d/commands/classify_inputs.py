"""What classification reads: labelled images in two parts, encoder weights, the stream of crops."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor

from spark3d import build_images
from spark3d.classify_recipe import ClassifyRecipe
from spark3d.commands.image_folders import part_folder, scan_folder, scan_notes
from spark3d.commands.image_overlap import check_image_overlap
from spark3d.commands.stores import fixed, shared_batch
from spark3d.config import resolve, to_tree
from spark3d.data.images2d import ImageFolder
from spark3d.data.labelled_images import (
    LabelledImages,
    TrainingImages,
    ValidationImages,
    check_same_classes,
    label_by_folder,
)
from spark3d.data.stream import Sample, batches
from spark3d.errors import ConfigError
from spark3d.weights.classifiers import ClassifierCard
from spark3d.weights.exchange import load_encoder
from spark3d.weights.options import merged_options
from spark3d.weights.passport import Passport

BATCH = 64
PARTS = ("train", "val")


@dataclass(frozen=True)
class ClassifyInputs:
    """Everything a classification run reads, resolved.

    Attributes:
        recipe: without any `auto`.
        train: the labelled training images in use.
        crops: their numbered stream.
        validation: the validation images.
        weights: encoder weights and their passport; None for a start from scratch.
        scans: what was found in the folders, by part.
        notes: what was found and chosen; for the screen.
        overlap: what the encoder has seen of each part, and which leaks were allowed.
    """

    recipe: ClassifyRecipe
    train: LabelledImages
    crops: TrainingImages
    validation: ValidationImages
    weights: tuple[dict[str, Tensor], Passport] | None
    scans: dict[str, ImageFolder]
    notes: tuple[str, ...]
    overlap: dict[str, Any]

    @property
    def classes(self) -> tuple[str, ...]:
        """Names, in the order of the network's outputs."""
        return self.train.classes

    @property
    def batch(self) -> int:
        """Images a step over all ranks."""
        return fixed(self.recipe.optim.batch)

    def identity(self) -> dict[str, Any]:
        """What, beside the recipe, fixes the result."""
        parts = {part: images.identity for part, images in self.scans.items()}
        encoder = self.weights[1].sha256 if self.weights else None
        record = {"encoder": encoder, **parts, "images": len(self.train.files)}
        return {**record, **({"overlap": self.overlap} if self.overlap else {})}

    def batches(self, done: int, rank: int, world: int) -> Iterator[Sample]:
        """Batches of the steps after `done`."""
        recipe = self.recipe
        return batches(
            self.crops,
            self.batch,
            done,
            recipe.optim.steps,
            recipe.compute.workers,
            rank,
            world,
            pin_memory=torch.cuda.is_available(),
        )

    def validation_batches(self, rank: int, world: int) -> Iterator[Sample]:
        """Every validation image once, in batches as large as those of training."""
        steps = -(-len(self.validation) // self.batch)
        workers = self.recipe.compute.workers
        pinned = torch.cuda.is_available()
        return batches(self.validation, self.batch, 0, steps, workers, rank, world, pinned)

    @property
    def validate_every(self) -> int:
        """Steps from one validation to the next."""
        return self.recipe.log.validate_every or max(1, round(len(self.train.files) / self.batch))

    def card(self) -> ClassifierCard:
        """What travels with the classifier."""
        recipe, model = self.recipe, self.recipe.model
        return ClassifierCard(
            backbone=model.backbone,
            options=dict(model.options),
            classes=self.classes,
            crop=build_images.crop_size(recipe),
            evaluation_share=recipe.images.evaluation_share,
            intensity={"normalise": "imagenet"},
            average=recipe.optim.ema,
            encoder=self.weights[1].sha256 if self.weights else "",
            recipe=to_tree(recipe),
        )


def classify_inputs(
    recipe: ClassifyRecipe,
    data: Path,
    out: Path,
    encoder: Path | None,
    fabric: Fabric,
    allow_overlap: bool,
) -> ClassifyInputs:
    """Scan both parts, compare them with each other and with what the encoder has seen."""
    weights = load_encoder(encoder) if encoder else None
    recipe, notes = plan_from_encoder(recipe, weights[1] if weights else None)
    recipe = resolve(
        recipe, {"optim.batch": shared_batch(recipe.optim.batch, BATCH, fabric.world_size)}
    )
    folders = {part: part_folder(data, part) for part in PARTS}
    section = recipe.images
    scans = {
        part: scan_folder(folder, part, out, section.max_bad, recipe.compute.workers, fabric)
        for part, folder in folders.items()
    }
    train, validation = (label_by_folder(scans[part]) for part in PARTS)
    check_same_classes(train, validation)
    for part, name in (("train", "training"), ("val", "validation")):
        notes += scan_notes(scans[part], name)
    if section.per_class is not None:
        train = train.few(section.per_class, section.subset_seed)
        notes.append(
            f"{section.per_class} training images of each class, {len(train.files)} in all"
        )
    overlap = check_image_overlap(train, validation, weights[1] if weights else None, allow_overlap)
    notes.append(f"{len(train.classes)} classes; batch {recipe.optim.batch}")
    mixing = build_images.mixing(recipe, len(train.classes))
    mixing.check(fixed(recipe.optim.batch) // fabric.world_size)
    return ClassifyInputs(
        recipe,
        train,
        build_images.training_images(recipe, train),
        build_images.validation_images(recipe, validation),
        weights,
        scans,
        tuple(notes),
        overlap,
    )


def plan_from_encoder(
    recipe: ClassifyRecipe, passport: Passport | None
) -> tuple[ClassifyRecipe, list[str]]:
    """Take the network from the passport where the recipe says `auto`, and its options.

    Raises:
        ConfigError: weights of another network, of one with other options, of volumes, or of images
            without colours.
    """
    model = recipe.model
    if passport is None:
        if model.backbone == "auto":
            return resolve(recipe, {"model.backbone": "timm/resnet50"}), []
        return recipe, []
    if passport.ndim != recipe.dims or passport.in_channels != 3:
        raise ConfigError(
            f"the encoder was pre-trained in {passport.ndim}D with {passport.in_channels} "
            "channels, images are 2D with 3; give an encoder of `spark3d pretrain --dims 2`"
        )
    if model.backbone not in ("auto", passport.backbone):
        raise ConfigError(
            f"the encoder is {passport.backbone}, the recipe model.backbone={model.backbone}; "
            "leave model.backbone out, or give an encoder of that network"
        )
    options = merged_options(passport, model.options)
    if "drop_path_rate" not in model.options:  # a rate for pre-training is none for fine-tuning
        options.pop("drop_path_rate", None)
    changes: dict[str, Any] = {}
    if model.backbone == "auto":
        changes["model.backbone"] = passport.backbone
    if options != model.options:
        changes["model.options"] = options
    notes = [f"{key}={value}: as the encoder was pre-trained" for key, value in changes.items()]
    return resolve(recipe, changes), notes
