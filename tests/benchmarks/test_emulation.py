"""An emulation that computes something else is no comparison: it must give the same numbers."""

import copy

import pytest
import torch
from torch import Tensor, nn

from spark3d.benchmarks.cases import NETWORKS, Case, Job, main_cases
from spark3d.benchmarks.core import Contestant, run_job
from spark3d.benchmarks.emulation import GridEncoder, GridSparK
from spark3d.models.backbones import Backbone, build_backbone
from spark3d.models.decoder import LightDecoder, OfficialDecoder
from spark3d.models.densify import Densify
from spark3d.objectives.spark import SparK
from spark3d.sparse.encoder import SparseEncoder
from spark3d.sparse.mask import CellMask, random_mask

SIZE, CELL = (64, 64, 32), (32, 32, 32)
TINY = ("quick_resnet", "quick_convnext")


def tiny(name: str) -> Backbone:
    """A network of the quick bench whose weights, and every normalisation's, are random."""
    net = NETWORKS[name]
    backbone = build_backbone(net.backbone, 3, 1, **net.options)
    for key, parameter in backbone.network.double().named_parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, 1.0 if key.endswith("weight") else 0.0, 0.3)
    return backbone


def batch() -> tuple[Tensor, CellMask]:
    """Crops, and a mask that hides half of their cells."""
    rng = torch.Generator().manual_seed(0)
    mask = random_mask(2, [s // c for s, c in zip(SIZE, CELL, strict=True)], 0.5, CELL, rng)
    return torch.randn(2, 1, *SIZE, dtype=torch.float64, generator=rng), mask


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    """Equal up to `tolerance` of the largest value of all."""
    assert found.keys() == wanted.keys()
    scale = max(float(v.abs().max()) for v in wanted.values())
    assert scale > 0
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=tolerance * scale, msg=name)


@pytest.mark.parametrize("tuned", [False, True])
@pytest.mark.parametrize("name", TINY)
def test_emulated_encoder_equals_the_reference_backend(name: str, tuned: bool) -> None:
    backbone, (crops, mask) = tiny(name), batch()
    twin = copy.deepcopy(backbone.network)
    reference = SparseEncoder(backbone.network, backbone.stages, 3, backend="reference")
    emulated = GridEncoder(twin, backbone.stages, tuned=tuned)
    results = []
    for encoder in (emulated, reference):
        maps = encoder(crops, mask).maps
        rng = torch.Generator().manual_seed(1)
        weights = [torch.randn(y.shape, dtype=y.dtype, generator=rng) for y in maps]
        torch.autograd.backward(maps, weights)
        values = {f"stage {i}": y.detach() for i, y in enumerate(maps)}
        buffers = {k: b.double() for k, b in encoder.network.named_buffers()}
        results.append((values, gradients(encoder.network), buffers))
    for found, wanted in zip(*results, strict=True):
        if wanted:
            assert_same(found, wanted, 1e-9)


@pytest.mark.parametrize("kind", ["official", "light"])
def test_emulated_spark_equals_the_objective(kind: str) -> None:
    backbone, (crops, mask) = tiny("quick_convnext"), batch()
    top: OfficialDecoder | LightDecoder = (
        OfficialDecoder(backbone.strides, 1, 16, min_width=2)
        if kind == "official"
        else LightDecoder(backbone.strides, 1, 16)
    )
    dense = Densify(backbone.channels, top.widths, 3, "ln", top.folds)
    parts = copy.deepcopy((backbone.network, dense, top))
    emulated = GridSparK(GridEncoder(parts[0], backbone.stages), parts[1], parts[2]).double()
    reference = SparseEncoder(backbone.network, backbone.stages, 3, backend="reference")
    objective = SparK(reference, dense, top).double()
    losses = [m(crops, mask).total for m in (emulated, objective)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-7, atol=0)
    for loss in losses:
        loss.backward()
    assert_same(gradients(emulated), gradients(objective), 1e-7)


def test_layers_without_an_emulation_are_refused() -> None:
    with pytest.raises(TypeError, match=r"'1' .*Dropout3d.* has no emulation"):
        GridEncoder(nn.Sequential(nn.Conv3d(1, 2, 1), nn.Dropout3d()), ["1"])


@pytest.mark.parametrize("case", [c for c in main_cases(quick=True) if c.ratio == 0.6])
def test_contestants_start_from_the_same_weights_crops_and_masks(case: Case) -> None:
    first, *others = (Contestant(case, name) for name in case.contestants)
    for other in others:
        torch.testing.assert_close(other.crops, first.crops, rtol=0, atol=0)
        assert torch.equal(other.mask(5).visible, first.mask(5).visible)
        state = first.encoder.network.state_dict()
        for key, value in other.encoder.network.state_dict().items():
            torch.testing.assert_close(value, state[key], rtol=0, atol=0)


def test_packed_cells_do_the_encoder_s_work_of_the_bench() -> None:
    """In the bench itself, gradients of all contestants agree."""
    case = Case("quick_convnext", "encoder", 64, 0.6, 1, ("e0", "e1", "p"))
    found = {}
    for name in case.contestants:
        contestant = Contestant(case, name, torch.float64)
        contestant.prepare(3)()
        found[name] = contestant.gradients()
    for name in ("e0", "e1"):
        assert_same(found[name], found["p"], 1e-10)


LEAST = {("resnet50", 0.6): 1.6, ("resnet50", 0.75): 2.2,
         ("convnext_tiny", 0.6): 2.1, ("convnext_tiny", 0.75): 3.2}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("case", [c for c in main_cases() if c.task == "encoder"])
def test_packed_cells_save_less_for_the_backward_pass(case: Case) -> None:
    saved = run_job(Job("saved", case))
    ratio = saved["e0"]["activations"] / saved["p"]["activations"]
    assert ratio >= LEAST[case.network, case.ratio]


@pytest.mark.parametrize(("name", "least"), [("quick_resnet", 2.2), ("quick_convnext", 2.0)])
def test_packed_cells_of_tiny_networks_save_less_too(name: str, least: float) -> None:
    case = Case(name, "encoder", 64, 0.75, 1, ("e0", "p"))
    saved = run_job(Job("saved", case))
    assert saved["e0"]["activations"] >= least * saved["p"]["activations"]
    assert saved["p"]["tables"] > 0
