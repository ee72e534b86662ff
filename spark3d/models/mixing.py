"""Targets and losses of classification: timm's mixup, cutmix and label smoothing.

Mixup (Zhang et al., ICLR 2018), CutMix (Yun et al., ICCV 2019).
"""

from __future__ import annotations

from typing import Literal

from jaxtyping import Float, Int
from timm.data.mixup import Mixup, mixup_target
from timm.loss.binary_cross_entropy import BinaryCrossEntropy
from timm.loss.cross_entropy import SoftTargetCrossEntropy
from torch import Tensor, nn

from spark3d.errors import ConfigError

Mixed = tuple[Float[Tensor, "b c *size"], Float[Tensor, "b k"]]


class Mixing:
    """Crops and class numbers to mixed crops and soft targets.

    One draw of mixing weight serves a whole batch, whose first image is mixed with its last and so
    on. It comes from numpy's global generator, as timm has it.

    Args:
        classes: Number of classes.
        smoothing: Share of the target that is spread over all classes.
        mixup: Parameter of the beta distribution of mixup; 0: none.
        cutmix: That of cutmix; 0: none. With both, either has half of the batches.
    """

    def __init__(self, classes: int, smoothing: float, mixup: float, cutmix: float) -> None:
        self.classes, self.smoothing = classes, smoothing
        self.mixup: Mixup | None = None
        if mixup > 0 or cutmix > 0:
            self.mixup = Mixup(mixup, cutmix, label_smoothing=smoothing, num_classes=classes)

    def check(self, batch: int) -> None:
        """Refuse a batch whose images cannot be paired.

        Raises:
            ConfigError: an odd number of images on a rank.
        """
        if self.mixup is not None and batch % 2:
            raise ConfigError(
                f"mixup and cutmix pair the images of a rank's batch, which has {batch}; make "
                "optim.batch an even number on every rank, or set mix.mixup=0 mix.cutmix=0"
            )

    def __call__(self, crops: Float[Tensor, "b c *size"], labels: Int[Tensor, " b"]) -> Mixed:
        if self.mixup is None:
            return crops, mixup_target(labels, self.classes, 1.0, self.smoothing)
        return self.mixup(crops.clone(), labels)


def classification_loss(name: Literal["ce", "bce"]) -> nn.Module:
    """Cross-entropy, or binary cross-entropy of every class, of logits and soft targets."""
    return SoftTargetCrossEntropy() if name == "ce" else BinaryCrossEntropy(smoothing=0.0)
