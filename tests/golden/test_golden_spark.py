"""SparK against values of the official code: float64, both backends, 2D and the 3D code path.

Losses, features, projected maps, reconstruction, every gradient and the running statistics.
"""

import gc
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from golden_rule import fill, load, make_input, make_visible, role_of, stats
from torch import Tensor

from spark3d.models.backbones import build_backbone
from spark3d.models.decoder import OfficialDecoder
from spark3d.models.densify import Densify
from spark3d.objectives.spark import SparK
from spark3d.sparse.encoder import SparseEncoder
from spark3d.sparse.mask import CellMask

SIZE = 64
NETWORKS = {"resnet50": "bn", "convnext_tiny": "ln"}
PARAMETERS = {"resnet50": 52_921_835, "convnext_tiny": 52_748_523}


@dataclass
class Run:
    """One forward and backward of ours, with all that golden files know about it."""

    loss: float
    features: list[np.ndarray]
    projected: list[np.ndarray]
    reconstruction: np.ndarray
    gradients: dict[str, np.ndarray]
    buffers: dict[str, np.ndarray]
    visible: np.ndarray


@dataclass
class Built:
    """A filled model and a copy of its buffers to go back to."""

    network: str
    ndim: int
    model: SparK
    buffers: dict[str, Tensor]


def build(network: str, ndim: int, backend: str) -> SparK:
    """SparK with every tensor filled by the golden rule; the 3D network has 1 x k x k kernels."""
    flat = {"depth": "flat"} if ndim == 3 else {}
    backbone = build_backbone(f"timm/{network}", ndim, 3, **flat)
    encoder = SparseEncoder(backbone.network, backbone.stages, ndim, backend)
    decoder = OfficialDecoder(backbone.strides, 3)
    densify = Densify(backbone.channels, decoder.widths, ndim, NETWORKS[network])
    model = SparK(encoder, densify, decoder)
    filled = {}
    for key, value in model.state_dict().items():
        role, shape = role_of(key), value.shape
        if not role:
            filled[key] = value
            continue
        if ndim == 3 and value.ndim == 5:
            shape = torch.Size((*shape[:2], *shape[3:]))
        tensor = torch.from_numpy(fill(role, shape))
        filled[key] = in_depth(tensor, value.shape) if ndim == 3 else tensor
    model.load_state_dict(filled)
    return model.double()


