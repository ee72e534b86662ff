"""The full contract over a table of networks: proof, gradients, strict round trips."""

import copy

import pytest
import torch
from both_backends import draw_mask
from small_networks import ALL, LARGE, OWN, Small
from torch import nn

from spark3d.sparse import SparseEncoder, restore_dense
from spark3d.sparse.leaks import prove

every = pytest.mark.parametrize(
    "small",
    [*ALL.values(), *(pytest.param(small, marks=pytest.mark.slow) for small in LARGE.values())],
    ids=[*ALL, *LARGE],
)


def make_encoder(small: Small, **options: object) -> SparseEncoder:
    return SparseEncoder(small.build(), small.stages, len(small.size), **options)


def make_batch(small: Small, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple:
    grid = [n // c for n, c in zip(small.size, small.cell, strict=True)]
    crops = torch.randn(2, small.in_channels, *small.size, dtype=dtype)
    return crops, draw_mask(grid, small.cell, 0.6, seed=seed)


@every
def test_the_proof_holds(small: Small) -> None:
    proof = prove(make_encoder(small), small.size, small.cell, small.in_channels)
    assert proof.passed, proof.checks
    assert proof.first_leak == ""
    assert len(proof.checks) == 6
    assert len(proof.channels) == len(proof.strides) == len(small.stages)


@every
def test_gradients_of_both_backends_are_equal(small: Small) -> None:
    fast = make_encoder(small).double().train()
    for parameter in fast.parameters():
        if parameter.ndim <= 1:
            nn.init.normal_(parameter, 1.0, 0.3)
    reference = copy.deepcopy(fast)
    reference.backend = "reference"
    crops, mask = make_batch(small)
    grads, buffers = [], []
    for encoder in (reference, fast):
        torch.manual_seed(3)
        maps = encoder(crops, mask).dense()
        weights = torch.Generator().manual_seed(5)
        sum(
            (y * torch.randn(y.shape, generator=weights, dtype=y.dtype)).mean() for y in maps
        ).backward()
        grads.append({n: p.grad for n, p in encoder.named_parameters() if p.grad is not None})
        buffers.append(dict(encoder.named_buffers()))
    assert grads[0].keys() == grads[1].keys()
    scale = max(float(g.abs().max()) for g in grads[0].values())
    for name, expected in grads[0].items():
        assert float((expected - grads[1][name]).abs().max()) < 1e-9 * scale, name
    for name, expected in buffers[0].items():
        torch.testing.assert_close(buffers[1][name], expected)


@every
def test_keys_and_weights_survive_a_round_trip(small: Small) -> None:
    network = small.build()
    keys, kinds = list(network.state_dict()), [type(m) for m in network.modules()]
    twin = copy.deepcopy(network)
    for parameter in twin.parameters():
        nn.init.normal_(parameter)
    encoder = SparseEncoder(network, small.stages, len(small.size))
    assert list(encoder.network.state_dict()) == keys
    encoder.network.load_state_dict(twin.state_dict(), strict=True)
    restore_dense(network)
    assert [type(m) for m in network.modules()] == kinds
    assert not any("mask_slot" in vars(m) for m in network.modules())
    small.build().load_state_dict(network.state_dict(), strict=True)
    for name, value in network.state_dict().items():
        assert torch.equal(value, twin.state_dict()[name]), name


def test_a_resnet_sees_only_its_own_cell_when_isolated() -> None:
    """3 x 3 kernels cannot bridge a hidden cell, so separated cells cannot see each other."""
    small = LARGE["timm/resnet18"]
    encoder = make_encoder(small).double().eval()
    visible = torch.zeros(1, 3, 3, dtype=torch.bool)
    visible[0, 0, 0] = visible[0, 2, 2] = True
    mask = type(draw_mask((2, 2), (1, 1)))(visible, (32, 32))
    crops = torch.randn(1, 3, 96, 96, dtype=torch.float64)
    other = crops.clone()
    other[..., 64:, 64:] = torch.randn(3, 32, 32)
    for backend in ("packed", "reference"):
        encoder.backend = backend
        first, second = (encoder(x, mask).dense()[3] for x in (crops, other))
        assert torch.equal(first[..., 0, 0], second[..., 0, 0])
        assert not torch.equal(first[..., 2, 2], second[..., 2, 2])


@pytest.mark.parametrize("small", OWN.values(), ids=OWN)
def test_cells_smaller_than_the_stride_run_on_the_reference(small: Small) -> None:
    """A coarse site is visible if any of its cells is; the packed backend refuses by name."""
    ndim = len(small.size)
    encoder = make_encoder(small, backend="reference").double().eval()
    mask = draw_mask([6] * ndim, [2] * ndim, 0.6)
    crops = torch.randn(2, 1, *small.size, dtype=torch.float64)
    maps = encoder(crops, mask)
    coarse = mask.at(maps[2].shape[2:])
    assert maps[2].shape[2:] == (3,) * ndim
    assert coarse.double().mean() > 0
    assert (maps[2].abs().sum(1, keepdim=True) > 0).logical_and(~coarse).sum() == 0
    encoder.backend = "packed"
    with pytest.raises(ValueError, match=r"layer 'layer2.0': .*backend=\"reference\""):
        encoder(crops, mask)
    proof = prove(make_encoder(small, backend="reference"), small.size, 2)
    assert proof.passed, proof.checks
    assert "refused" in proof.checks[2].detail
    assert not prove(make_encoder(small), small.size, 2).passed
