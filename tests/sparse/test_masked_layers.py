"""Every layer: packed equals reference in float64, gradients and buffers included, in 1D to 3D."""

import math

import pytest
import torch
from both_backends import assert_both_equal, draw_mask, run_both
from hypothesis import given
from hypothesis import strategies as st
from timm.layers.drop import DropPath
from timm.layers.grn import GlobalResponseNorm
from timm.layers.norm_act import BatchNormAct2d
from torch import nn

from spark3d.sparse import functional, packed
from spark3d.sparse.cells import Span, pack
from spark3d.sparse.convert import sparsify
from spark3d.sparse.convolution import ConvCase, choose
from spark3d.sparse.slot import MaskSlot, Run

dims = pytest.mark.parametrize("ndim", [1, 2, 3])
CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
CELL, GRID = {1: (8,), 2: (4, 8), 3: (4, 2, 4)}, {1: (5,), 2: (3, 4), 3: (2, 3, 3)}


def make_input(ndim: int, channels: int, seed: int = 0) -> tuple:
    mask = draw_mask(GRID[ndim], CELL[ndim], seed=seed)
    return torch.randn(2, channels, *mask.size, dtype=torch.float64), mask


CONVOLUTIONS = {
    "3": {"kernel_size": 3, "padding": 1},
    "3 without bias": {"kernel_size": 3, "padding": 1, "bias": False},
    "3 stride 2": {"kernel_size": 3, "padding": 1, "stride": 2},
    "7 stride 2": {"kernel_size": 7, "padding": 3, "stride": 2},
    "1": {"kernel_size": 1},
    "1 stride 2": {"kernel_size": 1, "stride": 2},
    "2 stride 2": {"kernel_size": 2, "stride": 2},
    "2 stride 2 grouped": {"kernel_size": 2, "stride": 2, "groups": 2},
    "3 dilated": {"kernel_size": 3, "padding": 2, "dilation": 2},
    "3 grouped": {"kernel_size": 3, "padding": 1, "groups": 2},
    "3 grouped stride 2": {"kernel_size": 3, "padding": 1, "groups": 2, "stride": 2},
    "4 stride 2": {"kernel_size": 4, "padding": 1, "stride": 2},
    "4 same": {"kernel_size": 4, "padding": "same"},
    "1 valid": {"kernel_size": 1, "padding": "valid", "stride": 2},
    "depthwise 7": {"kernel_size": 7, "padding": 3, "groups": 4},
    "depthwise 3 stride 2": {"kernel_size": 3, "padding": 1, "stride": 2, "groups": 4},
    "depthwise 1": {"kernel_size": 1, "groups": 4},
}


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
devices = pytest.mark.parametrize("device", DEVICES)


