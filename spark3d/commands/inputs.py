"""What pre-training reads: cases or images, the plan made from them, the stream of crops."""

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import lcm
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor

from spark3d import build
from spark3d.commands.command_line import without_paths
from spark3d.commands.image_folders import scan_folder, scan_notes
from spark3d.commands.stores import (
    check_crop,
    fixed,
    open_store,
    padding_notes,
    planned,
    shared_batch,
    some,
    volume_crops,
)
from spark3d.config import (
    DataSection,
    FinetuneRecipe,
    ImagesSection,
    PretrainRecipe,
    resolve,
    to_tree,
)
from spark3d.data.images2d import ImageCrops, ImageFolder
from spark3d.data.names import shown
from spark3d.data.plan import suggest_plan
from spark3d.data.record import CaseRecord
from spark3d.data.splits import named_split, split_names
from spark3d.data.store import Store
from spark3d.data.stream import Numbered, Sample, batches
from spark3d.errors import ConfigError, DataError
from spark3d.sparse.geometry import pad_crops, padded_size
from spark3d.sparse.mask import CellMask, random_mask
from spark3d.weights.passport import Passport

log = logging.getLogger(__name__)

BODY_VARIANCE = 1e-4
"""A cell that varies less, in the network's range squared, is air for body-aware masks."""


