"""The contract of a masked backbone: proof, equal gradients, a strict round trip."""

import copy

import torch
from both_backends import draw_mask
from small_networks import Small, plain_cnn
from torch import Tensor, nn

from spark3d.sparse import CellMask, SparseEncoder, restore_dense
from spark3d.sparse.leaks import prove


def make_encoder(small: Small, **options: object) -> SparseEncoder:
    return SparseEncoder(small.build(), small.stages, len(small.size), **options)


def make_batch(
    small: Small, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[Tensor, CellMask]:
    grid = [n // c for n, c in zip(small.size, small.cell, strict=True)]
    crops = torch.randn(2, small.in_channels, *small.size, dtype=dtype)
    return crops, draw_mask(grid, small.cell, 0.6, seed=seed)


def plain_encoder() -> SparseEncoder:
    """Of the plain 2D network, in float64."""
    return SparseEncoder(plain_cnn(2), ("stem", "layer1", "layer2"), 2).double()


def plain_batch() -> tuple[Tensor, CellMask]:
    """Two crops for it, and a mask of cells of 4."""
    return torch.randn(2, 1, 12, 16, dtype=torch.float64), draw_mask((3, 4), (4, 4))


def assert_proof_holds(small: Small) -> None:
    """No leak, packed equals reference, dense where nothing is hidden, undone exactly."""
    proof = prove(make_encoder(small), small.size, small.cell, small.in_channels)
    assert proof.passed, proof.checks
    assert proof.first_leak == ""
    assert len(proof.checks) == 6
    assert len(proof.channels) == len(proof.strides) == len(small.stages)


def assert_gradients_equal(small: Small) -> None:
    """Parameters' gradients and buffers after a training step agree between the backends."""
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


def assert_round_trip(small: Small) -> None:
    """Keys, classes and weights survive conversion; checkpoints load strictly both ways."""
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
