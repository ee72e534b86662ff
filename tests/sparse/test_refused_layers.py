"""Layers without a masked meaning are refused by name; a user's own is registered with one call."""

import copy

import pytest
import torch
from both_backends import restored
from contract import plain_batch
from torch import Tensor, nn

from spark3d.sparse import CellMask, Masked, SparseEncoder, register_masked
from spark3d.sparse.convert import MASKED
from spark3d.sparse.slot import Run

both = pytest.mark.parametrize("backend", ["packed", "reference"])


@pytest.fixture
def batch() -> tuple[Tensor, CellMask]:
    return plain_batch()


def test_unknown_layers_are_refused_by_name_only_when_they_meet_hidden_cells(batch: tuple) -> None:
    class Mixing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.roll(1, -1)

    network = nn.ModuleDict({"stem": nn.Conv2d(1, 2, 3, padding=1), "roll": Mixing()})
    network = nn.Sequential(
        nn.Sequential(network["stem"], network["roll"]), nn.Upsample(scale_factor=2)
    )
    encoder = SparseEncoder(network, ("0",), 2).double()
    encoder.dense(batch[0])
    with pytest.raises(
        TypeError, match=r"layer '0.1' .*Mixing\) cannot be masked.*register_masked"
    ):
        encoder(*batch)
    SparseEncoder(copy.deepcopy(restored(network)), ("0.0",), 2).double()(*batch)


UNMASKABLE = {
    "reflect": (nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect"), "padding_mode='reflect'"),
    "indices": (nn.MaxPool2d(2, return_indices=True), "return_indices"),
    "adaptive": (nn.AdaptiveAvgPool2d(3), "only to 1"),
    "divisor": (nn.AvgPool2d(2, divisor_override=3), "divisor_override"),
    "tracking": (nn.InstanceNorm2d(1, track_running_stats=True), "track_running_stats"),
    "adaptive, listed": (nn.AdaptiveAvgPool2d([3, 1]), "only to 1"),
    "spatial layer norm": (nn.LayerNorm([1, 12, 16]), "LayerNorm over normalized_shape"),
    "spatial RMS norm": (nn.RMSNorm([12, 16]), "RMSNorm over normalized_shape"),
    "softmax": (nn.Softmax2d(), "not defined"),
    "transposed": (nn.ConvTranspose2d(1, 1, 2, 2), "not defined"),
    "lp pool": (nn.LPPool2d(2, 2), "not defined"),
    "attention": (nn.MultiheadAttention(16, 1), "not defined"),
}


@both
@pytest.mark.parametrize(("layer", "message"), UNMASKABLE.values(), ids=UNMASKABLE)
def test_options_without_a_meaning_are_refused(
    layer: nn.Module, message: str, backend: str, batch: tuple
) -> None:
    network = nn.Sequential(copy.deepcopy(layer))
    encoder = SparseEncoder(network, ("0",), 2, backend).double()
    with pytest.raises(TypeError, match=rf"layer '0' .*{message}"):
        encoder(*batch)


def test_a_class_derived_from_a_known_layer_is_not_taken_for_it(batch: tuple) -> None:
    class Standardised(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input - input.mean())

    encoder = SparseEncoder(nn.Sequential(Standardised(1, 1, 1)), ("0",), 2).double()
    with pytest.raises(TypeError, match="Standardised"):
        encoder(*batch)


def test_a_users_layer_is_registered_with_one_call(batch: tuple) -> None:
    class Centre(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x - x.mean(dim=tuple(range(2, x.ndim)), keepdim=True)

    class MaskedCentre(Masked):
        def masked(self, run: Run, x: Tensor) -> Tensor:
            return x - run.ops.over_sites(run.ops.sample_mean(x, run.where), x, run.where)

    register_masked(Centre, MaskedCentre)
    encoder = SparseEncoder(nn.Sequential(Centre()), ("0",), 2).double()
    packed = encoder(*batch).dense()[0]
    encoder.backend = "reference"
    torch.testing.assert_close(packed, encoder(*batch)[0])
    keep = batch[1].at(batch[1].size)
    means = [x[k].mean() for x, k in zip(packed, keep, strict=True)]
    torch.testing.assert_close(torch.stack(means), torch.zeros(2).double())
    assert Centre not in MASKED

    class Derived(Centre):
        pass

    with pytest.raises(TypeError, match="Derived"):
        SparseEncoder(nn.Sequential(Derived()), ("0",), 2).double()(*batch)
    with pytest.raises(TypeError, match="say what it does"):
        register_masked(Derived, Masked)
