"""What every section of a recipe is; the sections of objectives, loss, probe and scores."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Auto = Literal["auto"]
Sizes = int | tuple[int, ...]


class Section(BaseModel):
    """A frozen group of keys that refuses unknown ones."""

    model_config = ConfigDict(extra="forbid", frozen=True)


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
