"""What every section of a recipe is; those of augmentation, objectives, loss, probe and scores."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Auto = Literal["auto"]
Sizes = int | tuple[int, ...]
Probability = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """A frozen group of keys that refuses unknown ones."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class AugmentSection(Section):
    """Random changes of a crop; probabilities per draw, `flips` per axis (R, A, S in the store).

    `swap` names label pairs that change places in a left-right mirror image; `rot90` is the
    probability of quarter turns in the axial plane. `intensity` is the probability of a change of
    contrast, of offset and of noise, or one for each in this order; `noise` is the highest
    standard deviation and `shift` the largest offset, both in the network's intensity range.
    """

    affine: float = Field(default=0.5, ge=0, le=1)
    degrees: float = Field(default=0.0, ge=0, le=180)
    zoom: tuple[float, float] = (0.8, 1.25)
    stretch: float = Field(default=0.1, ge=0, lt=1)
    flips: tuple[float, ...] = (0.5, 0.5, 0.5)
    swap: tuple[tuple[int, int], ...] = ()
    rot90: Probability = 0.0
    intensity: Probability | tuple[Probability, Probability, Probability] = 0.5
    scale: float = Field(default=0.1, ge=0)
    shift: float = Field(default=0.0, ge=0)
    noise: float = Field(default=0.0, ge=0)


class SegmentationAugmentSection(AugmentSection):
    """The same with what fine-tuning does unless a recipe says otherwise."""

    degrees: float = Field(default=15.0, ge=0, le=180)
    zoom: tuple[float, float] = (0.85, 1.2)
    stretch: float = Field(default=0.0, ge=0, lt=1)
    flips: tuple[float, ...] = (0.0, 0.0, 0.0)
    shift: float = Field(default=0.1, ge=0)
    noise: float = Field(default=0.05, ge=0)


class SparKSection(Section):
    """SparK: per-cell normalised voxels, `eps` under the root.

    Hidden cells that vary less than `min_variance` count `flat_weight` times; 0 skips them.

    The `light` decoder stops at `stop_stride` and predicts the voxels of each hidden cell; the
    `official` one climbs to full resolution.
    """

    name: Literal["spark"] = "spark"
    eps: float = Field(default=1e-6, ge=0)
    min_variance: float = Field(default=0.0, ge=0)
    flat_weight: float = Field(default=0.0, ge=0, le=1)
    decoder: Literal["light", "official"] = "light"
    decoder_width: Auto | int = "auto"
    decoder_norm: Literal["bn", "gn", "in"] = "bn"
    densify_norm: Auto | Literal["bn", "ln", "gn", "in", "none"] = "auto"
    stop_stride: Auto | Sizes = "auto"


class LocalMIMSection(Section):
    """LocalMIM: every tapped stage predicts gradient histograms, or voxels, of its own scale.

    Histograms: `bins` in 2D (ten axes in 3D), `soft` votes (auto: in 3D), a noise `floor` in units
    of the crop. `body` of the decoders: convolutions, or one block of attention over all sites.
    """

    name: Literal["localmim"] = "localmim"
    target: Literal["hog", "voxels"] = "hog"
    taps: tuple[str, ...] | None = None
    bins: int = Field(default=9, ge=2)
    soft: Auto | bool = "auto"
    floor: float = Field(default=0.0, ge=0)
    body: Literal["conv", "attention"] = "conv"
    width: int = Field(default=256, ge=1)
    kernel: int = Field(default=7, ge=3)


class A2MIMSection(Section):
    """A2MIM: mean fill, a token before the last stage, focal L1 and a Fourier loss; dense.

    In the spectrum, visible voxels hold `visible_weight` of the prediction and else `replacement`.
    `token_lr_ratio` is the token's learning rate relative to the rest (.1 officially). `detach`
    lets no gradient through what the token is added to. `fourier_focal: false` weighs all
    frequencies alike. `head_rank` makes the head of two smaller maps (0: one, officially);
    `add_mean` lets it predict deviations from the mean that fills hidden cells.
    """

    name: Literal["a2mim"] = "a2mim"
    token_at: str | None = None
    mode: Literal["residual", "replace", "fading"] = "residual"
    detach: bool = False
    fourier: float = Field(default=0.5, ge=0)
    fourier_focal: bool = True
    focal: bool = True
    average_spectrum: bool = True
    replacement: Literal["mixed", "target", "prediction", "mean"] = "mixed"
    visible_weight: float = Field(default=1e-3, ge=0, le=1)
    token_lr_ratio: float = Field(default=1.0, gt=0)
    fill_from_visible: bool = False
    head_norm: bool = False
    head_rank: int = Field(default=0, ge=0)
    add_mean: bool = False


ObjectiveSection = Annotated[
    SparKSection | LocalMIMSection | A2MIMSection, Field(discriminator="name")
]


class LossSection(Section):
    """MONAI's Dice + cross-entropy; foreground classes weigh `foreground_weight` in the latter.

    `squared` squares the terms of the Dice's denominator; `smooth` is added to its numerator and
    denominator.
    """

    foreground_weight: float = Field(default=1.0, gt=0)
    dice_weight: float = Field(default=1.0, ge=0)
    ce_weight: float = Field(default=1.0, ge=0)
    include_background: bool = False
    batch_dice: bool = False
    squared: bool = False
    smooth: tuple[float, float] = (1e-5, 1e-5)


class ProbeSection(Section):
    """A look at the encoder every `every` steps (0: never) and at the end; training is not touched.

    Figures of the stages (effective rank, deviation) tell a collapse. With `data`, a prepared store
    of labelled volumes, a linear head is also fitted to the frozen stages, in `steps` steps on
    `crops` crops of at most `cases` cases, and scored by Dice on as many of others.
    """

    every: int = Field(default=0, ge=0)
    data: str = ""
    cases: int = Field(default=4, ge=1)
    crops: int = Field(default=8, ge=2, multiple_of=2)
    steps: int = Field(default=60, ge=1)
    lr: float = Field(default=0.05, gt=0)


class ScoreSection(Section):
    """What `predict` and `evaluate` take from a run: scored labels, NSD's tolerance.

    Without `labels` those count that a named split scores, or all.
    """

    labels: tuple[int, ...] = ()
    tolerance_mm: float = Field(default=2.0, gt=0)


class ProtocolSection(Section):
    """The frozen protocol a recipe came from, by name and hash; `smoke`: shortened, no result."""

    name: str
    sha256: str
    smoke: bool = False
