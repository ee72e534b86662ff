"""What it is worth to project a stage for the decoder from its visible rows.

    python benchmarks/densify.py

For stages of a ResNet-50, a ConvNeXt-T and narrower ones, in crops of 96³ with 60 % hidden: a 3³
convolution of packed cells with a mask token at hidden sites, on the full map and from visible
rows, forward and backward. Both take turns, every round under a new mask; tables count.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from spark3d.models.filled import ENOUGH, filled_conv
from spark3d.models.hidden import fill_hidden
from spark3d.sparse.mask import CellMask, random_mask

STAGES = (
    (256, 32, 8), (512, 64, 4), (1024, 128, 2),
    (96, 32, 8), (192, 64, 4), (384, 128, 2), (64, 32, 8), (32, 32, 8),
)  # fmt: skip
"""Channels in and out, sites per axis of a cell."""


def seconds(
    way: Callable[[Tensor, CellMask], Tensor], x: Tensor, mask: CellMask, ends: list
) -> float:
    """Of one forward and backward pass."""
    x = x.detach().requires_grad_()
    began = time.perf_counter()
    y = way(x, mask)
    torch.autograd.grad(y, [x, *ends], torch.ones_like(y))
    return time.perf_counter() - began


def compare(channels: int, width: int, side: int, batch: int, rounds: int) -> list[float]:
    """Median milliseconds on the full map and from visible rows."""
    conv = nn.Conv3d(channels, width, 3, padding=1)
    token = torch.randn(1, channels, 1, 1, 1, requires_grad=True)
    ways: tuple[Callable[[Tensor, CellMask], Tensor], ...] = (
        lambda x, mask: conv(fill_hidden(x, token, mask)),
        lambda x, mask: filled_conv(x, token, conv.weight, conv.bias, mask),
    )
    taken: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds + 1):
        rng = torch.Generator().manual_seed(number)
        for one in (0, 1) if number % 2 else (1, 0):
            mask = random_mask(batch, (3, 3, 3), 0.6, (32, 32, 32), rng)
            x = torch.randn(batch * mask.n_visible, side, side, side, channels).movedim(-1, 1)
            taken[one].append(seconds(ways[one], x, mask, [token, *conv.parameters()]))
    return [1e3 * statistics.median(times[1:]) for times in taken]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=2, help="crops")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"from {ENOUGH} channels on, visible rows are what spark3d takes on a CPU\n")
    print("| channels | sites a cell | full map (ms) | visible rows (ms) |\n|---|---|---|---|")
    for channels, width, side in STAGES:
        full, rows = compare(channels, width, side, options.batch, options.rounds)
        print(f"| {channels} to {width} | {side}³ | {full:.0f} | {rows:.0f} |", flush=True)


if __name__ == "__main__":
    main()
