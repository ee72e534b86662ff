"""What fine-tuning reads: labelled cases, their split, encoder weights, the stream of crops."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor

from spark3d import build
from spark3d.commands.command_line import without_paths
from spark3d.commands.inputs import one_hash, stream
from spark3d.commands.splitting import check_overlap, split_cases
from spark3d.commands.stores import (
    check_crop,
    fixed,
    open_store,
    padding_notes,
    planned,
    shared_batch,
    volume_crops,
)
from spark3d.config import FinetuneRecipe, resolve, to_tree
from spark3d.data.checks import check_label_names
from spark3d.data.intensity import Window
from spark3d.data.loader import VolumeCrops
from spark3d.data.names import shown
from spark3d.data.plan import suggest_plan
from spark3d.data.record import CaseRecord
from spark3d.data.store import Store
from spark3d.data.stream import Sample
from spark3d.errors import ConfigError, DataError
from spark3d.weights.exchange import encoder_file, load_encoder
from spark3d.weights.options import merged_options
from spark3d.weights.passport import Passport
from spark3d.weights.segmenters import ModelCard


@dataclass(frozen=True)
class FinetuneInputs:
    """Everything a fine-tuning run reads, resolved.

    Attributes:
        recipe: without any `auto`.
        store: of the labelled cases.
        crops: the numbered stream of training crops.
        train: ids of the training cases.
        validation: ids of the validation cases.
        test: ids of the labelled test cases, which are kept apart.
        labels: name of every foreground class.
        scored: those of them that are scored.
        weights: encoder weights and their passport; None for a start from scratch.
        notes: what was chosen from the data, and why; for the screen.
        overlap: what the encoder has seen of each part, and which leaks were allowed.
    """

    recipe: FinetuneRecipe
    store: Store
    crops: VolumeCrops
    train: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]
    labels: dict[int, str]
    scored: dict[int, str]
    weights: tuple[dict[str, Tensor], Passport] | None
    notes: tuple[str, ...]
    overlap: dict[str, Any]

    @property
    def classes(self) -> int:
        """Channels of the output, background included."""
        return max(self.labels) + 1

    @property
    def window(self) -> Window:
        """From physical intensities to what the network reads."""
        return build.window(fixed(self.recipe.data.window))

    @property
    def crop(self) -> tuple[int, ...]:
        """Voxels per axis."""
        return build.sizes(fixed(self.recipe.data.crop), self.recipe.dims, "data.crop")

    def identity(self) -> dict[str, Any]:
        """What, beside the recipe, fixes the result."""
        return {
            "encoder": self.weights[1].sha256 if self.weights else None,
            "train": list(self.train),
            "validation": list(self.validation),
            "data": one_hash([self.store.voxel_hash(c) for c in (*self.train, *self.validation)]),
            **({"test": list(self.test)} if self.test else {}),
            **({"overlap": self.overlap} if self.overlap else {}),
        }

    def batches(self, done: int, rank: int, world: int) -> Iterator[Sample]:
        """Batches of the steps after `done`."""
        return stream(self.recipe, self.crops, done, rank, world)

    def first_crops(self) -> Tensor:
        """The first crops of the stream, `(8, c, *size)`."""
        return torch.stack([self.crops[number]["crop"] for number in range(8)])

    def whole(self, case: str) -> tuple[Tensor, np.ndarray]:
        """A case as the network reads it, `(c, *size)`, and its label map, on the store's grid."""
        record, window = self.store.record(case), self.window
        volume = window.apply(self.store.read(case), record.mean, record.std)
        return torch.from_numpy(volume), self.store.read_label(case)

    def outside(self, case: str) -> tuple[float, ...]:
        """What lies outside of a case as the network reads it, per channel."""
        record = self.store.record(case)
        return self.window.outside(record.minimum, record.mean, record.std)

    def card(self) -> ModelCard:
        """What travels with the fine-tuned model."""
        data = self.recipe.data
        seen = self.weights[1] if self.weights else None
        recipe = self.recipe
        if self.scored != self.labels:
            recipe = resolve(recipe, {"score.labels": list(self.scored)})
        return ModelCard(
            backbone=build.network_kind(self.recipe),
            out_channels=self.classes,
            labels={str(number): name for number, name in self.labels.items()},
            spacing_mm=self.store.spacing_mm,
            window=to_tree(fixed(data.window)),
            crop=self.crop,
            swap=data.augment.swap,
            encoder=seen.sha256 if seen else "",
            pretrained_on=seen.content_hashes if seen else (),
            trained_on=tuple(self.store.record(case).content_hash for case in self.train),
            recipe=to_tree(without_paths(recipe)),
            modality=_modality(self.store.record(case).modality for case in self.train),
        )