@dataclass(frozen=True)
class PretrainInputs:
    """Everything a pre-training run reads, resolved.

    Attributes:
        recipe: without any `auto`.
        crops: the numbered stream.
        hashes: content hashes of the volumes or images in it.
        identity: one hash over all that is read.
        spacing_mm: of the store; None for images.
        notes: what was chosen from the data, and why; for the screen.
        images: the scanned folder; None for volumes.
        patients: keyed hashes of the patients of the volumes, as far as they are known.
    """

    recipe: PretrainRecipe
    crops: Numbered
    hashes: tuple[str, ...]
    identity: str
    spacing_mm: tuple[float, ...] | None
    notes: tuple[str, ...]
    images: ImageFolder | None = None
    patients: tuple[str, ...] = ()

    @property
    def layout(self) -> torch.memory_format:
        """Of pixels in memory: channels last is what convolutions in 2D are fastest with."""
        return torch.channels_last if self.recipe.dims == 2 else torch.contiguous_format

    @property
    def cell_size(self) -> tuple[int, ...]:
        """Voxels of a cell per axis."""
        return build.sizes(fixed(self.recipe.mask.cell_size), self.recipe.dims, "mask.cell_size")

    @cached_property
    def padded_to(self) -> tuple[int, ...]:
        """What crops are made multiples of, per axis; ones where the recipe does not pad."""
        return crop_unit(self.recipe) if self.recipe.mask.pad else (1,) * self.recipe.dims

    @property
    def crop(self) -> tuple[int, ...]:
        """Voxels of a crop per axis, padding included."""
        asked = build.sizes(fixed(self.recipe.data.crop), self.recipe.dims, "data.crop")
        return padded_size(asked, self.padded_to)

    def batches(self, done: int, rank: int, world: int) -> Iterator[Sample]:
        """Batches of the steps after `done`, padded where the recipe says so."""
        for batch in stream(self.recipe, self.crops, done, rank, world):
            yield {**batch, "crop": pad_crops(batch["crop"], self.padded_to)}

    def mask(self, batch: Sample, rng: torch.Generator, rank: int = 0, world: int = 1) -> CellMask:
        """Which cells of a batch are visible; body-aware where the recipe says so.

        Drawn for the batches of all ranks, of which this rank keeps its own, so that a sample's
        mask does not depend on the number of ranks.
        """
        recipe, crop, cell = self.recipe, batch["crop"], self.cell_size
        grid = tuple(n // c for n, c in zip(crop.shape[2:], cell, strict=True))
        mine = slice(rank * len(crop), (rank + 1) * len(crop))
        body = None
        if recipe.mask.body_aware:
            body = torch.zeros(world * len(crop), *grid, dtype=torch.bool)
            body[mine] = body_cells(crop, cell)
        drawn = random_mask(world * len(crop), grid, recipe.mask.ratio, cell, rng, body)
        return CellMask(drawn.visible[mine], cell, drawn.n_visible)

    def passport(self) -> Passport:
        """What travels with the encoder weights."""
        recipe = self.recipe
        images = recipe.dims == 2
        return Passport(
            backbone=recipe.model.backbone,
            ndim=recipe.dims,
            in_channels=recipe.model.in_channels,
            options=recipe.model.options,
            axes="" if images else "RAS",
            spacing_mm=self.spacing_mm,
            intensity={"normalise": "imagenet"} if images else to_tree(fixed(recipe.data.window)),
            objective=recipe.objective.name,
            recipe=to_tree(without_paths(recipe)),
            content_hashes=self.hashes,
            patient_hashes=self.patients,
            steps=recipe.optim.steps,
        )


def body_cells(crop: Tensor, cell: Sequence[int]) -> Tensor:
    """True for cells of `(b, c, *size)` whose voxels vary, `(b, *grid)`: tissue rather than air."""
    split = crop
    for axis, side in enumerate(cell):
        split = split.unflatten(2 + 2 * axis, (-1, side))
    inner = [1, *range(3, split.ndim, 2)]
    return split.float().var(dim=inner) > BODY_VARIANCE


def stream(
    recipe: PretrainRecipe | FinetuneRecipe, crops: Numbered, done: int, rank: int, world: int
) -> Iterator[Sample]:
    """The batches of a run after `done` steps, for one rank."""
    optim, compute = recipe.optim, recipe.compute
    pinned = torch.cuda.is_available()
    return batches(
        crops, fixed(optim.batch), done, optim.steps, compute.workers, rank, world, pinned
    )


def pretrain_inputs(
    recipe: PretrainRecipe, data: Path, out: Path, exclude: Path | None, fabric: Fabric
) -> PretrainInputs:
    """Open (or prepare) the data, choose what the recipe leaves to them, and build the stream.

    Cases that the data set lists for validation or testing are never read, nor those that
    `exclude` names.
    """
    check_early(recipe)
    if recipe.dims == 2:
        if exclude is not None:
            raise ConfigError(
                f"--exclude {exclude} is about volumes; for images give --data a folder without "
                "those that are not to be read"
            )
        return image_inputs(recipe, data, out, fabric)
    barred = excluded_ids(exclude)
    store, why = open_store(data, out, recipe.data.spacing_mm, fabric)
    if exclude and not barred & {r.id for r in store.cases}:
        raise DataError(
            f"--exclude {exclude} names no case of {shown(data)}, only "
            f"{some(sorted(barred)) or 'nothing'}; ids there are like {store.cases[0].id}"
        )
    if strange := sorted(barred - {r.id for r in store.cases}):
        log.warning(
            "--exclude names %d ids that no case has: %s; correct them if the cases are here under "
            "another id", len(strange), some([shown(name) for name in strange]),
        )  # fmt: skip
    records = [r for r in store.cases if r.section not in HELD_OUT and r.id not in barred]
    if not records:
        raise DataError(
            f"{shown(data)}: every case is for validation or excluded, none is left to train on"
        )
    recipe, notes = plan_pretraining(recipe, store, records, fabric.world_size)
    crops = volume_crops(store, records, recipe, labelled=False)
    notes = [
        f"{len(records)} of {len(store)} cases, for pre-training",
        f"spacing {' x '.join(f'{s:g}' for s in store.spacing_mm)} mm: {why}",
        *notes,
        *padding_notes(crops),
    ]
    hashes = tuple(r.content_hash for r in records)
    patients = tuple(sorted({r.patient for r in records if r.patient}))
    identity = one_hash(hashes)
    return PretrainInputs(
        recipe, crops, hashes, identity, store.spacing_mm, tuple(notes), patients=patients
    )


def check_early(recipe: PretrainRecipe) -> None:
    """Refuse what is wrong whatever the data are, before hours go into preparing them."""
    check_sections(recipe)
    unit = crop_unit(recipe)
    crop, key = recipe.data.crop, "data.crop"
    if recipe.dims == 2:
        asked, crop, key = crop, recipe.images.crop, "images.crop"
        if asked != "auto" and build.sizes(asked, 2, "data.crop") != build.sizes(crop, 2, key):
            raise ConfigError(
                f"data.crop={asked} is for volumes, images are cut to images.crop={crop}; leave "
                "data.crop out, or set images.crop"
            )
    if crop != "auto":
        size = build.sizes(crop, recipe.dims, key)
        size = padded_size(size, unit) if recipe.mask.pad else size
        name = "cells and strides of " if unit != network_stride(recipe) else "mask.cell_size="
        check_crop(size, unit, key, name, otherwise=", or set mask.pad=true")
        check_crop(size, network_stride(recipe), key, "mask.cell_size=", least=2)


def check_sections(recipe: PretrainRecipe) -> None:
    """Refuse settings of volumes for images and of images for volumes, which would do nothing.

    `data.crop` has a check of its own: a resolved recipe for images repeats `images.crop` there.
    """
    images = recipe.dims == 2
    name = "data" if images else "images"
    given, plain = (recipe.data, DataSection()) if images else (recipe.images, ImagesSection())
    usual = dict(plain)
    unused = [
        f"{name}.{key}"
        for key, value in given
        if value != usual[key] and not (images and key == "crop")
    ]
    if unused:
        told = (
            "for volumes, images have images.crop, images.scale and images.flip"
            if images
            else "for 2D images, volumes have data.crop and data.augment"
        )
        raise ConfigError(f"dims={recipe.dims}, but {', '.join(unused)}: {told}; leave it out")


def crop_unit(recipe: PretrainRecipe) -> tuple[int, ...]:
    """What crops must be multiples of: the cells, and the network's stride where it is larger."""
    model, cell = recipe.model, network_stride(recipe)
    if model.backend == "packed" or recipe.mask.cell_size == "auto":
        return cell
    net = build.backbone(model.backbone, recipe.dims, model.in_channels, model.options)
    return tuple(lcm(c, s) for c, s in zip(cell, net.stride, strict=True))


def one_hash(parts: Sequence[str]) -> str:
    """One hash over many, whatever their order."""
    return hashlib.sha256("\n".join(sorted(parts)).encode()).hexdigest()


def image_inputs(recipe: PretrainRecipe, data: Path, out: Path, fabric: Fabric) -> PretrainInputs:
    """Scan a folder of ordinary images and build their stream."""
    if recipe.model.in_channels != 3:
        raise ConfigError(
            f"images have 3 channels, the recipe model.in_channels={recipe.model.in_channels}; "
            "set model.in_channels=3"
        )
    section, workers = recipe.images, recipe.compute.workers
    images = scan_folder(data, "data", out, section.max_bad, workers, fabric)
    notes = scan_notes(images)
    cell = network_stride(recipe)
    changes: dict[str, Any] = {"mask.cell_size": cell, "data.crop": section.crop}
    changes["optim.batch"] = shared_batch(recipe.optim.batch, IMAGE_BATCH, fabric.world_size)
    if recipe.optim.batch == "auto":
        notes.append(f"batch {changes['optim.batch']}: set optim.batch to what the memory holds")
    recipe = resolve(recipe, changes)
    crop = build.sizes(section.crop, 2, "images.crop")
    crops = ImageCrops(images, crop, recipe.seed, section.scale, section.flip)
    identity = images.identity
    return PretrainInputs(recipe, crops, images.hashes, identity, None, tuple(notes), images)


IMAGE_BATCH = 32


def network_stride(recipe: PretrainRecipe) -> tuple[int, ...]:
    """Voxels of a cell per axis: as the recipe says, else the encoder's total stride."""
    model, ndim = recipe.model, recipe.dims
    if recipe.mask.cell_size != "auto":
        return build.sizes(recipe.mask.cell_size, ndim, "mask.cell_size")
    return build.backbone(model.backbone, ndim, model.in_channels, model.options).stride


HELD_OUT = ("validation", "test")


def excluded_ids(path: Path | None) -> frozenset[str]:
    """Case ids of a text file, one a line; or those that a named split keeps from training.

    Raises:
        ConfigError: a file of folds, as nobody says which.
        DataError: a file that cannot be read, or is no split.
    """
    if path is None:
        return frozenset()
    if str(path) in split_names() or path.suffix == ".json":
        try:
            split = named_split(str(path))
        except ConfigError:
            raise ConfigError(
                f"--exclude {path} holds folds, of which each keeps other cases from training; "
                "give a text file of the ids that are never to be read, one a line"
            ) from None
        return frozenset((*split.validation, *split.test))
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read --exclude {path}: {error}") from None
    return frozenset(line.strip() for line in lines if line.strip())


def plan_pretraining(
    recipe: PretrainRecipe, store: Store, records: Sequence[CaseRecord], world: int
) -> tuple[PretrainRecipe, list[str]]:
    """Replace every `auto` of the recipe by a value chosen from the data, with the reason."""
    model, cell = recipe.model, network_stride(recipe)
    channels = {r.channels for r in records}
    if channels != {model.in_channels}:
        raise ConfigError(
            f"the volumes have {sorted(channels)} channels, the recipe model.in_channels="
            f"{model.in_channels}; set it, or leave out the cases that differ"
        )
    plan = suggest_plan(records, store.spacing_mm, crop_unit(recipe))
    changes, notes = planned(recipe.data, plan)
    if recipe.mask.cell_size == "auto":
        changes["mask.cell_size"] = cell
        notes.append(f"cells of {cell} voxels: the total stride of {model.backbone}")
    changes["optim.batch"] = shared_batch(recipe.optim.batch, plan.batch, world)
    if recipe.optim.batch == "auto":
        notes.append(f"batch {changes['optim.batch']}: {plan.reasons['batch']}")
    return resolve(recipe, {"data.spacing_mm": store.spacing_mm, **changes}), notes
