"""Every recipe, in reading order: load YAML, apply `section.key=value`, save what was resolved.

The sections `data mask model objective optim loss` change results; `compute log probe` never do.
A value of `auto` is chosen from the data by the command, shown, and written into the run's resolved
recipe.
"""

import difflib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from spark3d.errors import ConfigError
from spark3d.recipe_files import apply_override, find_recipe, read_yaml
from spark3d.recipe_sections import (
    AugmentSection,
    Auto,
    LossSection,
    ObjectiveSection,
    ProbeSection,
    ProtocolSection,
    ScoreSection,
    Section,
    SegmentationAugmentSection,
    Sizes,
    SparKSection,
)

__all__ = ["find_recipe", "read_yaml"]

NEUTRAL = ("compute", "log", "probe")
"""Sections that never change results."""
Seed = Annotated[int, Field(ge=0)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Batch = Auto | Annotated[int, Field(ge=1)]


class WindowSection(Section):
    """Intensity window: `unit` maps `low..high` (HU for CT) to `0..scale`; see `data.intensity`."""

    mode: Literal["unit", "zscore"] = "unit"
    low: float | None = None
    high: float | None = None
    scale: float = Field(default=1.0, gt=0)
    mean: float | None = None
    std: float | None = None


class DataSection(Section):
    """What is read and how it is cut.

    A share `class_crops` of labelled crops is centred on a voxel of a class, within `jitter` of the
    crop; others hold at least `body_fraction` of body where that can be. `crops_per_case` crops in
    a row come from one case.
    """

    spacing_mm: Auto | tuple[float, ...] = "auto"
    window: Auto | WindowSection = "auto"
    crop: Auto | Sizes = "auto"
    body_fraction: float = Field(default=0.3, ge=0, le=1)
    class_crops: float = Field(default=2 / 3, ge=0, le=1)
    jitter: float = Field(default=0.25, ge=0, le=0.5)
    crops_per_case: int = Field(default=1, ge=1)
    augment: AugmentSection = AugmentSection()


class FinetuneDataSection(DataSection):
    """The same with the augmentation of fine-tuning."""

    augment: SegmentationAugmentSection = SegmentationAugmentSection()  # pyright: ignore


class ImagesSection(Section):
    """2D images: crop side, scale range of the random resized crop, chance of a mirror image."""

    crop: Sizes = 224
    scale: tuple[float, float] = (0.67, 1.0)
    flip: float = Field(default=0.5, ge=0, le=1)
    max_bad: float = Field(default=0.01, ge=0, le=1)


class MaskSection(Section):
    """Which cells are hidden; `cell_size: auto` is the encoder's total stride.

    `pad` makes crops whose size is no multiple of the cells longer, with dark voxels at their end,
    where they are refused otherwise.
    """

    ratio: float = Field(default=0.6, gt=0, lt=1)
    cell_size: Auto | Sizes = "auto"
    body_aware: bool = False
    pad: bool = False


class ModelSection(Section):
    """The encoder (`library/name`) with its own options."""

    backbone: str = "monai/segresnet"
    options: dict[str, Any] = Field(default_factory=dict)
    in_channels: int = Field(default=1, ge=1)
    backend: Literal["packed", "reference"] = "packed"


class OptimSection(Section):
    """Optimiser and schedule. Steps are optimiser steps; `batch` is the global batch.

    `precision: auto` is bf16-mixed on a GPU that has bfloat16, else 32-true.
    """

    name: Literal["adamw", "lamb", "sgd"] = "adamw"
    lr: float = Field(default=1e-3, gt=0)
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    momentum: float = Field(default=0.99, ge=0, lt=1)
    weight_decay: float = Field(default=0.05, ge=0)
    weight_decay_end: float | None = None
    schedule: Literal["cosine", "poly", "constant"] = "cosine"
    steps: int = Field(default=3000, ge=1)
    warmup: int = Field(default=200, ge=0)
    warmup_start: float = Field(default=0.005, ge=0, le=1)
    final: float = Field(default=0.001, ge=0, le=1)
    batch: Batch = "auto"
    clip: float = Field(default=5.0, gt=0)
    precision: Auto | Literal["32-true", "bf16-mixed"] = "32-true"

    @model_validator(mode="before")
    @classmethod
    def _no_ratio_of_one(cls, tree: Any) -> Any:
        """Resolved recipes may say `encoder_lr_ratio: 1.0`, which changes nothing anywhere."""
        if isinstance(tree, dict) and tree.get("encoder_lr_ratio") == 1:
            return {key: value for key, value in tree.items() if key != "encoder_lr_ratio"}
        return tree


class FinetuneOptimSection(OptimSection):
    """The same with what fine-tuning adds.

    `encoder_lr_ratio`, `layer_decay` and `freeze_steps` concern weights that came from an encoder:
    their rates are multiplied by `encoder_lr_ratio`, by `layer_decay` once for the deepest stage
    and once more for every finer one, and they stay as they are for the first `freeze_steps` steps.
    `ema` is the decay of a running average of the weights, which is then what is validated, saved
    and used to predict (0: none). `accumulate` splits the batch of a step into that many shares,
    which takes less memory; losses that normalise over the batch then do so over a share.
    """

    lr: float = Field(default=3e-3, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    steps: int = Field(default=600, ge=1)
    warmup: int = Field(default=60, ge=0)
    batch: Batch = 2
    encoder_lr_ratio: float = Field(default=1.0, gt=0)
    layer_decay: float = Field(default=1.0, gt=0, le=1)
    freeze_steps: int = Field(default=0, ge=0)
    ema: float = Field(default=0.0, ge=0, lt=1)
    accumulate: int = Field(default=1, ge=1)


class ComputeSection(Section):
    """Where and how fast; never what. Devices and ranks are those of Lightning Fabric.

    Several ranks draw the samples and masks of one. What is taken over a batch is each rank's own,
    over its share: statistics of batch norms (but for the encoder's on GPUs), the cells that
    `objective.min_variance` leaves out of the mean, the spectrum of `objective.average_spectrum`
    (A2MIM), and what `loss.batch_dice` and `loss.foreground_weight` normalise by.
    """

    accelerator: str = "auto"
    devices: Auto | int = "auto"
    nodes: int = Field(default=1, ge=1)
    strategy: str = "auto"
    threads: Auto | int = "auto"
    workers: int = Field(default=0, ge=0)
    cache: bool = True
    checkpoint_every: int = Field(default=100, ge=1)
    keep_checkpoints: int = Field(default=2, ge=2)
    max_bad_losses: int = Field(default=5, ge=1)


class LogSection(Section):
    """What is written while it runs, and how often (in steps)."""

    every: int = Field(default=1, ge=1)
    panels_every: int = Field(default=500, ge=1)
    validate_every: int = Field(default=0, ge=0)
    tensorboard: bool = True


class PretrainRecipe(Section):
    """One pre-training run."""

    dims: Literal[2, 3] = 3
    seed: Seed = 0
    data: DataSection = DataSection()
    images: ImagesSection = ImagesSection()
    mask: MaskSection = MaskSection()
    model: ModelSection = ModelSection()
    objective: ObjectiveSection = SparKSection()
    optim: OptimSection = OptimSection()
    probe: ProbeSection = ProbeSection()
    compute: ComputeSection = ComputeSection()
    log: LogSection = LogSection()

    @model_validator(mode="before")
    @classmethod
    def _spark_unless_named(cls, tree: Any) -> Any:
        """The section `objective` is SparK's unless it names another."""
        if isinstance(tree, dict) and isinstance(tree.get("objective"), dict):
            return {**tree, "objective": {"name": "spark", **tree["objective"]}}
        return tree


class SplitSection(Section):
    """Which labelled cases train and which validate.

    `dataset` follows the data's own lists; where it has none, and with `share`, `validation_share`
    of the patients is held out by a hash of their id. `list` takes the ids of `train` and
    `validation`; `named` a published split, or a JSON file, by `name` (and `fold`, where it has
    folds). `labels` keeps that many of the training cases, the first of an order drawn with
    `subset_seed`.
    """

    use: Literal["dataset", "share", "list", "named"] = "dataset"
    validation_share: float = Field(default=0.2, gt=0, lt=1)
    name: str = ""
    fold: int | None = Field(default=None, ge=0)
    train: tuple[str, ...] = ()
    validation: tuple[str, ...] = ()
    labels: int | None = Field(default=None, ge=1)
    subset_seed: int = 0


class SegmentModelSection(Section):
    """The network to fine-tune: the same backbone name and options as in pre-training.

    `balance` scales the stages of a pre-trained SegResNet to the spread of a fresh one, which keeps
    its decoder from drowning (`models.balance`); `auto` does so for SegResNet without batch norms.

    `decoder: auto` is the network's own, or a U-Net of width `feature_size` around an encoder that
    has none; `flexible` is that of MONAI's FlexibleUNet. `batch_norm` says what becomes of the
    encoder's running statistics: they move on in training (`train`), are first estimated anew on
    dense crops (`estimate`), or stay as pre-training left them (`hold`).
    """

    backbone: Auto | str = "auto"
    options: dict[str, Any] = Field(default_factory=dict)
    in_channels: int = Field(default=1, ge=1)
    balance: Auto | bool = "auto"
    decoder: Auto | Literal["unet", "flexible"] = "auto"
    feature_size: int = Field(default=16, ge=1)
    deep_supervision: bool = False
    batch_norm: Literal["train", "estimate", "hold"] = "train"


class FinetuneRecipe(Section):
    """One fine-tuning run; `protocol` is filled in by `--protocol` alone."""

    dims: Literal[2, 3] = 3
    seed: Seed = 0
    data: FinetuneDataSection = FinetuneDataSection()
    split: SplitSection = SplitSection()
    model: SegmentModelSection = SegmentModelSection()
    loss: LossSection = LossSection()
    optim: FinetuneOptimSection = FinetuneOptimSection()
    window_overlap: float = Field(default=0.5, ge=0, lt=1)
    score: ScoreSection = ScoreSection()
    protocol: ProtocolSection | None = None
    compute: ComputeSection = ComputeSection()
    log: LogSection = LogSection()


R = TypeVar("R", bound=Section)


def load_recipe(kind: type[R], path: Path | None, overrides: Sequence[str] = (), **fixed: Any) -> R:
    """Read a recipe, apply `section.key=value` in order, then `fixed` top-level values; validate.

    Raises:
        ConfigError: unknown key (with the nearest known one), wrong type, broken YAML or override.
    """
    tree: dict[str, Any] = {}
    if path is not None:
        loaded = read_yaml(path.read_text(encoding="utf-8"), path.name)
        if not isinstance(loaded, dict):
            raise ConfigError(
                f"{path.name} must hold sections (a mapping), found {type(loaded).__name__}"
            )
        tree = loaded
    for item in overrides:
        apply_override(tree, item)
    tree.update({key: value for key, value in fixed.items() if value is not None})
    return validate(kind, tree, path.name if path else "recipe")


def validate(kind: type[R], tree: dict[str, Any], name: str = "recipe") -> R:
    """A recipe from a plain tree; the first problem is told in one line.

    Raises:
        ConfigError: see `load_recipe`.
    """
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{name}: {_first_problem(kind, tree, error)}") from None


def _first_problem(kind: type[BaseModel], tree: dict[str, Any], error: ValidationError) -> str:
    problems = error.errors(include_url=False)
    unknown = [p for p in problems if p["type"] == "extra_forbidden"]
    problem = (unknown or problems)[0]
    where = _place(tree, problem["loc"])
    if not unknown:
        here = [p["msg"].lower() for p in problems if _place(tree, p["loc"]) == where]
        return f"{where}={problem.get('input')!r}: {' or '.join(dict.fromkeys(here))}"
    known = sorted(_keys(kind))
    if where in known:
        section = where.rpartition(".")[0]
        whole = f"{section}={{name: ...}}"
        return f"{where} is not for this {section}; leave it out, or give {whole} as a whole"
    near = difflib.get_close_matches(where, known, n=1, cutoff=0.5)
    last = [key for key in known if key.rsplit(".", 1)[-1] == str(problem["loc"][-1])]
    hint = near or last
    remedy = f"did you mean {hint[0]!r}?" if hint else f"known here: {', '.join(known)}"
    return f"unknown key {where!r}; {remedy}"


def _place(tree: Any, loc: Sequence[int | str]) -> str:
    """A problem's place in the user's own keys, without pydantic's names of alternatives."""
    parts = []
    for part in loc:
        below: Any = dict(enumerate(tree)) if isinstance(tree, list | tuple) else tree
        if isinstance(below, dict) and part in below:
            tree = below[part]
            parts.append(str(part))
    return ".".join(parts)


def _keys(kind: type[BaseModel], prefix: str = "") -> Iterable[str]:
    for name, field in kind.model_fields.items():
        choices = get_args(field.annotation) or (field.annotation,)
        inner = [c for c in choices if isinstance(c, type) and issubclass(c, BaseModel)]
        for section in inner:
            yield from _keys(section, f"{prefix}{name}.")
        if not inner:
            yield f"{prefix}{name}"


def to_tree(recipe: BaseModel) -> dict[str, Any]:
    """The recipe as plain JSON types, in reading order."""
    return json.loads(recipe.model_dump_json())


def resolve(recipe: R, changes: dict[str, Any]) -> R:
    """The recipe with `section.key` values replaced, validated again."""
    tree = to_tree(recipe)
    for key, value in changes.items():
        *parents, last = key.split(".")
        node = tree
        for part in parents:
            node = node[part]
        node[last] = value
    return validate(type(recipe), tree)


def dump_yaml(recipe: BaseModel) -> str:
    """YAML that `load_recipe` reads back to an equal recipe."""
    return yaml.safe_dump(to_tree(recipe), sort_keys=False, default_flow_style=None, width=100)


def changed_keys(old: BaseModel, new: BaseModel) -> list[str]:
    """Keys of the sections that change results, where two recipes differ."""

    def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
        if not isinstance(tree, dict):
            return {prefix: tree}
        parts = [flat(value, f"{prefix}.{key}" if prefix else key) for key, value in tree.items()]
        return {key: value for part in parts for key, value in part.items()}

    a, b = flat(to_tree(old)), flat(to_tree(new))
    keys = [key for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)]
    return [key for key in keys if key.split(".")[0] not in NEUTRAL]
