"""The recipe of `spark3d finetune --dims 2 --task classify`, in reading order."""

from typing import Any, Literal

from pydantic import Field

from spark3d.config import (
    Auto,
    Batch,
    Beta,
    ComputeSection,
    LogSection,
    OptimSection,
    Section,
    Seed,
    Sizes,
)


class LabelledImagesSection(Section):
    """What is read: crop side, how much of an image evaluation sees, few-label subsets.

    `per_class` keeps that many training images of each class, drawn with `subset_seed`. `repeats`
    shows every image so many times in a row (repeated augmentation). `max_bad` is the largest share
    of images of a part that may be left out.
    """

    crop: Sizes = 224
    evaluation_share: float = Field(default=0.95, gt=0, le=1)
    per_class: int | None = Field(default=None, ge=1)
    subset_seed: int = 0
    repeats: int = Field(default=1, ge=1)
    max_bad: float = Field(default=0.0, ge=0, le=1)


class ImageAugmentSection(Section):
    """Random changes of a training image: area of the crop, mirror image, policy, erasing.

    `policy` is none, trivial (TrivialAugment) or a policy of timm, such as rand-m9-mstd0.5-inc1.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    flip: float = Field(default=0.5, ge=0, le=1)
    policy: str = "trivial"
    erase: float = Field(default=0.0, ge=0, le=1)


class MixSection(Section):
    """Mixup and cutmix: parameters of their beta distributions; 0 leaves one out."""

    mixup: float = Field(default=0.0, ge=0)
    cutmix: float = Field(default=0.0, ge=0)


class ClassifierSection(Section):
    """The network of timm; `auto` is that of the encoder. `drop_path` replaces its own rate."""

    backbone: Auto | str = "auto"
    options: dict[str, Any] = Field(default_factory=dict)
    drop_path: float | None = Field(default=None, ge=0, lt=1)


class ClassifyLossSection(Section):
    """Cross-entropy, or binary cross-entropy of every class; smoothing of the targets."""

    name: Literal["ce", "bce"] = "ce"
    smoothing: float = Field(default=0.1, ge=0, lt=1)


class ClassifyOptimSection(OptimSection):
    """As in pre-training, and what fine-tuning an image classifier adds.

    With encoder weights the learning rate of each layer is `layer_decay` times that of the next
    deeper one, down from the head; from scratch all are the head's. `layer_blocks` says how many
    blocks make a layer, for all stages or for each. `ema` above 0 averages the weights with this
    decay and evaluates and saves the average; `ema_warmup` lets the decay rise to it.
    `always_adapt` and `bias_correction` are LAMB's.
    """

    betas: tuple[Beta, Beta] = (0.9, 0.999)
    steps: int = Field(default=2000, ge=1)
    warmup: int = Field(default=100, ge=0)
    batch: Batch = 64
    layer_decay: float = Field(default=1.0, gt=0, le=1)
    layer_blocks: Sizes = 1
    ema: float = Field(default=0.0, ge=0, lt=1)
    ema_warmup: bool = False
    always_adapt: bool = False
    bias_correction: bool = True


class ClassifyRecipe(Section):
    """One fine-tuning for classification; `log.validate_every: 0` validates after every epoch."""

    dims: Literal[2] = 2
    seed: Seed = 0
    images: LabelledImagesSection = LabelledImagesSection()
    augment: ImageAugmentSection = ImageAugmentSection()
    mix: MixSection = MixSection()
    model: ClassifierSection = ClassifierSection()
    loss: ClassifyLossSection = ClassifyLossSection()
    optim: ClassifyOptimSection = ClassifyOptimSection()
    compute: ComputeSection = ComputeSection()
    log: LogSection = LogSection()
