"""The full contract over a table of networks: proof, gradients, strict round trips."""

import copy

import pytest
import torch
from both_backends import draw_mask
from contract import assert_gradients_equal, assert_proof_holds, assert_round_trip, make_encoder
from small_networks import ALL, OWN, RESENC, Small, timm_network

from spark3d.sparse.leaks import prove

every = pytest.mark.parametrize("small", [*ALL.values(), *RESENC.values()], ids=[*ALL, *RESENC])


@pytest.fixture(autouse=True)
def _extra(request: pytest.FixtureRequest) -> None:
    if "nnunet" in request.node.name:
        pytest.importorskip("dynamic_network_architectures", reason="needs the extra `nnunet`")


@every
def test_the_proof_holds(small: Small) -> None:
    assert_proof_holds(small)


@every
def test_gradients_of_both_backends_are_equal(small: Small) -> None:
    assert_gradients_equal(small)


@every
def test_keys_and_weights_survive_a_round_trip(small: Small) -> None:
    assert_round_trip(small)


def test_a_resnet_sees_only_its_own_cell_when_isolated() -> None:
    """3 x 3 kernels cannot bridge a hidden cell, so separated cells cannot see each other."""
    network = Small(timm_network("resnet18"), ("layer4",), (96, 96), (32, 32), 3)
    encoder = make_encoder(network).double().eval()
    visible = torch.zeros(1, 3, 3, dtype=torch.bool)
    visible[0, 0, 0] = visible[0, 2, 2] = True
    mask = type(draw_mask((2, 2), (1, 1)))(visible, (32, 32))
    crops = torch.randn(1, 3, 96, 96, dtype=torch.float64)
    other = crops.clone()
    other[..., 64:, 64:] = torch.randn(3, 32, 32)
    for backend in ("packed", "reference"):
        encoder.backend = backend
        first, second = (encoder(x, mask).dense()[0] for x in (crops, other))
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


@pytest.mark.parametrize("backend", ["packed", "reference"])
@pytest.mark.parametrize("small", OWN.values(), ids=OWN)
def test_with_nothing_hidden_the_masked_network_is_the_dense_one(
    small: Small, backend: str
) -> None:
    """In evaluation and in training, with the same running statistics (SparK's spec, 7)."""
    encoder = make_encoder(small, backend=backend).double()
    twin = copy.deepcopy(encoder)
    grid = [n // c for n, c in zip(small.size, small.cell, strict=True)]
    mask = draw_mask(grid, small.cell, 0.0)
    crops = torch.randn(2, 1, *small.size, dtype=torch.float64)
    for training in (False, True, False):
        encoder.train(training)
        twin.train(training)
        masked, dense = encoder(crops, mask).dense(), twin.dense(crops)
        for a, b in zip(masked, dense, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(dict(encoder.named_buffers()), dict(twin.named_buffers()))
