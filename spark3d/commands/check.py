"""`spark3d check`: prove on random weights and masks that a backbone leaks nothing when masked."""

import copy
from collections.abc import Sequence
from math import lcm, prod

from rich.console import Console
from rich.table import Table
from torch import nn

from spark3d import build
from spark3d.errors import ConfigError
from spark3d.models.probe import probe
from spark3d.recipe_files import apply_override
from spark3d.sparse.encoder import SparseEncoder
from spark3d.sparse.leaks import Proof, prove

GRID = {1: (8,), 2: (4, 4), 3: (2, 2, 3)}
"""Cells of the crop that is checked: small, and enough for every kind of neighbour."""


def check_command(
    backbone: str,
    dims: int = 3,
    in_channels: int = 1,
    ratio: float = 0.6,
    cell_size: str | None = None,
    options: Sequence[str] = (),
    console: Console | None = None,
) -> Proof:
    """Convert a backbone and check the claims of the core on it; print a table.

    Args:
        backbone: as in recipes, such as `monai/segresnet` or `timm/resnet50`.
        dims: spatial axes.
        in_channels: channels of the input.
        ratio: share of hidden cells.
        cell_size: voxels of a cell, one number or one per axis with commas; the total stride if
            not given.
        options: `name=value` of the network's constructor, as in `model.options` of a recipe.
        console: where the table is printed; stdout by default.

    Raises:
        ConfigError: no such backbone, a layer without a masked meaning, or a claim that fails.
    """
    if dims not in GRID:
        raise ConfigError(f"--dims {dims}; choose 1, 2 or 3")
    tree: dict[str, object] = {}
    for item in options:
        apply_override(tree, item)
    net = build.backbone(backbone, dims, in_channels, tree)
    cell = None if cell_size is None else _cell(cell_size, dims)
    return check_network(net.network, net.stages, dims, in_channels, cell, ratio, net.name, console)


def check_network(
    network: nn.Module,
    stages: Sequence[str],
    ndim: int,
    in_channels: int = 1,
    cell_size: Sequence[int] | None = None,
    ratio: float = 0.6,
    name: str | None = None,
    console: Console | None = None,
) -> Proof:
    """The same for a network of your own; it is copied and stays as it is.

    Args:
        network: takes `(b, in_channels, *size)`.
        stages: dotted names of the sub-modules whose outputs are the stages, fine to coarse.
        ndim: spatial axes.
        in_channels: channels of the input.
        cell_size: voxels of a cell per axis; the total stride if not given.
        ratio: share of hidden cells.
        name: what to call it in the table; its class by default.
        console: where the table is printed; stdout by default.

    Raises:
        ConfigError: a stage that does not run, a layer without a masked meaning, a cell that does
            not fit, or a claim that fails.
    """
    console, name = console or Console(), name or type(network).__name__
    stride = probe(network, stages, ndim, in_channels).strides[-1]
    cell = stride if cell_size is None else tuple(cell_size)
    size = tuple(n * lcm(c, s) for n, c, s in zip(GRID[ndim], cell, stride, strict=True))
    whole = all(c % s == 0 for c, s in zip(cell, stride, strict=True))
    twin = copy.deepcopy(network)
    try:
        encoder = SparseEncoder(twin, stages, ndim, "packed" if whole else "reference")
        with console.status(f"checking {name} on crops of {size} voxels ({prod(size):,})"):
            proof = prove(encoder, size, cell, in_channels, ratio)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name}: {error}") from None
    console.print(stage_table(name, stages, proof))
    console.print(claim_table(proof))
    if not proof.passed:
        failed = next(check for check in proof.checks if not check.passed)
        detail = f" ({failed.detail})" if failed.detail else ""
        raise ConfigError(
            f"{name}: it does not hold that {failed.claim}, first at layer {failed.layer or '?'}"
            f"{detail}; teach the core that layer with register_masked"
        )
    return proof


def _cell(text: str, dims: int) -> tuple[int, ...]:
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(
            f"--cell-size {text!r}: give one number, or one per axis: 4,16,16"
        ) from None
    return build.sizes(numbers * dims if len(numbers) == 1 else numbers, dims, "--cell-size")


def stage_table(backbone: str, stages: Sequence[str], proof: Proof) -> Table:
    """Names, strides and channels of the stages."""
    table = Table(title=backbone, title_justify="left")
    for head in ("stage", "stride", "channels"):
        table.add_column(head)
    for name, stride, channels in zip(stages, proof.strides, proof.channels, strict=True):
        table.add_row(name, " x ".join(map(str, stride)), str(channels))
    return table


def claim_table(proof: Proof) -> Table:
    """What was checked and whether it holds."""
    table = Table()
    for head in ("claim", "", "first layer where not", "detail"):
        table.add_column(head, overflow="fold")
    for check in proof.checks:
        table.add_row(check.claim, "holds" if check.passed else "FAILS", check.layer, check.detail)
    return table
