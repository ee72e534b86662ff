"""The loss of segmentation: MONAI's Dice plus cross-entropy."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from monai.losses.dice import DiceLoss
from torch import Tensor, nn


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
    """

    def __init__(
        self,
        class_weights: Sequence[float] | None = None,
        dice_weight: float = 1.0,
        ce_weight: float = 1.0,
        include_background: bool = False,
        batch_dice: bool = False,
    ) -> None:
        super().__init__()
        self.dice = DiceLoss(
            include_background=include_background, to_onehot_y=True, softmax=True, batch=batch_dice
        )
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
