"""The proof itself: what it takes for a map, and that what mixes sites is found in any layout."""

import pytest
import torch
from both_backends import draw_mask
from torch import Tensor, nn

from spark3d.sparse import Masked, Pointwise, SparseEncoder, register_masked
from spark3d.sparse.leaks import prove
from spark3d.sparse.slot import Run


class ChannelsLast(nn.Module):
    """Runs its layer on `(b, *size, c)`, as a ConvNeXt block does."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.movedim(1, -1)).movedim(-1, 1)


class Mixing(nn.Module):
    """Subtracts the mean over the sites of a channels-last map, hidden ones included."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(dim=tuple(range(1, x.ndim - 1)), keepdim=True)


class Elsewhere(Masked):
    """Leaves the dense layer as it is, which is wrong for `Mixing`."""

    def masked(self, run: Run, x: Tensor) -> Tensor:
        return self.dense_forward(x)


def network(ndim: int, layer: nn.Module, channels: int) -> nn.Module:
    conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[ndim]
    return nn.Sequential(
        conv(1, channels, 2, 2), ChannelsLast(layer), conv(channels, 4, 3, padding=1)
    )


@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize("channels", [6, 12])
def test_channels_last_maps_are_known_whatever_their_channels(ndim: int, channels: int) -> None:
    """12 channels could be sites: a multiple of the grid, as the 96 of a ConvNeXt are."""
    encoder = SparseEncoder(network(ndim, nn.LayerNorm(channels), channels), ("0", "2"), ndim)
    proof = prove(encoder, (12, 12, 6)[-ndim:], (4, 4, 2)[-ndim:])
    assert proof.passed, proof.checks


@pytest.mark.parametrize("channels", [6, 12])
def test_a_layer_that_mixes_sites_of_a_channels_last_map_is_found(channels: int) -> None:
    register_masked(Mixing, Elsewhere)
    encoder = SparseEncoder(network(2, Mixing(), channels), ("0", "2"), 2)
    proof = prove(encoder, (12, 12), 4)
    assert not proof.checks[1].passed
    assert proof.first_leak == "1.layer"


def test_one_visible_cell_per_sample_is_not_taken_for_a_whole_map() -> None:
    encoder = SparseEncoder(network(2, nn.LayerNorm(4), 4), ("0", "2"), 2)
    assert prove(encoder, (8, 8), 4, ratio=0.75).passed


def test_the_encoder_that_is_checked_stays_as_it_is() -> None:
    encoder = SparseEncoder(
        nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2)), ("1",), 2
    )
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    prove(encoder, (8, 8), 4)
    assert encoder.backend == "packed"
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_layer_of_single_sites_is_registered_as_pointwise() -> None:
    class Squash(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x / (1 + x.abs())

    register_masked(Squash, Pointwise)
    encoder = SparseEncoder(nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), Squash()), ("0", "1"), 2)
    assert prove(encoder, (8, 8), 4).passed
    before, after = encoder(torch.randn(2, 1, 8, 8), draw_mask((2, 2), (4, 4)))
    assert torch.equal(after, before / (1 + before.abs()))


@pytest.mark.parametrize("inplace", [True, False])
def test_a_stage_that_is_changed_afterwards_is_refused(inplace: bool) -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(inplace), nn.Conv2d(2, 2, 1))
    encoder = SparseEncoder(net, ("0", "2"), 2)
    crops, mask = torch.randn(2, 1, 8, 8), draw_mask((2, 2), (4, 4))
    if not inplace:
        assert (encoder(crops, mask)[0] < 0).any()
        return
    with pytest.raises(ValueError, match="stage '0': a later layer changes its output in place"):
        encoder(crops, mask)
