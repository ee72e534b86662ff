"""Mirrored passes of a network, aware of labels that come in a left and a right one."""

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from spark3d.errors import ConfigError


def mirrored_pairs(labels: Mapping[int, str]) -> tuple[tuple[int, int], ...]:
    """Pairs of labels that a left-right mirror exchanges, found by their names.

    Sides are "left" and "right", or "l" and "r" alone, as in `kidney_l`; the letters count where
    both labels of the pair are declared.

    Raises:
        ConfigError: if a name says "left" or "right" and its counterpart is not declared.
    """
    by_name = {name.lower(): label for label, name in labels.items()}
    pairs = set()
    for name, label in by_name.items():
        twin = SIDE.sub(lambda side: _OTHER[side.group()], name)
        if twin == name:
            continue
        if twin not in by_name:
            if not re.search("left|right", name):
                continue
            raise ConfigError(
                f"label {label} '{name}' has no counterpart '{twin}', so a left-right mirror has "
                "no meaning for it; predict without flips along the left-right axis"
            )
        pairs.add((min(label, by_name[twin]), max(label, by_name[twin])))
    return tuple(sorted(pairs))


SIDE = re.compile(r"left|right|(?<![a-z0-9])[lr](?![a-z0-9])")
_OTHER = {"left": "right", "right": "left", "l": "r", "r": "l"}


def mean_over_flips(
    network: nn.Module,
    windows: Tensor,
    flips: Sequence[Sequence[int]],
    swaps: Sequence[tuple[int, int]],
    left_right_axis: int,
) -> Tensor:
    """Mean logits of the plain pass and of one pass per set of mirrored axes.

    Args:
        windows: `(b, c, *window)`.
        flips: sets of spatial axes (0 is the first after the channels).
        swaps: pairs of classes to exchange in passes that mirror `left_right_axis`.
    """
    total = class_logits(network, windows)
    for axes in flips:
        dims = [a + 2 for a in axes]
        logits = class_logits(network, windows.flip(dims)).flip(dims)
        if left_right_axis in axes and swaps:
            logits = logits[:, _exchanged(logits.shape[1], swaps, logits.device)]
        total = total + logits
    return total / (1 + len(flips)) if flips else total


def class_logits(network: nn.Module, windows: Tensor) -> Tensor:
    """Float32 logits `(b, k, *window)` of a segmentation network.

    Raises:
        TypeError: if the network returns something else than one tensor of the window's size.
        ConfigError: if a logit is not finite.
    """
    logits = network(windows)
    if not isinstance(logits, Tensor) or logits.shape[2:] != windows.shape[2:]:
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise TypeError(
            f"a segmentation network must return logits (b, k, *{tuple(windows.shape[2:])}), "
            f"{type(network).__name__} returned {found}"
        )
    if not bool(torch.isfinite(logits.sum(dtype=torch.float32))):  # one pass, unlike isfinite
        raise ConfigError(
            f"{type(network).__name__} returned values that are not finite; predict in full "
            "precision, or check the weights and the intensity window of the input"
        )
    return logits.float()


def _exchanged(classes: int, swaps: Sequence[tuple[int, int]], device: torch.device) -> Tensor:
    order = list(range(classes))
    for first, second in swaps:
        order[first], order[second] = second, first
    return torch.tensor(order, device=device)
