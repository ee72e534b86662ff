"""Bugs of predecessors, planted one by one: each must be caught, and by the layer that has it."""

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from both_backends import draw_mask
from small_networks import ALL, plain_cnn
from torch import Tensor, nn

from spark3d.sparse import CellMask, Masked, SparseEncoder, functional, register_masked
from spark3d.sparse.convert import sparsify
from spark3d.sparse.leaks import Proof, prove
from spark3d.sparse.slot import MaskSlot, Run

STAGES = ("0", "1", "2")


class Norm(nn.InstanceNorm2d):
    """A layer whose masked form a test plants a bug in."""


class Stem(nn.Conv2d):
    """A stem convolution whose masked form a test plants a bug in."""


class Response(nn.Module):
    """Global response normalisation in channels-first layout."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        norm = x.flatten(2).norm(dim=2)[..., None, None]
        return x + self.weight * x * norm / (norm.mean(1, keepdim=True) + 1e-6)


def network(middle: nn.Module) -> nn.Module:
    """Stem, the layer in question, and a layer that spreads what it did."""
    return nn.Sequential(
        nn.Sequential(Stem(1, 4, 3, padding=1), nn.GELU()),
        nn.Sequential(nn.Conv2d(4, 4, 3, 2, 1), middle),
        nn.Sequential(nn.GELU(), nn.Conv2d(4, 4, 3, padding=1)),
    )


def proof_of(middle: nn.Module, encoder: type[SparseEncoder] = SparseEncoder) -> Proof:
    return prove(encoder(network(middle), STAGES, 2), (12, 16), 4)


class SoundStem(Masked):
    def masked(self, run: Run, x: Tensor) -> Tensor:
        layer: Any = self
        padding = tuple((p, p) for p in layer.padding)
        return run.ops.conv(
            x, run.where, layer.weight, layer.bias, layer.stride, padding, layer.dilation, 1
        )


class SoundNorm(Masked):
    def masked(self, run: Run, x: Tensor) -> Tensor:
        return run.ops.group_norm(x, run.where, x.shape[1], None, None, 1e-5)


class SoundResponse(Masked):
    def masked(self, run: Run, x: Tensor) -> Tensor:
        layer: Any = self
        norm = run.ops.sample_l2(x, run.where)
        share = run.ops.over_sites(norm / (norm.mean(1, keepdim=True) + 1e-6), x, run.where)
        return x + layer.weight * x * share


SOUND = {Stem: SoundStem, Norm: SoundNorm, Response: SoundResponse}


@pytest.fixture(autouse=True)
def _sound() -> None:
    """Every layer starts with a masked form that is right."""
    for dense, masked in SOUND.items():
        register_masked(dense, masked)


@pytest.mark.parametrize("middle", [Norm, Response])
def test_without_a_bug_the_proof_holds(middle: Callable[..., nn.Module]) -> None:
    proof = proof_of(middle(4))
    assert proof.passed, proof.checks


class UnmaskedInput(SparseEncoder):
    """The input is not masked before the stem, only the stem's output is (nnssl)."""

    def _enter(self, crops: Tensor, mask: CellMask) -> tuple[Tensor, Run]:
        _, run = super()._enter(crops, mask)
        return (crops, run) if self.backend == "reference" else super()._enter(crops, mask)


class StemOnRawInput(Masked):
    """Convolves whatever the hidden voxels hold, then hides the output."""

    def masked(self, run: Run, x: Tensor) -> Tensor:
        if run.ops is not functional:
            return SoundStem.masked(self, run, x)  # pyright: ignore[reportArgumentType]
        return functional.hide(self.dense_class.forward(self, x), run.where)


def test_an_input_that_is_masked_only_after_the_stem_leaks_a_rim() -> None:
    register_masked(Stem, StemOnRawInput)
    proof = proof_of(Norm(4), UnmaskedInput)
    assert not proof.checks[0].passed
    assert proof.first_leak == "0.0"