def _modality(kinds: Iterable[str]) -> Literal["auto", "CT", "MR"]:
    """The one modality of the training volumes; of several none is named."""
    found = set(kinds)
    return "CT" if found == {"CT"} else "MR" if found == {"MR"} else "auto"


def finetune_inputs(
    recipe: FinetuneRecipe,
    data: Path,
    out: Path,
    encoder: Path | None,
    fabric: Fabric,
    allow_overlap: bool,
) -> FinetuneInputs:
    """Open (or prepare) the data, split it, choose what the recipe leaves open."""
    weights = load_encoder(encoder_file(encoder)) if encoder else None
    recipe, notes = plan_from_encoder(recipe, weights[1] if weights else None)
    model = recipe.model
    unit = build.backbone(model.backbone, recipe.dims, model.in_channels, model.options).stride
    store, why = open_store(data, out, recipe.data.spacing_mm, fabric)
    labelled = [r for r in store.cases if r.has_label]
    if not labelled:
        raise DataError(f"{shown(data)} has no labelled case; see `spark3d prepare --help`")
    parts = split_cases(recipe.split, store.cases)
    overlap = check_overlap(parts, weights[1] if weights else None, allow_overlap)
    train, validation = parts.train, parts.validation
    check_channels(recipe, [*train, *validation])
    recipe, reasons = plan_finetuning(recipe, store, train, unit, fabric.world_size)
    labels = label_names(store, labelled)
    scored = scored_labels(recipe, parts.scored, labels)
    check_swap(recipe, labels)
    crops = volume_crops(store, train, recipe, labelled=True)
    notes += [
        f"spacing {' x '.join(f'{s:g}' for s in store.spacing_mm)} mm: {why}",
        *reasons,
        *padding_notes(crops),
        *([parts.note] if parts.note else []),
        f"{len(train)} training and {len(validation)} validation cases, labels {labels}",
    ]
    test = [r for r in parts.test if r.has_label]
    learnt, held, kept = (tuple(r.id for r in part) for part in (train, validation, test))
    return FinetuneInputs(
        recipe, store, crops, learnt, held, kept, labels, scored, weights, tuple(notes), overlap
    )


def plan_finetuning(
    recipe: FinetuneRecipe,
    store: Store,
    train: Sequence[CaseRecord],
    unit: tuple[int, ...],
    world: int,
) -> tuple[FinetuneRecipe, list[str]]:
    """Replace what is still `auto`; crops are whole multiples of the network's stride `unit`."""
    plan = suggest_plan(train, store.spacing_mm, unit)
    changes, reasons = planned(recipe.data, plan)
    changes["optim.batch"] = shared_batch(
        recipe.optim.batch, plan.batch, world, recipe.optim.accumulate
    )
    resolved = resolve(recipe, {"data.spacing_mm": store.spacing_mm, **changes})
    crop = build.sizes(fixed(resolved.data.crop), resolved.dims, "data.crop")
    check_crop(crop, unit, "data.crop", "the network's stride ")
    return resolved, reasons


