"""HOG targets and LocalMIM's losses against values of the official code; 3D against an oracle."""

import pytest
import torch
from golden_rule import load

from spark3d.objectives.hog import gradients, hog, orientation_axes
from spark3d.objectives.localmim import tap_loss
from spark3d.sparse.mask import CellMask

NUMBERS, ARRAYS = load("localmim")


def tensor(key: str) -> torch.Tensor:
    return torch.from_numpy(ARRAYS[key])


@pytest.mark.parametrize("key", [k for k in ARRAYS if k.startswith("hog_nb")])
def test_hog_of_an_image(key: str) -> None:
    """9 and 18 bins, cells of 4 to 32, colour by colour."""
    bins, cell = (int("".join(c for c in part if c.isdigit())) for part in key.split("_")[1:])
    wanted = tensor(key)
    found = hog(tensor("img"), (cell, cell), bins).reshape(wanted.shape)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=2e-6)


def test_gradients_of_an_image() -> None:
    """The (width, height) differences of the first colour; ours come in axis order."""
    found = gradients(tensor("img")[:, :1])
    torch.testing.assert_close(found.flip(1), tensor("gxy_ch0"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ramp", ["w+", "w-", "h+", "h-", "w+2h", "w-h"])
def test_hog_of_ramps(ramp: str) -> None:
    """Known bins inside, known votes at the borders (reflected)."""
    found = hog(tensor(f"in_ramp_{ramp}")[None, None], (8, 8))[0]
    torch.testing.assert_close(found, tensor(f"hog_ramp_{ramp}"), rtol=1e-5, atol=2e-6)
    inner = torch.tensor(NUMBERS[f"inner_cell_bins_ramp_{ramp}"])
    torch.testing.assert_close(found[:, 1, 1], inner, rtol=0, atol=1e-5)


def test_hog_of_a_constant_image_is_zero() -> None:
    """No vote, no NaN."""
    found = hog(tensor("in_const")[None, None], (8, 8))[0]
    assert torch.equal(found, tensor("hog_const"))


@pytest.mark.parametrize("scale", range(4))
def test_loss_and_gradient_of_every_scale(scale: int) -> None:
    """Finer than the mask: repeated; coarser: the share hidden (fractional at the last scale)."""
    hidden = tensor("loss_mask").reshape(2, 4, 4).bool()
    mask = CellMask(~hidden, (16, 16), n_visible=0, host=~hidden)
    side = 16 >> scale
    predicted = tensor(f"loss_pred{scale}").mT.reshape(2, 27, side, side).clone().requires_grad_()
    target = hog(tensor("img"), (4 << scale, 4 << scale))
    torch.testing.assert_close(target.flatten(2).mT, tensor(f"target{scale}"), rtol=1e-5, atol=2e-6)
    loss = tap_loss(predicted, target, mask)
    assert loss.item() == pytest.approx(NUMBERS["vit_loss_per_scale"][scale], rel=1e-5)
    loss.backward()
    assert predicted.grad is not None
    torch.testing.assert_close(
        predicted.grad.flatten(2).mT, tensor(f"loss_grad{scale}"), rtol=1e-4, atol=1e-8
    )


def test_the_ten_axes_of_3d() -> None:
    """Exactly the listed ones, in their order."""
    torch.testing.assert_close(orientation_axes(3), tensor("axes3d"), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("cell", [4, 8, 16])
@pytest.mark.parametrize("vote", ["hard", "soft"])
def test_hog_of_a_volume(cell: int, vote: str) -> None:
    """Both kinds of votes, in float64."""
    volume = tensor("vol").double()[None, None]
    found = hog(volume, (cell,) * 3, soft=vote == "soft")[0]
    torch.testing.assert_close(found, tensor(f"hog3_{vote}_cell{cell}"), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("axis", range(3))
def test_flips_of_a_volume_permute_the_bins(axis: int) -> None:
    """The ten axes are closed under reflections."""
    volume = tensor("vol").double()[None, None]
    found = hog(volume.flip(2 + axis), (8, 8, 8))[0].flip(1 + axis)
    order = NUMBERS[f"hog3_flip{axis}_perm"]
    torch.testing.assert_close(found[order], hog(volume, (8, 8, 8))[0], rtol=1e-9, atol=1e-9)
