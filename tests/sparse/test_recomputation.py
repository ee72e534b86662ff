"""Activation checkpointing: the same gradients, under the mask of the forward, or a refusal."""

import copy

import pytest
import torch
from both_backends import draw_mask, restored
from contract import plain_batch
from small_networks import ALL, plain_cnn
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from spark3d.sparse import CellMask, SparseEncoder, restore_dense

STAGES = ("stem", "layer1", "layer2")
both = pytest.mark.parametrize("backend", ["packed", "reference"])


@pytest.fixture
def batch() -> tuple[Tensor, CellMask]:
    return plain_batch()


@both
def test_recomputing_activations_gives_the_same_gradients(backend: str, batch: tuple) -> None:
    crops, mask = batch
    plain = SparseEncoder(plain_cnn(2), STAGES, 2, backend).double()
    network = copy.deepcopy(restored(copy.deepcopy(plain.network)))
    saving = SparseEncoder(network, STAGES, 2, backend, checkpoint=("stem", "layer1.0", "layer2"))
    other = draw_mask((3, 4), (4, 4), seed=9)
    found = []
    for encoder, wrapped in ((plain, False), (saving, False), (copy.deepcopy(plain), True)):
        encoder.eval().zero_grad()
        losses = []
        for m in (mask, other):
            maps = (
                checkpoint(lambda x, m=m, e=encoder: e(x, m)[2], crops, use_reentrant=False)
                if wrapped
                else encoder(crops, m)[2]
            )
            losses.append(maps.square().sum())
        sum(losses).backward()
        found.append([p.grad for p in encoder.parameters() if p.grad is not None])
    for others in found[1:]:
        assert len(others) == len(found[0])
        assert all(map(torch.equal, found[0], others))
    restore_dense(network)
    assert not any("mask_slot" in vars(m) for m in network.modules())


RECOMPUTED = {
    "a convolution": ("own 2d", ("stem.0", "layer2.0")),
    "a norm": ("own 2d", ("stem.1",)),
    "squeeze-excite": ("timm/test_efficientnet", ("blocks.1", "blocks.2.0.se")),
    "response norm": ("monai/mednext 3d, grn", ("enc_stages.0.0", "bottleneck")),
}


@both
@pytest.mark.parametrize(("name", "names"), RECOMPUTED.values(), ids=RECOMPUTED)
def test_mask_aware_layers_can_be_recomputed_themselves(
    name: str, names: tuple[str, ...], backend: str
) -> None:
    small = ALL[name]
    plain = SparseEncoder(small.build(), small.stages, len(small.size), backend).double()
    network = restored(copy.deepcopy(plain.network))
    saving = SparseEncoder(network, small.stages, len(small.size), backend, checkpoint=names)
    grid = [n // c for n, c in zip(small.size, small.cell, strict=True)]
    crops = torch.randn(2, small.in_channels, *small.size).double()
    mask = draw_mask(grid, small.cell, 0.5)
    for dense in (False, True):
        found = []
        for encoder in (plain, saving):
            encoder.zero_grad()
            torch.manual_seed(0)
            maps = encoder.dense(crops) if dense else encoder(crops, mask).maps
            sum(y.square().mean() for y in maps).backward()
            found.append([*maps, *(p.grad for p in encoder.parameters() if p.grad is not None)])
        assert len(found[0]) == len(found[1])
        assert all(map(torch.equal, *found))
        if not dense:  # a recomputed batch is counted once
            assert all(map(torch.equal, plain.buffers(), saving.buffers()))


def test_a_layer_without_a_meaning_is_refused_when_recomputed_too(batch: tuple) -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Softmax2d())
    encoder = SparseEncoder(network, ("1",), 2, checkpoint=("1",)).double()
    with pytest.raises(TypeError, match=r"layer '1' \(torch.*Softmax2d\) .*not defined"):
        encoder(*batch)
    restore_dense(network)
    assert type(network[1]) is nn.Softmax2d


def test_recomputation_outside_the_masked_forward_is_refused(batch: tuple) -> None:
    class Recomputing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 2, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.conv, x.requires_grad_(), use_reentrant=False)

    encoder = SparseEncoder(nn.Sequential(Recomputing(), nn.ReLU()), ("0", "1"), 2).double()
    loss = encoder(*batch)[1].square().sum()
    with pytest.raises(
        RuntimeError, match=r"layer '0.conv' is recomputed.*SparseEncoder\(checkpoint"
    ):
        loss.backward()
