"""A2MIM's losses, head, token and fill against values of the official code."""

import pytest
import torch
from golden_rule import load

from spark3d.objectives.a2mim import MaskToken, mean_fill
from spark3d.objectives.fourier import composite, fourier_loss, spatial_loss
from spark3d.sparse.mask import CellMask

NUMBERS, ARRAYS = load("a2mim")
PAIRS = ["n2c3_8x8", "n1c1_8x8", "n3c1_6x10"]
SETTINGS = {
    "a2mim": {},
    "ave_nolog": {"log": False},
    "noave": {"average": False},
    "alpha2_noave_nolog": {"average": False, "log": False, "alpha": 2.0},
}
HEADS = {
    "r50": (True, 0.5, 1e-3, "mixed"),
    "r50_spatial_only": (True, 0.0, 1e-3, "mixed"),
    "vit": (False, 0.1, 0.0, "mixed"),
    "replace_prediction_w0": (True, 0.5, 0.0, "prediction"),
    "replace_target_w0": (True, 0.5, 0.0, "target"),
}


def tensor(key: str) -> torch.Tensor:
    return torch.from_numpy(ARRAYS[key])


def mask_of(key: str, cell: int, batch: int) -> CellMask:
    """Golden masks are 1 where hidden, and samples may differ in number."""
    visible = tensor(key).reshape(batch, 4, 4) == 0
    return CellMask(visible, (cell, cell), n_visible=0, host=visible)


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("setting", SETTINGS)
def test_fourier_loss(pair: str, setting: str) -> None:
    """Value and gradient in every setting."""
    predicted = tensor(f"ffl_{pair}_pred").requires_grad_()
    loss = fourier_loss(predicted, tensor(f"ffl_{pair}_target"), **SETTINGS[setting])
    assert loss.item() == pytest.approx(NUMBERS[f"ffl_{pair}_{setting}"], rel=1e-7)
    loss.backward()
    wanted = tensor(f"ffl_{pair}_{setting}_grad")
    torch.testing.assert_close(predicted.grad, wanted, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("average", [True, False])
def test_unweighted_spectrum_is_the_squared_error(pair: str, average: bool) -> None:
    """Parseval: with weights of one (alpha 0) the loss is that of the voxels."""
    key = f"ffl_{pair}_unitweight_{'ave' if average else 'noave'}"
    predicted, target = tensor(f"ffl_{pair}_pred"), tensor(f"ffl_{pair}_target")
    found = fourier_loss(predicted, target, average, alpha=0.0, log=False)
    assert found.item() == pytest.approx(NUMBERS[key][0], rel=1e-12)
    error = predicted - target
    voxels = (error.mean(0) if average else error).square().mean()
    assert voxels.item() == pytest.approx(found.item(), rel=1e-12)


@pytest.mark.parametrize("head", HEADS)
def test_both_losses_together(head: str) -> None:
    """Value and gradient of the whole head."""
    focal, weight, visible_weight, replacement = HEADS[head]
    target, predicted = tensor("head_x"), tensor("head_xrec").requires_grad_()
    hidden = ~mask_of("head_mask", 8, 2).at((32, 32))
    loss = spatial_loss(predicted, target, hidden, focal)
    if weight:
        whole = composite(predicted, target, hidden, visible_weight, replacement)
        loss = loss + weight * fourier_loss(whole, target)
    assert loss.item() == pytest.approx(NUMBERS[f"head_{head}"], rel=1e-7)
    loss.backward()
    wanted = tensor(f"head_{head}_grad")
    torch.testing.assert_close(predicted.grad, wanted, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(
    ("mode", "key"),
    [("replace", "replace"), ("residual", "residual_nogamma"), ("fading", "residual_gamma")],
)
def test_token(mode: str, key: str) -> None:
    """Three ways to put the token into a map."""
    module = MaskToken(5, 2, mode).double()
    module.token.data.copy_(tensor("token_token"))
    if mode == "fading":
        module.gamma.data.copy_(tensor("token_gamma"))
    found = module(tensor("token_feat"), mask_of("token_mask", 1, 2).at((4, 4)))
    torch.testing.assert_close(found, tensor(f"token_{key}"), rtol=1e-12, atol=1e-12)


def test_mean_fill() -> None:
    """Hidden pixels become the mean of their channel over the whole image."""
    mask = mask_of("fill_mask", 8, 1)
    found = mean_fill(tensor("fill_img")[None], mask)[0]
    torch.testing.assert_close(found, tensor("fill_out"), rtol=1e-12, atol=1e-12)