def in_depth(tensor: Tensor, shape: torch.Size) -> Tensor:
    """A 2D kernel in the middle slice of a 3D one."""
    if tensor.ndim != 4:
        return tensor
    out = tensor.new_zeros(shape)
    out[:, :, (shape[2] - 1) // 2] = tensor
    return out


@pytest.fixture(scope="module")
def built(request: pytest.FixtureRequest) -> Iterator[Built]:
    """One model for all tests of a network: hundreds of megabytes, gone before the next comes."""
    network, ndim = request.param
    model = build(network, ndim, "reference")
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    yield Built(network, ndim, model, buffers)
    del model
    gc.collect()


def run(built: Built, backend: str, mode: str) -> Run:
    """Forward and backward from the filled state."""
    model, ndim = built.model, built.ndim
    model.load_state_dict(built.buffers, strict=False)
    model.zero_grad()
    model.train(mode == "train")
    model.encoder.backend = backend
    crops = torch.from_numpy(make_input(SIZE)).double()
    visible = torch.from_numpy(make_visible(SIZE))
    cell: tuple[int, ...] = (32, 32)
    if ndim == 3:
        crops, visible, cell = crops.unsqueeze(2), visible.unsqueeze(1), (1, 32, 32)
    mask = CellMask(visible, cell)
    seen = {}
    parts = {"pyramid": model.encoder, "maps": model.densify, "rec": model.decoder.proj}
    hooks = [
        part.register_forward_hook(lambda _m, _i, out, name=name: seen.update({name: out}))
        for name, part in parts.items()
    ]
    losses = model(crops, mask)
    losses.total.backward()
    for hook in hooks:
        hook.remove()
    drop = (lambda a: a.squeeze(2)) if ndim == 3 else (lambda a: a)
    state = model.state_dict()
    return Run(
        loss=losses.total.item(),
        features=[drop(m).detach().numpy() for m in seen["pyramid"].dense().maps],
        projected=[drop(m).detach().numpy() for m in seen["maps"]],
        reconstruction=drop(seen["rec"]).detach().numpy(),
        gradients={
            role_of(name): p.grad.numpy()
            for name, p in model.named_parameters()
            if p.grad is not None
        },
        buffers={role_of(k): v.numpy().copy() for k, v in state.items() if "running" in k},
        visible=make_visible(SIZE),
    )


def assert_stats(found: np.ndarray, wanted: dict, what: str, rel: float = 1e-9) -> None:
    """Compare summaries; sums that nearly cancel are judged against the size of their terms."""
    have = stats(found)
    assert have["shape"] == wanted["shape"], what
    for key in ("mean", "std", "absmax", "l2"):
        assert have[key] == pytest.approx(wanted[key], rel=rel, abs=rel * wanted["absmax"]), what
    assert have["wsum"] == pytest.approx(wanted["wsum"], abs=rel * max(wanted["l2"], 1e-3)), what


def seldom(network: str, ndim: int, backend: str, mode: str) -> bool:
    """Whether a run waits for the slow tests: 3D in eval mode, and the largest network."""
    return ndim == 3 and (mode == "eval" or (network, backend) == ("resnet50", "reference"))


RUNS = [
    pytest.param(
        (network, ndim),
        mode,
        backend,
        marks=[pytest.mark.slow] if seldom(network, ndim, backend, mode) else [],
        id=f"{network}-{ndim}d-{mode}-{backend}",
    )
    for network in NETWORKS
    for ndim in (2, 3)
    for mode in ("eval", "train")
    for backend in ("reference", "packed")
]


@pytest.mark.parametrize(("built", "mode", "backend"), RUNS, indirect=["built"])
def test_spark_equals_the_official_code(built: Built, mode: str, backend: str) -> None:
    """Every golden number of one network, in one mode, is met."""
    network, ndim = built.network, built.ndim
    numbers, arrays = load(f"spark_{network}_{SIZE}")
    ours, wanted = run(built, backend, mode), numbers[mode]

    assert ours.loss == pytest.approx(wanted["loss_f64"], rel=1e-9)
    for i, found in enumerate(ours.features):
        assert_stats(found, wanted["feats"][i], f"stage {i}")
        sites = ours.visible.repeat(found.shape[2] // 2, 1).repeat(found.shape[3] // 2, 2)
        key = f"{mode}_feat{i + 1}_visible"
        if key in arrays:
            rows = np.moveaxis(found, 1, -1)[sites]
            np.testing.assert_allclose(rows, arrays[key], rtol=1e-6, atol=1e-6)
        assert not np.moveaxis(found, 1, -1)[~sites].any(), f"stage {i} is not empty where hidden"
    for i, found in enumerate(reversed(ours.projected)):
        assert_stats(found, wanted["to_dec"][i], f"projected {i}")
    assert_stats(ours.reconstruction, wanted["rec"], "reconstruction")
    np.testing.assert_allclose(ours.reconstruction, arrays[f"{mode}_rec"], rtol=1e-6, atol=1e-6)
    assert_gradients(ours, wanted, ndim)
    if ndim == 2:
        assert sum(g.size for g in ours.gradients.values()) == PARAMETERS[network]
    if mode == "train":
        for role, summary in wanted["bn_after_one_step"].items():
            assert_stats(ours.buffers[role], summary, role)


def assert_gradients(ours: Run, wanted: dict, ndim: int) -> None:
    """Norm and ordered sum of the gradient of every parameter."""
    assert ours.gradients.keys() == wanted["grad_l2"].keys()
    largest = max(wanted["grad_l2"].values())
    for role, l2 in wanted["grad_l2"].items():
        found = ours.gradients[role]
        if ndim == 3 and found.ndim == 5:  # depth 1 sees the middle slice only
            middle = (found.shape[2] - 1) // 2
            assert not np.delete(found, middle, axis=2).any()
            found = found[:, :, middle]
        have = stats(found)
        assert have["l2"] == pytest.approx(l2, rel=1e-9, abs=1e-10 * largest), role
        near = 1e-9 * max(l2, 1e-2 * largest)
        assert have["wsum"] == pytest.approx(wanted["grad_wsum"][role], abs=near), role


def test_the_rule_gives_the_values_that_the_golden_files_were_made_with() -> None:
    """Check values of the rule itself, and that role names cover the network both ways."""
    first = fill("encoder.conv1.weight", (64, 3, 7, 7)).ravel()[:4]
    np.testing.assert_allclose(first, [-0.07974412, -0.08292598, 0.02281378, -0.14051254], 1e-6)
    token = fill("densify.0.token", (1, 2048, 1, 1)).ravel()[:3]
    np.testing.assert_allclose(token, [0.41055956, -0.51041454, 0.04111693], 1e-6)
    numbers, arrays = load("spark_resnet50_64")
    assert_stats(make_input(SIZE), numbers["input"], "input")
    assert (make_visible(SIZE)[:, None] == arrays["active"]).all()
