"""The encoder: early stop, what it refuses, coexistence, recomputation, copies, threads."""

import copy
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from both_backends import draw_mask
from monai.networks import nets
from small_networks import ALL, plain_cnn
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from spark3d.sparse import CellMask, Masked, SparseEncoder, register_masked, restore_dense, sparsify
from spark3d.sparse.convert import MASKED
from spark3d.sparse.slot import MaskSlot, Run

STAGES = ("stem", "layer1", "layer2")
both = pytest.mark.parametrize("backend", ["packed", "reference"])


@pytest.fixture
def encoder() -> SparseEncoder:
    return SparseEncoder(plain_cnn(2), STAGES, 2).double()


@pytest.fixture
def batch() -> tuple[Tensor, CellMask]:
    return torch.randn(2, 1, 12, 16, dtype=torch.float64), draw_mask((3, 4), (4, 4))


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


def restored(network: nn.Module) -> nn.Module:
    restore_dense(network)
    return network


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


def test_two_encoders_two_masks_and_dense_use_coexist(batch: tuple) -> None:
    first, second = (SparseEncoder(plain_cnn(2), STAGES, 2).double() for _ in range(2))
    crops, mask = batch
    other = draw_mask((3, 4), (4, 4), seed=9)
    for encoder in (first, second):
        encoder.eval()
    alone = [
        first(crops, mask)[2],
        first(crops, other)[2],
        second(crops, mask)[2],
        first.dense(crops)[2],
    ]
    a, d, b, c = (
        first(crops, mask)[2],
        first.dense(crops)[2],
        first(crops, other)[2],
        second(crops, mask)[2],
    )
    assert all(map(torch.equal, alone, [a, b, c, d]))


def test_two_views_give_the_sum_of_their_gradients(encoder: SparseEncoder, batch: tuple) -> None:
    crops, mask = batch
    other = draw_mask((3, 4), (4, 4), seed=9)
    encoder.eval()

    def grads(*masks: CellMask) -> list[Tensor]:
        encoder.zero_grad()
        sum(encoder(crops, m)[2].square().sum() for m in masks).backward()
        return [p.grad.clone() for p in encoder.parameters() if p.grad is not None]

    for joint, one, two in zip(grads(mask, other), grads(mask), grads(other), strict=True):
        torch.testing.assert_close(joint, one + two)


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


def test_threads_do_not_share_masks(encoder: SparseEncoder, batch: tuple) -> None:
    crops = batch[0]
    encoder.eval()
    masks = [draw_mask((3, 4), (4, 4), seed=s) for s in range(4)]
    expected = [encoder(crops, mask)[2] for mask in masks]
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(5):
            if not torch.equal(encoder(crops, masks[number])[2], expected[number]):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_copies_and_pickles_work_and_are_independent(encoder: SparseEncoder, batch: tuple) -> None:
    encoder.eval()
    expected = encoder(*batch)[2]
    twin = copy.deepcopy(encoder)
    assert twin.slot is not encoder.slot
    assert all(m.mask_slot.slot is twin.slot for m in twin.modules() if isinstance(m, Masked))
    assert torch.equal(twin(*batch)[2], expected)
    nn.init.zeros_(twin.network.stem[0].weight)
    assert torch.equal(encoder(*batch)[2], expected)
    network = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2), nn.Softmax2d())
    sparsify(network, MaskSlot())
    again = pickle.loads(pickle.dumps(network))
    assert [type(m) for m in again.modules()] == [type(m) for m in network.modules()]
    restore_dense(again)
    assert type(again[2]) is nn.Softmax2d


def test_a_module_registered_twice_stays_one_module() -> None:
    conv = nn.Conv2d(1, 1, 3, padding=1)
    network = nn.Sequential(nn.Sequential(conv), conv)
    hook = conv.register_forward_hook(lambda *_: None)
    sparsify(network, MaskSlot())
    assert network[0][0] is network[1] is conv
    assert hook.id in conv._forward_hooks
    assert list(network.state_dict()) == ["0.0.weight", "0.0.bias", "1.weight", "1.bias"]
    assert network[0][0].weight is network[1].weight


COMPILED = """
import torch
from both_backends import draw_mask
from small_networks import plain_cnn
from spark3d.sparse import SparseEncoder, restore_dense

encoder = SparseEncoder(plain_cnn(2), ("stem", "layer1", "layer2"), 2).double().eval()
compiled = torch.compile(encoder, backend="aot_eager")
crops = torch.randn(2, 1, 12, 16, dtype=torch.float64)
for seed, training in ((0, False), (9, False), (0, True), (9, True)):
    encoder.train(training)
    mask = draw_mask((3, 4), (4, 4), seed=seed)
    grads = []
    for run in (encoder, compiled):
        encoder.zero_grad()
        maps = run(crops, mask).maps
        sum(y.square().sum() for y in maps).backward()
        grads.append([*maps, *(p.grad for p in encoder.parameters() if p.grad is not None)])
    for expected, found in zip(*grads, strict=True):
        torch.testing.assert_close(found, expected)
network = encoder.network.eval()
restore_dense(network)
whole = torch.compile(network, backend="aot_eager", fullgraph=True)
torch.testing.assert_close(whole(crops), network(crops))
print("equal")
"""


@pytest.mark.slow
def test_compiling_changes_no_number() -> None:
    """Masked with graph breaks, restored as one graph.

    In a process of its own, without run-time type checks, which the compiler cannot trace.
    """
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:torch", "-c", COMPILED],
        cwd=Path(__file__).parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.strip() == "equal", done.stderr
