"""The packed step never makes the host wait for a GPU, as far as can be told without one.

On the meta device tensors have no values: whatever would have to wait for one (`item`, `nonzero`,
boolean indexing) fails there. Copies from the CPU must not wait either.
"""

from typing import Any

import pytest
import torch
from both_backends import assert_both_equal, draw_mask
from contract import make_batch, make_encoder
from small_networks import ALL, RESENC, Small
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from spark3d.models.decoder import LightDecoder, OfficialDecoder
from spark3d.models.densify import Densify
from spark3d.models.probe import probe
from spark3d.objectives.spark import SparK
from spark3d.sparse import CellMask, SparseEncoder, packed
from spark3d.sparse.convolution import ConvCase
from spark3d.sparse.gather import to_device

META = torch.device("meta")
TABLE = {**ALL, **{name: small for name, small in RESENC.items() if "3d" in name}}


class WaitingCopies(TorchDispatchMode):
    """Notes every copy from the CPU to another device that the host would wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        y = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("_to_copy", "copy_"):
            source = args[1] if name == "copy_" else args[0]
            waits = not (kwargs or {}).get("non_blocking", len(args) > 2 and args[2])
            if source.device.type == "cpu" and y.device.type != "cpu" and waits:
                self.found.append(f"{name} of {tuple(source.shape)}")
        return y


@pytest.fixture(autouse=True)
def _extra(request: pytest.FixtureRequest) -> None:
    if "nnunet" in request.node.name:
        pytest.importorskip("dynamic_network_architectures", reason="needs the extra `nnunet`")


@pytest.mark.parametrize("small", TABLE.values(), ids=TABLE)
def test_no_value_is_read_in_forward_and_backward(small: Small) -> None:
    encoder = make_encoder(small).to(META).train()
    crops, mask = make_batch(small, torch.float32)
    crops = crops.to(META)
    with WaitingCopies() as copies:
        maps = encoder(crops, mask.to(META)).maps
        sum(y.sum() for y in maps).backward()
    assert copies.found == []
    assert all(y.device == META for y in maps)


@pytest.mark.parametrize("decoder", [LightDecoder, OfficialDecoder])
@pytest.mark.parametrize("norm", ["bn", "ln", "gn"])
def test_nor_in_a_whole_training_step(decoder: Any, norm: str) -> None:
    small = ALL["own 3d"]
    encoder = make_encoder(small)
    found = probe(encoder.network, small.stages, 3)
    top = decoder(found.strides, 1, 16)
    objective = SparK(encoder, Densify(found.channels, top.widths, 3, norm, top.folds), top,
                      min_variance=1e-3, flat_weight=0.1).to(META)  # fmt: skip
    optimizer = torch.optim.AdamW(objective.parameters())
    crops, mask = make_batch(small, torch.float32)
    crops = crops.to(META)
    with WaitingCopies() as copies:
        objective(crops, mask.to(META)).total.backward()
        nn.utils.clip_grad_norm_(objective.parameters(), 1.0, error_if_nonfinite=False)
        optimizer.step()
    assert copies.found == []


def test_the_reference_backend_does_read_values() -> None:
    """What the checks above are for: boolean indexing in its norms fails here."""
    small = ALL["own 2d"]
    encoder = make_encoder(small, backend="reference").to(META)
    crops, mask = make_batch(small, torch.float32)
    with pytest.raises((RuntimeError, NotImplementedError)):
        encoder(crops.to(META), mask.to(META))
    with WaitingCopies() as copies:
        torch.ones(3).to(META)
        to_device(torch.ones(3), META)
    assert copies.found == ["_to_copy of (3,)"]


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_the_gradients_that_other_devices_take_are_exact(
    ndim: int, stride: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library's own depthwise gradients, which the CPU leaves aside, run here on the CPU."""

    def elsewhere(*fields: Any) -> ConvCase:
        return ConvCase(*fields)._replace(device="cuda")

    monkeypatch.setattr(packed, "ConvCase", elsewhere)
    mask = draw_mask((3, 2, 2)[:ndim], (4,) * ndim)
    conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[ndim]
    layer = conv(4, 4, 5, stride, 2, groups=4, dtype=torch.float64)
    assert not ConvCase(*[(1,)] * 6, 4, 4, 4, ((0,), (1,)), "cuda").own_gradients
    assert_both_equal(layer, torch.randn(2, 4, *mask.size, dtype=torch.float64), mask)


def test_a_mask_brings_its_map_along_without_counting_again() -> None:
    mask = draw_mask((3, 4), (4, 4))
    there = mask.to(META)
    assert isinstance(there, CellMask)
    assert there.host is mask.host
    assert there.n_visible == mask.n_visible
    assert there.visible.device == META
    x: Tensor = torch.zeros(2, 1, 12, 16, device=META)
    net = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1))
    assert SparseEncoder(net.to(META), ("0",), 2)(x, there)[0].shape == (2 * 6, 2, 4, 4)
