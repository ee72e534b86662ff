"""The encoder: stages, early stop, and what it refuses."""

from collections.abc import Callable

import pytest
import torch
from both_backends import draw_mask
from contract import plain_batch, plain_encoder
from monai.networks import nets
from small_networks import plain_cnn
from torch import Tensor, nn

from spark3d.sparse import CellMask, SparseEncoder

STAGES = ("stem", "layer1", "layer2")
both = pytest.mark.parametrize("backend", ["packed", "reference"])


@pytest.fixture
def encoder() -> SparseEncoder:
    return plain_encoder()


@pytest.fixture
def batch() -> tuple[Tensor, CellMask]:
    return plain_batch()


def test_stages_come_fine_to_coarse(encoder: SparseEncoder, batch: tuple) -> None:
    pyramid = encoder(*batch)
    v = batch[1].n_visible
    assert [tuple(y.shape) for y in pyramid] == [
        (2 * v, 4, 4, 4),
        (2 * v, 4, 2, 2),
        (2 * v, 8, 1, 1),
    ]
    assert len(pyramid) == 3
    assert pyramid[0] is pyramid.maps[0]
    dense = pyramid.dense()
    assert dense.dense() is dense
    assert [tuple(y.shape) for y in dense] == [(2, 4, 12, 16), (2, 4, 6, 8), (2, 8, 3, 4)]
    for y in dense:
        assert (y.masked_select(~batch[1].at(y.shape[2:])) == 0).all()


@both
def test_heads_and_decoders_never_run(backend: str, batch: tuple) -> None:
    network = plain_cnn(2)
    calls: list[str] = []
    network.head.register_forward_hook(lambda *_: calls.append("head"))
    network.layer2.register_forward_hook(lambda *_: calls.append("layer2"))
    encoder = SparseEncoder(network, ("stem", "layer1"), 2, backend).double()
    encoder(*batch)
    encoder.dense(batch[0])
    assert calls == []
    network(batch[0])
    assert calls == ["layer2", "head"]


def test_a_segmentation_network_keeps_its_decoder_for_dense_use() -> None:
    network = nets.SegResNet(
        2, init_filters=8, blocks_down=(1, 1), blocks_up=(1,), upsample_mode="deconv"
    )
    crops = torch.randn(2, 1, 8, 8)
    before = network.eval()(crops)
    encoder = SparseEncoder(network, ("down_layers.0", "down_layers.1"), 2)
    encoder(crops, draw_mask((2, 2), (4, 4)))
    assert torch.equal(network(crops), before)


def test_hooks_are_gone_afterwards(encoder: SparseEncoder, batch: tuple) -> None:
    encoder(*batch)
    assert not any(m._forward_hooks for m in encoder.modules())
    with pytest.raises(ValueError, match="layer"):
        encoder(batch[0][..., :4], draw_mask((2, 1), (6, 4)))
    assert not any(m._forward_hooks for m in encoder.modules())
    assert encoder.slot.run is None


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "no stages": (lambda: SparseEncoder(plain_cnn(2), (), 2), "no submodules"),
    "stage": (lambda: SparseEncoder(plain_cnn(2), ("layer9",), 2), r"\['layer9'\].*stem"),
    "backend": (lambda: SparseEncoder(plain_cnn(2), STAGES, 2, "fast"), "choose"),
    "axes": (lambda: SparseEncoder(plain_cnn(2), STAGES, 4), "1, 2 or 3"),
    "checkpoint": (lambda: SparseEncoder(plain_cnn(2), STAGES, 2, checkpoint=["x"]), "names"),
    "twice": (
        lambda: SparseEncoder(SparseEncoder(plain_cnn(2), STAGES, 2).network, STAGES, 2),
        "restore_dense",
    ),
}


@pytest.mark.parametrize(("build", "message"), REFUSED.values(), ids=REFUSED)
def test_wrong_settings_are_refused(build: Callable[[], object], message: str) -> None:
    # shape hints would stop the unknown backend first
    with pytest.raises((ValueError, TypeError), match=message):
        build()


def test_sizes_that_do_not_fit_name_the_nearest(encoder: SparseEncoder, batch: tuple) -> None:
    with pytest.raises(
        ValueError, match=r"13 voxels are not a multiple of 4 along axis 0.*12 and 16"
    ):
        encoder(torch.zeros(2, 1, 13, 16).double(), batch[1])
    with pytest.raises(ValueError, match="draw the mask for the crops' size"):
        encoder(torch.zeros(2, 1, 8, 16).double(), batch[1])
    with pytest.raises(ValueError, match="spatial axes"):
        encoder(torch.zeros(2, 1, 8, 16, 4).double(), batch[1])


def test_stages_that_cannot_be_captured_are_refused(batch: tuple) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.twice, self.pair, self.never = nn.ReLU(), Pair(), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.pair(self.twice(self.twice(x)))[0]

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Identity()

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x

    for stages, error, message in (
        (("twice", "never"), ValueError, "more than once"),
        (("pair",), TypeError, "tuple"),
        (("never",), ValueError, r"never reached.*never"),
    ):
        with pytest.raises(error, match=message):
            SparseEncoder(Odd(), stages, 2)(*batch)
