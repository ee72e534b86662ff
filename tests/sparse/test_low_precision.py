"""bfloat16: outputs in the dtype of the layer, statistics in float32, and none that cancel."""

import pytest
import torch
from both_backends import draw_mask
from timm.layers.grn import GlobalResponseNorm
from timm.layers.norm_act import BatchNormAct2d
from timm.layers.squeeze_excite import SEModule
from torch import Tensor, nn

from spark3d.sparse import SparseEncoder, functional, packed
from spark3d.sparse.cells import pack, unpack
from spark3d.sparse.convert import sparsify
from spark3d.sparse.mask import CellMask
from spark3d.sparse.slot import MaskSlot, Run

both = pytest.mark.parametrize("backend", ["packed", "reference"])
NORMS = {
    "batch": lambda: nn.BatchNorm2d(8),
    "batch, activated": lambda: BatchNormAct2d(8),
    "sync": lambda: nn.SyncBatchNorm(8),
    "group": lambda: nn.GroupNorm(2, 8),
    "group, plain": lambda: nn.GroupNorm(2, 8, affine=False),
    "instance": lambda: nn.InstanceNorm2d(8, affine=True),
    "response": lambda: GlobalResponseNorm(8, channels_last=False),
    "squeeze": lambda: SEModule(8, rd_channels=4),
}


def masked(layer: nn.Module, x: Tensor, mask: CellMask, backend: str) -> Tensor:
    """The layer's output on the full grid, zero where hidden."""
    slot = MaskSlot()
    sparsify(layer, slot)
    if backend == "reference":
        with slot.use(Run(functional, mask, mask.batch)):
            return functional.hide(layer(functional.hide(x, mask)), mask)
    with slot.use(Run(packed, packed.Layout(mask), mask.batch)):
        return unpack(layer(pack(x, mask)), mask)


@both
@pytest.mark.parametrize("make", NORMS.values(), ids=NORMS)
def test_statistics_are_wider_than_the_map(make: object, backend: str) -> None:
    """On values of bfloat16 far from zero, the norm is that of float64 to the output's rounding."""
    mask = draw_mask((4, 4), (8, 8))
    x = (20 + torch.randn(2, 8, *mask.size)).bfloat16()
    torch.manual_seed(0)
    layer, twin = make(), make()  # type: ignore[operator]
    for parameter in layer.parameters():
        nn.init.normal_(parameter, 1.0, 0.3)
    twin.load_state_dict(layer.state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        found = masked(layer, x, mask, backend)
    expected = masked(twin.double(), x.double(), mask, backend)
    scale = float(expected.detach().abs().max())
    assert float((found.double() - expected).detach().abs().max()) < 0.015 * max(scale, 1)


@both
@pytest.mark.parametrize("groups", [1, 4, 8])
def test_group_norm_does_not_cancel_far_from_zero(groups: int, backend: str) -> None:
    """E[x^2] - E[x]^2, as the library's channels-last kernel takes it, is off by more than 1."""
    mask = draw_mask((3, 4), (4, 4))
    x = 1000 + torch.randn(2, 8, *mask.size)
    layer = nn.GroupNorm(groups, 8)
    found = masked(layer, x, mask, backend)
    expected = masked(nn.GroupNorm(groups, 8).double(), x.double(), mask, backend)
    torch.testing.assert_close(found.double(), expected, atol=1e-3, rtol=0)


@both
def test_gradients_under_autocast_are_those_of_float32_to_rounding(backend: str) -> None:
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.GroupNorm(2, 8),
        nn.GELU(),
        nn.Conv2d(8, 8, 3, 2, 1, groups=8),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 4, 1),
    )
    encoder = SparseEncoder(net, ("5",), 2, backend)
    crops, mask = torch.randn(2, 1, 32, 32), draw_mask((4, 4), (8, 8))
    grads = []
    for enabled in (False, True):
        encoder.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = encoder(crops, mask)[0]
        assert y.dtype == (torch.bfloat16 if enabled else torch.float32)
        y.float().square().mean().backward()
        grads.append([p.grad.clone() for p in net.parameters()])
    largest = max(float(g.abs().max()) for g in grads[0])
    for full, low in zip(*grads, strict=True):
        assert low.dtype == torch.float32
        assert float((full - low).abs().max()) < 0.05 * largest


@pytest.mark.parametrize("norm", [nn.GroupNorm(2, 8), nn.InstanceNorm2d(8, affine=True)])
def test_modules_in_bfloat16_keep_their_dtypes(norm: nn.Module) -> None:
    mask = draw_mask((4, 4), (8, 8))
    x = torch.randn(2, 8, *mask.size).bfloat16().requires_grad_()
    y = masked(norm.bfloat16(), x, mask, "packed")
    y.float().square().sum().backward()
    assert y.dtype == x.grad.dtype == torch.bfloat16
    assert {p.grad.dtype for p in norm.parameters()} == {torch.bfloat16}
