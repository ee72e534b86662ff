"""The loss of segmentation: MONAI's Dice plus cross-entropy."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from monai.losses.dice import DiceLoss
from torch import Tensor, nn
from torch.nn import functional


class DiceCrossEntropy(nn.Module):
    """Soft Dice of the classes plus cross-entropy of the voxels.

    Unlike MONAI's `DiceCELoss`, class weights count in the cross-entropy alone: there they are
    normalised, while in the Dice they would multiply the loss and drown the cross-entropy.

    Args:
        class_weights: Of the cross-entropy, background first; None weighs all alike.
        dice_weight: Of the Dice term.
        ce_weight: Of the cross-entropy term.
        include_background: Count the background's Dice too.
        batch_dice: Dice of the whole batch instead of each sample's.
        squared: Square probabilities and labels in the Dice's denominator.
        smooth: Added to the Dice's numerator and denominator.
    """

    def __init__(
        self,
        class_weights: Sequence[float] | None = None,
        dice_weight: float = 1.0,
        ce_weight: float = 1.0,
        include_background: bool = False,
        batch_dice: bool = False,
        squared: bool = False,
        smooth: tuple[float, float] = (1e-5, 1e-5),
    ) -> None:
        super().__init__()
        self.dice = DiceLoss(
            include_background=include_background, to_onehot_y=True, softmax=True,
            batch=batch_dice, squared_pred=squared, smooth_nr=smooth[0], smooth_dr=smooth[1],
        )  # fmt: skip
        weights = None if class_weights is None else torch.tensor(class_weights)
        self.cross_entropy = nn.CrossEntropyLoss(weight=weights)
        self.dice_weight, self.ce_weight = dice_weight, ce_weight

    def forward(
        self, logits: Float[Tensor, "b k *size"], labels: Int[Tensor, "b *size"]
    ) -> Float[Tensor, ""]:
        """The weighted sum, in float32 whatever the precision of the logits."""
        logits = logits.float()
        dice = self.dice(logits, labels[:, None])
        return self.dice_weight * dice + self.ce_weight * self.cross_entropy(logits, labels)


class DeepSupervision(nn.Module):
    """A loss at several resolutions, each with half the weight of the finer one (nnU-Net).

    F. Isensee et al., "nnU-Net", Nature Methods 18 (2021): weights 1, 1/2, 1/4, ..., normalised to
    a sum of 1; labels are brought to a coarser map by the nearest voxel.

    Args:
        loss: Of logits `(b, k, *size)` and labels `(b, *size)`.
    """

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(
        self, logits: Tensor | Sequence[Tensor], labels: Int[Tensor, "b *size"]
    ) -> Float[Tensor, ""]:
        """`logits` of one map, or of several, fine to coarse: stacked on axis 1 or a sequence."""
        maps = tuple(logits)
        if isinstance(logits, Tensor):
            maps = logits.unbind(1) if logits.ndim == labels.ndim + 2 else (logits,)
        weights = [0.5**k for k in range(len(maps))]
        total = torch.zeros((), device=labels.device)
        for weight, found in zip(weights, maps, strict=True):
            fitting = functional.interpolate(
                labels[:, None].float(), size=found.shape[2:], mode="nearest-exact"
            )
            total = total + weight / sum(weights) * self.loss(found, fitting[:, 0].long())
        return total
