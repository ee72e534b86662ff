"""The segmentation loss against MONAI's own and by hand."""

import pytest
import torch
from monai.losses.dice import DiceCELoss

from spark3d.models.losses import DiceCrossEntropy


@pytest.mark.parametrize("ndim", [2, 3])
def test_without_weights_it_is_monais_dice_ce_loss(ndim: int) -> None:
    logits = torch.randn(2, 4, *(6,) * ndim)
    labels = torch.randint(0, 4, (2, *(6,) * ndim))
    monai = DiceCELoss(include_background=False, to_onehot_y=True, softmax=True)
    assert torch.allclose(DiceCrossEntropy()(logits, labels), monai(logits, labels[:, None]))


def test_class_weights_change_the_cross_entropy_and_leave_the_dice() -> None:
    logits, labels = torch.randn(2, 3, 8, 8), torch.randint(0, 3, (2, 8, 8))
    dice = DiceCrossEntropy([1.0, 10.0, 10.0], ce_weight=0.0)(logits, labels)
    assert torch.allclose(dice, DiceCrossEntropy(ce_weight=0.0)(logits, labels))
    both = DiceCrossEntropy([1.0, 10.0, 10.0])(logits, labels)
    by_hand = torch.nn.functional.cross_entropy(logits, labels, torch.tensor([1.0, 10.0, 10.0]))
    assert torch.allclose(both - dice, by_hand)


def test_squares_and_smoothing_are_those_of_monai() -> None:
    logits, labels = torch.randn(2, 3, 8, 8), torch.randint(0, 3, (2, 8, 8))
    options = {"squared_pred": True, "smooth_nr": 0.0, "smooth_dr": 1e-6}
    monai = DiceCELoss(to_onehot_y=True, softmax=True, **options)
    ours = DiceCrossEntropy(include_background=True, squared=True, smooth=(0.0, 1e-6))
    assert torch.allclose(ours(logits, labels), monai(logits, labels[:, None]))
    assert not torch.allclose(ours(logits, labels), DiceCrossEntropy()(logits, labels))