def test_a_stem_that_reads_hidden_sites_is_found_even_if_the_input_is_masked() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = Stem(4, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.stem(x)

    register_masked(Stem, StemOnRawInput)
    proof = proof_of(Twice())
    assert not proof.checks[1].passed
    assert proof.first_leak == "1.1.stem"


class MixedSamples(Masked):
    """Gathered rows reshaped with samples interleaved, so that statistics mix them (HySparK)."""

    def masked(self, run: Run, x: Tensor) -> Tensor:
        if run.ops is not functional:
            return SoundNorm.masked(self, run, x)  # pyright: ignore[reportArgumentType]
        keep = run.where.at(x.shape[2:])[:, 0]
        rows = x.movedim(1, -1)[keep]
        mixed = rows.view(-1, run.batch, rows.shape[1])
        mixed = (mixed - mixed.mean(0)) / (mixed.var(0, correction=0) + 1e-5).sqrt()
        y = torch.zeros_like(x.movedim(1, -1))
        y[keep] = mixed.reshape(rows.shape)
        return y.movedim(-1, 1)


def test_an_instance_norm_that_mixes_samples_is_found() -> None:
    register_masked(Norm, MixedSamples)
    proof = proof_of(Norm(4))
    assert proof.first_leak == "1.1"
    assert not proof.checks[2].passed


class ResponseOverHidden(Masked):
    """The norm runs over hidden sites too, where GELU(bias) is not zero (mmpretrain)."""

    def masked(self, run: Run, x: Tensor) -> Tensor:
        return self.dense_class.forward(self, x)


class ResponseOverBatch(Masked):
    """The norm runs over the whole batch (ConvNeXt V2, Minkowski)."""

    def masked(self, run: Run, x: Tensor) -> Tensor:
        layer: Any = self
        norm = run.ops.sample_l2(x, run.where).square().sum(0, keepdim=True).sqrt()
        share = (norm / (norm.mean(1, keepdim=True) + 1e-6)).expand(run.batch, -1)
        return x + layer.weight * x * run.ops.over_sites(share, x, run.where)


def test_a_response_norm_over_hidden_sites_is_found() -> None:
    register_masked(Response, ResponseOverHidden)
    proof = proof_of(Response(4))
    assert not proof.checks[1].passed
    assert proof.first_leak == "1.1"


def test_a_response_norm_over_the_batch_is_found() -> None:
    """Both backends agree on the bug, so the comparison with nothing hidden has to find it."""
    register_masked(Response, ResponseOverBatch)
    proof = proof_of(Response(4))
    assert [check.passed for check in proof.checks] == [True, True, True, True, False, True]


def test_a_visible_count_summed_over_the_batch_is_refused() -> None:
    """A mask knows its count per sample; a batch that does not share one is no mask."""
    mask = draw_mask((4, 4), (2, 2), 0.5, batch=3)
    assert mask.n_visible == 8
    uneven = mask.visible.clone()
    uneven[0, 0, 0] ^= True
    with pytest.raises(ValueError, match="same number of cells"):
        CellMask(uneven, (2, 2))


def test_a_map_coarser_than_the_grid_is_not_treated_as_all_visible() -> None:
    """nnssl: a 5^3 bottleneck under a 10^3 mask counted as visible everywhere, without a word."""
    visible = torch.zeros(1, 4, 4, dtype=torch.bool)
    visible[0, :2, :2] = True
    mask = CellMask(visible, (4, 4))
    assert mask.at((2, 2)).flatten().tolist() == [True, False, False, False]
    with pytest.raises(ValueError, match="neither a multiple nor a divisor"):
        mask.at((3, 3))


def test_a_mask_in_a_module_global_would_break_two_views() -> None:
    """A layer that remembers the last mask gives the first view the second one's zeros."""
    encoder = SparseEncoder(plain_cnn(2), ("stem",), 2, "reference").double().eval()
    crops = torch.randn(2, 1, 12, 16, dtype=torch.float64)
    views = [draw_mask((3, 4), (4, 4), seed=seed) for seed in (0, 9)]
    maps = [encoder(crops, view)[0] for view in views]
    for y, view in zip(maps, views, strict=True):
        assert torch.equal(y.abs().sum(1, keepdim=True) > 0, view.at((12, 16)))
    encoder.network(crops)
    holders = [v for m in encoder.modules() for v in vars(m).values() if isinstance(v, CellMask)]
    assert holders == []


def test_rebuilding_layers_would_break_modules_registered_twice() -> None:
    """nnU-Net registers each convolution under two names."""
    small = ALL["monai/dynunet 3d, anisotropic"]
    dense = small.build()
    shared = [n for n, _ in dense.named_modules(remove_duplicate=False)]
    ids = {n: id(m) for n, m in dense.named_modules(remove_duplicate=False)}
    assert len(shared) > len(list(dense.named_modules()))
    sparsify(dense, MaskSlot())
    assert {n: id(m) for n, m in dense.named_modules(remove_duplicate=False)} == ids


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.InstanceNorm2d(4)])
@pytest.mark.parametrize("backend", ["packed", "reference"])
def test_scatter_targets_have_the_outputs_dtype(norm: nn.Module, backend: str) -> None:
    """Under autocast a norm may return another precision than its input had (SparK)."""
    net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), copy.deepcopy(norm), nn.Conv2d(4, 4, 1))
    encoder = SparseEncoder(net, ("1", "2"), 2, backend)
    crops, mask = torch.randn(2, 1, 12, 16), draw_mask((3, 4), (4, 4))
    with torch.autocast("cpu", torch.bfloat16):
        low = encoder(crops, mask).dense()
    full = encoder(crops, mask).dense()
    low[1].float().sum().backward()
    for a, b in zip(low, full, strict=True):
        assert (a.float() - b).detach().abs().max() < 0.1
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in net[0].parameters())


def test_a_layer_that_changes_after_conversion_is_reported() -> None:
    """What conversion left behind is named."""
    encoder = SparseEncoder(network(Norm(4)), STAGES, 2)
    encoder.network[2][1].__dict__["mask_slot"] = SimpleNamespace(slot=encoder.slot, name="x")
    encoder.network[2][0].mask_slot = "left"
    proof = prove(encoder, (12, 16), 4)
    assert [check.passed for check in proof.checks[-2:]] == [True, False]
    assert proof.checks[-1].layer == "2.0"