def scored_labels(
    recipe: FinetuneRecipe, of_split: Sequence[int], labels: Mapping[int, str]
) -> dict[int, str]:
    """The labels that are scored: those of the recipe, else those that its split names, else all.

    Raises:
        ConfigError: labels that the data do not have.
    """
    chosen = recipe.score.labels or tuple(of_split)
    if strange := sorted(set(chosen) - labels.keys()):
        known = ", ".join(f"{k} {name}" for k, name in labels.items())
        raise ConfigError(
            f"score.labels={list(chosen)}: the data have no label {', '.join(map(str, strange))}; "
            f"choose from {known}"
        )
    return {k: name for k, name in labels.items() if not chosen or k in chosen}


def check_swap(recipe: FinetuneRecipe, labels: Mapping[int, str]) -> None:
    """Refuse pairs of left and right that are no labels of the data.

    Raises:
        ConfigError: names the key to set.
    """
    pairs = recipe.data.augment.swap
    if strange := sorted({label for pair in pairs for label in pair} - labels.keys()):
        raise ConfigError(
            f"data.augment.swap={[list(pair) for pair in pairs]}: the data have no label "
            f"{', '.join(map(str, strange))}; set it to the pairs of these data, or to []"
        )


def check_channels(recipe: FinetuneRecipe, records: Sequence[CaseRecord]) -> None:
    """Refuse volumes with other channels than the network reads.

    Raises:
        ConfigError: names the key to set.
    """
    channels = sorted({r.channels for r in records})
    if channels != [recipe.model.in_channels]:
        raise ConfigError(
            f"the volumes have {channels} channels, the recipe model.in_channels="
            f"{recipe.model.in_channels}; set it, or leave out the cases that differ"
        )


def plan_from_encoder(
    recipe: FinetuneRecipe, passport: Passport | None
) -> tuple[FinetuneRecipe, list[str]]:
    """Take backbone, spacing and window from the passport where the recipe says `auto`.

    Options of the network are the passport's, and those of the recipe beside them.

    Raises:
        ConfigError: weights of another network, or of one with other options.
    """
    if passport is None:
        if recipe.model.backbone == "auto":
            return resolve(recipe, {"model.backbone": "monai/segresnet"}), []
        return recipe, []
    changes: dict[str, Any] = {}
    if recipe.model.backbone not in ("auto", passport.backbone):
        raise ConfigError(
            f"the encoder is {passport.backbone}, the recipe model.backbone={recipe.model.backbone}"
            "; leave model.backbone out, or give an encoder of that network"
        )
    if passport.ndim != recipe.dims:
        raise ConfigError(
            f"the encoder was pre-trained in {passport.ndim}D, fine-tuning is in {recipe.dims}D; "
            f"give an encoder that was pre-trained with dims={recipe.dims}"
        )
    options = merged_options(passport, recipe.model.options)
    if recipe.model.backbone == "auto":
        changes["model.backbone"] = passport.backbone
    if options != recipe.model.options:
        changes["model.options"] = options
    if recipe.data.spacing_mm == "auto" and passport.spacing_mm:
        changes["data.spacing_mm"] = passport.spacing_mm
    if recipe.data.window == "auto" and "mode" in passport.intensity:
        changes["data.window"] = dict(passport.intensity)
    notes = [f"{key}={value}: as the encoder was pre-trained" for key, value in changes.items()]
    return resolve(recipe, changes), notes


def label_names(store: Store, labelled: Sequence[CaseRecord]) -> dict[int, str]:
    """Names by class number: those of the data set, else `class 1`, `class 2`, ...

    Raises:
        DataError: labels that nothing declares do not count 0, 1, 2, ... without gaps.
    """
    names = {value: name for name, value in (store.settings["labels"] or {}).items()}
    present = sorted({value for r in labelled for value in r.labels or () if value > 0})
    if not names:
        check_label_names({f"class {value}": value for value in (0, *present)}, store.folder)
    return {value: names.get(value, f"class {value}") for value in sorted({*present, *names} - {0})}
