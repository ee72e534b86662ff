"""Bugs of predecessors in how an encoder is used, planted: each is caught by what is tested here.

mask in a module global: `plain_inference`, `two_views`, here
no gradient synchronisation under torchrun: tests/objectives/test_data_parallel.py
visible count summed over the batch: the proof, here; an uneven mask, test_predecessor_bugs.py
InstanceNorm that mixes samples: the proof, test_predecessor_bugs.py
input not masked before the stem: the proof, test_predecessor_bugs.py
map coarser than the grid taken for all visible: the proof, here
decoder initialisation shadowed: tests/models/test_decoders.py
GRN over hidden sites or over the batch: the proof, test_predecessor_bugs.py
rebuilt layers, modules registered twice: the round trip of every backbone, here
scatter target with the input's dtype: `low_precision`, here
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import pytest
import torch
from both_backends import draw_mask
from contract import assert_round_trip
from small_networks import Small, plain_cnn
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from spark3d.sparse import CellMask, Masked, SparseEncoder, functional, register_masked
from spark3d.sparse.leaks import prove
from spark3d.sparse.slot import LayerSlot, MaskSlot, Run

both = pytest.mark.parametrize("backend", ["packed", "reference"])


class GlobalSlot(MaskSlot):
    """The mask of the last forward, whoever asks."""

    current: ClassVar[Run | None] = None

    @property
    def run(self) -> Run | None:
        return GlobalSlot.current

    @property
    def told(self) -> bool:
        return True

    @contextmanager
    def use(self, run: Run | None) -> Iterator[None]:
        GlobalSlot.current = run
        yield


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    yield
    GlobalSlot.current = None


def with_global_mask(encoder: SparseEncoder) -> SparseEncoder:
    encoder.slot = GlobalSlot()
    for layer in encoder.modules():
        if isinstance(layer, Masked):
            layer.mask_slot = LayerSlot(encoder.slot, layer.mask_slot.name)
    return encoder


def two_convolutions() -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.GELU(), nn.Conv2d(4, 4, 3, padding=1))


class Recomputing(nn.Module):
    """A user's block with activation checkpointing of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = two_convolutions()

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.convs, x, use_reentrant=False)


def plain_inference(encoder: SparseEncoder) -> None:
    """The network is the dense network again once a masked forward is over."""
    crops = torch.randn(2, 1, 12, 16, dtype=torch.float64)
    before = encoder.network(crops)
    encoder(crops, draw_mask((3, 4), (4, 4)))
    assert torch.equal(encoder.network(crops), before)


@both
def test_a_mask_in_a_module_global_breaks_plain_inference(backend: Any) -> None:
    encoder = SparseEncoder(plain_cnn(2), ("stem", "layer2"), 2, backend).double().eval()
    plain_inference(encoder)
    with pytest.raises((AssertionError, ValueError, RuntimeError, IndexError)):
        plain_inference(with_global_mask(encoder))


def two_views(encoder: SparseEncoder) -> None:
    """Gradients of two views are the sum of both, also where activations are recomputed."""
    crops = torch.randn(2, 1, 12, 16, dtype=torch.float64)
    masks = [draw_mask((3, 4), (4, 4), seed=seed) for seed in (0, 9)]

    def grads(*chosen: CellMask) -> list[Tensor]:
        encoder.zero_grad()
        sum(encoder(crops, mask)[0].square().sum() for mask in chosen).backward()
        return [p.grad.clone() for p in encoder.parameters()]

    for joint, one, two in zip(grads(*masks), grads(masks[0]), grads(masks[1]), strict=True):
        torch.testing.assert_close(joint, one + two)


@both
def test_a_mask_in_a_module_global_breaks_two_views_that_are_recomputed(backend: Any) -> None:
    def encoder(*names: str) -> SparseEncoder:
        block = two_convolutions() if names else Recomputing()
        net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), block, nn.Conv2d(4, 4, 3, padding=1))
        return SparseEncoder(net, ("2",), 2, backend, checkpoint=names).double()

    two_views(encoder("1"))
    with pytest.raises(RuntimeError, match=r"recomputed during backward.*checkpoint="):
        two_views(encoder())
    with pytest.raises((AssertionError, RuntimeError, ValueError)):
        two_views(with_global_mask(encoder()))


class Norm(nn.InstanceNorm2d):
    """A norm whose masked form a test plants a bug in."""


class SummedCount(Masked):
    """Statistics of one sample over the count of visible sites of the whole batch (HySparK)."""

    def masked(self, run: Run, x: Tensor) -> Tensor:
        share = 1 / run.batch
        mean = share * run.ops.sample_mean(x, run.where)
        centred = x - run.ops.over_sites(mean, x, run.where)
        var = share * run.ops.sample_mean(centred.square(), run.where)
        return centred * run.ops.over_sites((var + 1e-5).rsqrt(), x, run.where)


def test_a_visible_count_summed_over_the_batch_is_found() -> None:
    """Both backends agree on it, so the comparison with nothing hidden has to find it."""
    register_masked(Norm, SummedCount)
    net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), Norm(4))
    proof = prove(SparseEncoder(net, ("1",), 2), (12, 16), 4)
    assert [check.passed for check in proof.checks] == [True, True, True, True, False, True]


