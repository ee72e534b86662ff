"""`spark3d check`: prove on random weights and masks that a backbone leaks nothing when masked."""

from math import prod

from rich.console import Console
from rich.table import Table

from spark3d import build
from spark3d.errors import ConfigError
from spark3d.sparse.encoder import SparseEncoder
from spark3d.sparse.leaks import Proof, prove

GRID = {1: 8, 2: 4, 3: 3}
"""Cells per axis of the crop that is checked: small, and enough for every kind of neighbour."""


def check_command(
    backbone: str,
    dims: int = 3,
    in_channels: int = 1,
    ratio: float = 0.6,
    cell_size: int | None = None,
    console: Console | None = None,
) -> Proof:
    """Convert a backbone and check the claims of the core on it; print a table.

    Args:
        backbone: as in recipes, such as `monai/segresnet` or `timm/resnet50`.
        dims: spatial axes.
        in_channels: channels of the input.
        ratio: share of hidden cells.
        cell_size: voxels of a cell per axis; the total stride if not given.
        console: where the table is printed; stdout by default.

    Raises:
        ConfigError: no such backbone, a layer without a masked meaning, or a claim that fails.
    """
    console = console or Console()
    net = build.backbone(backbone, dims, in_channels, {})
    cell = net.stride if cell_size is None else (cell_size,) * dims
    size = tuple(side * GRID[dims] for side in cell)
    encoder = SparseEncoder(net.network, net.stages, dims)
    with console.status(f"checking {backbone} on crops of {size} voxels ({prod(size):,})"):
        try:
            proof = prove(encoder, size, cell, in_channels, ratio)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{backbone}: {error}") from None
    console.print(stage_table(backbone, net.stages, proof))
    console.print(claim_table(proof))
    if not proof.passed:
        failed = next(check for check in proof.checks if not check.passed)
        raise ConfigError(
            f"{backbone}: {failed.claim} does not hold, first at layer {failed.layer or '?'} "
            f"({failed.detail}); teach the core that layer with register_masked"
        )
    return proof


def stage_table(backbone: str, stages: tuple[str, ...], proof: Proof) -> Table:
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
        table.add_column(head)
    for check in proof.checks:
        table.add_row(check.claim, "holds" if check.passed else "FAILS", check.layer, check.detail)
    return table