@dims
@devices
@pytest.mark.parametrize("options", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_convolutions(ndim: int, options: dict, device: str) -> None:
    x, mask = make_input(ndim, 4)
    out = 4 if options.get("groups") == 4 else 6
    layer = CONV[ndim](4, out, **options, dtype=torch.float64)
    assert_both_equal(layer, x, mask, device=device)


def test_strides_and_kernels_per_axis() -> None:
    x, mask = make_input(3, 2)
    options = {"kernel_size": (1, 3, 5), "stride": (1, 2, 4), "padding": (0, 1, 2)}
    assert_both_equal(nn.Conv3d(2, 3, **options, dtype=torch.float64), x, mask)


@pytest.mark.parametrize("strategy", ["halo", "columns", "grid"])
@pytest.mark.parametrize("stride", [1, 2])
def test_all_strategies_give_the_same(strategy: str, stride: int) -> None:
    x, mask = make_input(2, 4)
    layer = nn.Conv2d(4, 6, 3, stride, 1, dtype=torch.float64)
    slot = MaskSlot()
    sparsify(layer, slot)
    found = []
    for rule in (choose, lambda case: strategy):
        cells = pack(x, mask).detach().requires_grad_()
        layer.zero_grad()
        with slot.use(Run(packed, packed.Layout(mask, rule), 2)):
            y = layer(cells)
        (y**2).sum().backward()
        found.append((y, cells.grad, layer.weight.grad, layer.bias.grad))
    for expected, other in zip(*found, strict=True):
        torch.testing.assert_close(expected, other)


def test_a_strategy_that_cannot_do_it_says_so() -> None:
    x, mask = make_input(2, 4)
    slot = MaskSlot()
    for layer, strategy, message in (
        (nn.Conv2d(4, 4, 3, padding=1), "local", "windows that stay in their cell"),
        (nn.Conv2d(4, 4, 3, padding=1, groups=2), "columns", "ungrouped"),
    ):
        sparsify(layer, slot)
        run = Run(packed, packed.Layout(mask, lambda case, way=strategy: way), 2)
        with slot.use(run), pytest.raises(ValueError, match=message):
            layer(pack(x.float(), mask))


def test_the_rule_knows_when_no_window_leaves_its_cell() -> None:
    case = ConvCase((4,), (2,), (2,), (2,), ((0, 0),), (1,), 1, 3, 3, Span((0,), (4,)))
    assert choose(case) == "local"
    assert choose(case._replace(span=Span((1,), (4,)))) != "local"


POOLS = {
    "max 3 stride 2": lambda n: getattr(nn, f"MaxPool{n}d")(3, 2, 1),
    "max 2": lambda n: getattr(nn, f"MaxPool{n}d")(2),
    "max 3 stride 2 ceil": lambda n: getattr(nn, f"MaxPool{n}d")(3, 2, ceil_mode=True),
    "max dilated": lambda n: getattr(nn, f"MaxPool{n}d")(2, 1, 1, 2),
    "avg 2": lambda n: getattr(nn, f"AvgPool{n}d")(2),
    "avg 2 ceil": lambda n: getattr(nn, f"AvgPool{n}d")(2, 2, 0, True, False),
    "avg 3 stride 2": lambda n: getattr(nn, f"AvgPool{n}d")(3, 2, 1),
    "avg 3 stride 1, pads not counted": lambda n: getattr(nn, f"AvgPool{n}d")(
        3, 1, 1, False, False
    ),
    "global avg": lambda n: getattr(nn, f"AdaptiveAvgPool{n}d")(1),
    "global max": lambda n: getattr(nn, f"AdaptiveMaxPool{n}d")(1),
}


@dims
@devices
@pytest.mark.parametrize("pool", POOLS.values(), ids=POOLS)
def test_pools(ndim: int, pool: object, device: str) -> None:
    x, mask = make_input(ndim, 3)
    layer = pool(ndim)  # type: ignore[operator]
    if "Adaptive" in type(layer).__name__:
        layer = Gate(layer)
    assert_both_equal(layer, x, mask, device=device)


class Gate(nn.Module):
    """Multiplies a map by what a global pool makes of it."""

    def __init__(self, pool: nn.Module) -> None:
        super().__init__()
        self.pool = pool

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.pool(x).sigmoid()


NORMS = {
    "batch": lambda n: getattr(nn, f"BatchNorm{n}d")(4),
    "batch, cumulative": lambda n: getattr(nn, f"BatchNorm{n}d")(4, momentum=None),
    "batch, untracked": lambda n: getattr(nn, f"BatchNorm{n}d")(4, track_running_stats=False),
    "batch, plain": lambda n: getattr(nn, f"BatchNorm{n}d")(4, affine=False),
    "sync": lambda n: nn.SyncBatchNorm(4),
    "group": lambda n: nn.GroupNorm(2, 4),
    "group, plain": lambda n: nn.GroupNorm(4, 4, affine=False),
    "instance": lambda n: getattr(nn, f"InstanceNorm{n}d")(4),
    "instance, affine": lambda n: getattr(nn, f"InstanceNorm{n}d")(4, affine=True),
}


@dims
@devices
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_norms(ndim: int, training: bool, norm: object, device: str) -> None:
    x, mask = make_input(ndim, 4)
    layer = norm(ndim).double().train(training)  # type: ignore[operator]
    for parameter in layer.parameters():
        nn.init.normal_(parameter, 1.0, 0.5)
    assert_both_equal(layer, x, mask, device=device)


@dims
def test_batch_norm_is_that_of_the_gathered_sites(ndim: int) -> None:
    x, mask = make_input(ndim, 4)
    layer = getattr(nn, f"BatchNorm{ndim}d")(4).double()
    twin = nn.BatchNorm1d(4).double()
    keep = mask.at(x.shape[2:])[:, 0]
    expected = twin(x.movedim(1, -1)[keep])
    reference, fast = run_both(layer, x, mask)
    for found in (reference, fast):
        torch.testing.assert_close(found["output"].movedim(1, -1)[keep], expected)
        for name, buffer in twin.named_buffers():
            torch.testing.assert_close(found[f"buffer {name}"], buffer.double())
    rows = x.movedim(1, -1)[keep]
    unbiased = rows.var(0, correction=0) * len(rows) / (len(rows) - 1)
    torch.testing.assert_close(reference["buffer running_var"], 0.9 + 0.1 * unbiased)


@dims
def test_statistics_of_a_sample_do_not_depend_on_the_others(ndim: int) -> None:
    x, mask = make_input(ndim, 4)
    other = torch.cat([x[:1], 5 * torch.randn_like(x[1:]) + 3])
    layer = nn.GroupNorm(2, 4).double()
    slot = MaskSlot()
    sparsify(layer, slot)
    for run, of in (
        (Run(functional, mask, 2), lambda x: x),
        (Run(packed, packed.Layout(mask), 2), lambda x: pack(x, mask)),
    ):
        with slot.use(run):
            first, second = layer(of(x)), layer(of(other))
        half = len(first) // 2
        assert torch.equal(first[:half], second[:half])
        assert not torch.equal(first[half:], second[half:])


@dims
def test_instance_norm_gives_each_sample_unit_variance(ndim: int) -> None:
    """Samples that differ in scale must not be mixed."""
    x, mask = make_input(ndim, 4)
    x[1] = 9 * x[1] + 5
    layer = getattr(nn, f"InstanceNorm{ndim}d")(4).double()
    reference, fast = run_both(layer, x, mask)
    keep = mask.at(x.shape[2:])[:, 0]
    for found in (reference, fast):
        for sample, kept in zip(found["output"], keep, strict=True):
            rows = sample.movedim(0, -1)[kept]
            torch.testing.assert_close(rows.mean(0), torch.zeros(4).double(), atol=1e-9, rtol=0)
            torch.testing.assert_close(
                rows.std(0, correction=0), torch.ones(4).double(), atol=1e-3, rtol=0
            )


@dims
def test_channel_dropout_is_drawn_per_sample(ndim: int) -> None:
    x, mask = make_input(ndim, 64)
    layer = getattr(nn, f"Dropout{ndim}d")(0.5)
    reference, fast = run_both(layer, x.abs() + 1, mask)
    torch.testing.assert_close(reference["output"], fast["output"])
    kept = reference["output"].flatten(2).amax(2) > 0
    assert 0.2 < kept.double().mean() < 0.8
    assert not torch.equal(kept[0], kept[1])


COMPOSITES = {
    "drop path": lambda: DropPath(0.5),
    "drop path, not scaled": lambda: DropPath(0.5, scale_by_keep=False),
    "response norm": lambda: GlobalResponseNorm(4, channels_last=False),
    "batch norm, activated": lambda: BatchNormAct2d(4),
}


@dims
@pytest.mark.parametrize("make", COMPOSITES.values(), ids=COMPOSITES)
def test_composites(ndim: int, make: object) -> None:
    mask = draw_mask(GRID[ndim], CELL[ndim], batch=4)
    layer = make().double().train()  # type: ignore[operator]
    for parameter in layer.parameters():
        nn.init.normal_(parameter, 1.0, 0.5)
    assert_both_equal(layer, torch.randn(4, 4, *mask.size, dtype=torch.float64), mask)


def test_drop_path_is_drawn_per_sample() -> None:
    mask = draw_mask((3, 4), (2, 2), batch=16)
    x = 1 + torch.rand(16, 3, *mask.size, dtype=torch.float64)
    reference, fast = run_both(DropPath(0.5), x, mask)
    torch.testing.assert_close(reference["output"], fast["output"])
    share = reference["output"].div(x).flatten(1)
    levels = [set(row[row > 0].round(decimals=6).tolist()) for row in share]
    assert {len(level) for level in levels} == {0, 1}
    assert set().union(*levels) == {2.0}


@pytest.mark.parametrize("ndim", [1, 2, 3])
@given(data=st.data())
def test_max_pools_own_gradient_is_pytorchs(ndim: int, data: st.DataObject) -> None:
    """With windows of minus infinity only, and no two sites alike."""
    draw = st.tuples(*[st.integers(1, 3)] * ndim)
    kernel, stride, dilation, more = (data.draw(draw) for _ in range(4))
    sites = [
        d * (k - 1) + 1 + s * m for k, s, d, m in zip(kernel, stride, dilation, more, strict=True)
    ]
    wide = torch.randperm(2 * 3 * math.prod(sites)).double().view(2, 3, *sites)
    wide[wide < wide.max() / 3] = -torch.inf
    wide.requires_grad_()
    y = functional.MAX_POOL[ndim](wide, kernel, stride, dilation=dilation)
    y = y.masked_fill(y == -torch.inf, 0)
    grad = torch.randn_like(y)
    (expected,) = torch.autograd.grad(y, wide, grad)
    found = packed.max_pool_gradient(wide.detach(), grad, kernel, stride, dilation)
    torch.testing.assert_close(found, expected)


def test_max_pool_treats_hidden_sites_as_absent() -> None:
    """Negative maxima survive next to hidden cells, where zeros would win."""
    mask = draw_mask((4, 4), (2, 2))
    x = -1 - torch.rand(2, 1, *mask.size, dtype=torch.float64)
    reference, fast = run_both(nn.MaxPool2d(3, 2, 1), x, mask)
    seen = mask.at((4, 4))
    assert (reference["output"][seen] < -1).all()
    torch.testing.assert_close(reference["output"], fast["output"])


REFUSED = {
    "valid 3": (lambda: nn.Conv2d(1, 1, 3), (4, 4), "kernel 3"),
    "even at stride 1": (lambda: nn.Conv2d(1, 1, 2, padding=1), (4, 4), "kernel 2"),
    "pool": (lambda: nn.AvgPool2d(3, 2), (4, 4), "moves the cells"),
    "max pool": (lambda: nn.MaxPool2d(3, 1), (4, 4), "kernel 3"),
}


@pytest.mark.parametrize("backend", ["packed", "reference"])
@pytest.mark.parametrize(("layer", "cell", "message"), REFUSED.values(), ids=REFUSED)
def test_geometries_that_move_the_cells_are_refused(
    backend: str, layer: object, cell: tuple[int, ...], message: str
) -> None:
    mask = draw_mask((3, 3), cell)
    network = nn.Sequential(layer())  # type: ignore[operator]
    slot = MaskSlot()
    sparsify(network, slot)
    x = torch.randn(2, 1, *mask.size)
    run = Run(functional, mask, 2)
    if backend == "packed":
        run, x = Run(packed, packed.Layout(mask), 2), pack(x, mask)
    with slot.use(run), pytest.raises(ValueError, match=f"layer '0': .*{message}"):
        network(x)


def test_cells_smaller_than_a_stride_are_refused_when_packed() -> None:
    mask = draw_mask((3, 3), (3, 3))
    slot = MaskSlot()
    network = nn.Sequential(nn.Conv2d(1, 1, 2, 2))
    sparsify(network, slot)
    x = pack(torch.randn(2, 1, *mask.size), mask)
    message = "layer '0': .*(9/2|backend=\"reference\")"
    with slot.use(Run(packed, packed.Layout(mask), 2)), pytest.raises(ValueError, match=message):
        network(x)


def test_columns_serve_tiny_cells() -> None:
    case = ConvCase(
        (1, 1, 1),
        (1, 1, 1),
        (3,) * 3,
        (1,) * 3,
        ((1, 1),) * 3,
        (1,) * 3,
        1,
        8,
        8,
        Span((1,) * 3, (3,) * 3),
    )
    assert choose(case) == "columns"
    assert choose(case._replace(device="cuda")) == "halo"
    mask = draw_mask((3, 2, 3), (1, 1, 1))
    x = torch.randn(2, 3, *mask.size, dtype=torch.float64)
    assert_both_equal(nn.Conv3d(3, 5, 3, padding=1, dtype=torch.float64), x, mask)
    assert math.prod(case.cell) == 1