class AllVisibleIfCoarse(CellMask):
    """A map coarser than the grid counts as visible everywhere (nnssl)."""

    def at(self, size: Any) -> Tensor:
        if any(n < g for n, g in zip(size, self.grid, strict=True)):
            return torch.ones(self.batch, 1, *size, dtype=torch.bool)
        return super().at(size)


class CoarseIsVisible(SparseEncoder):
    def _enter(self, crops: Tensor, mask: CellMask) -> tuple[Tensor, Run]:
        x, run = super()._enter(crops, mask)
        if self.backend == "packed":
            return x, run
        return x, Run(run.ops, AllVisibleIfCoarse(mask.visible, mask.cell_size), run.batch)


def test_a_coarser_map_that_counts_as_all_visible_is_found() -> None:
    def proof_of(kind: type[SparseEncoder]) -> Any:
        net = nn.Sequential(nn.Conv2d(1, 4, 8, 8), nn.GELU(), nn.Conv2d(4, 4, 3, padding=1))
        return prove(kind(net, ("0", "2"), 2, "reference"), (32, 48), 4, ratio=0.8)

    assert proof_of(SparseEncoder).passed
    found = proof_of(CoarseIsVisible)
    assert not found.checks[1].passed
    assert found.first_leak == "2"


class Twice(nn.Module):
    """A convolution registered under two names, as nnU-Net registers its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3, padding=1)
        self.all = nn.Sequential(self.conv, nn.BatchNorm2d(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.all(x)


class Rebuilding(SparseEncoder):
    """Conversion by new layers in place of the old ones, one name at a time (nnU-Net ports)."""

    def __init__(self, network: nn.Module, *rest: Any) -> None:
        for name, layer in list(network.named_modules(remove_duplicate=False)):
            if isinstance(layer, nn.Conv2d):
                parent, _, leaf = name.rpartition(".")
                new = nn.Conv2d(layer.in_channels, layer.out_channels, 3, padding=1)
                new.load_state_dict(layer.state_dict())
                setattr(network.get_submodule(parent), leaf, new)
        super().__init__(network, *rest)


def test_rebuilt_layers_break_modules_that_are_registered_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    small = Small(Twice, ("all",), (8, 8), (4, 4))
    assert_round_trip(small)
    monkeypatch.setattr("contract.SparseEncoder", Rebuilding)
    with pytest.raises(AssertionError):
        assert_round_trip(small)


def low_precision(backend: Any) -> None:
    """Under autocast a norm may return another precision than its input had."""
    net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), Widening(4), nn.Conv2d(4, 2, 1))
    encoder = SparseEncoder(net, ("1", "2"), 2, backend)
    crops, mask = torch.randn(2, 1, 12, 16), draw_mask((3, 4), (4, 4))
    full = encoder(crops, mask).dense()
    with torch.autocast("cpu", torch.bfloat16):
        low = encoder(crops, mask).dense()
    assert low[0].dtype == torch.float32
    for a, b in zip(low, full, strict=True):
        assert (a.float() - b).detach().abs().max() < 0.1


class Widening(nn.BatchNorm2d):
    """A batch norm that answers in float32 whatever it gets."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.float())


class MaskedWidening(Masked):
    def masked(self, run: Run, x: Tensor) -> Tensor:
        layer: Any = self
        norm: Callable[[Tensor], Tensor] = lambda rows: nn.functional.batch_norm(  # noqa: E731
            rows.float(), None, None, layer.weight, layer.bias, training=True
        )
        return run.ops.row_norm(x, run.where, norm)


def into_the_dtype_of_the_input(x: Tensor, mask: CellMask, norm: Any) -> Tensor:
    """The scatter of official SparK: into a copy of the input."""
    visible, y = mask.at(x.shape[2:])[:, 0], torch.zeros_like(x.movedim(1, -1))
    y[visible] = norm(x.movedim(1, -1)[visible])
    return y.movedim(-1, 1)


def test_a_scatter_target_with_the_dtype_of_the_input_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    register_masked(Widening, MaskedWidening)
    for backend in ("packed", "reference"):
        low_precision(backend)
    monkeypatch.setattr(functional, "row_norm", into_the_dtype_of_the_input)
    with pytest.raises((AssertionError, RuntimeError)):
        low_precision("reference")


def test_deep_copies_do_not_share_the_mask() -> None:
    encoder = SparseEncoder(plain_cnn(2), ("layer2",), 2).double().eval()
    twin, crops = copy.deepcopy(encoder), torch.randn(2, 1, 12, 16, dtype=torch.float64)
    mask, other = (draw_mask((3, 4), (4, 4), seed=seed) for seed in (0, 9))
    expected = encoder(crops, mask)[0]
    inside: list[Tensor] = []
    handle = encoder.network.layer1.register_forward_hook(
        lambda *_: inside.append(twin(crops, other)[0])
    )
    assert torch.equal(encoder(crops, mask)[0], expected)
    handle.remove()
    assert torch.equal(inside[0], twin(crops, other)[0])
