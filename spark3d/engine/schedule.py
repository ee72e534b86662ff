"""Schedules as pure functions of the step, so that a resumed run cannot drift."""

import math
from typing import Literal

Shape = Literal["cosine", "poly", "constant"]


def learning_rate(
    step: int,
    steps: int,
    peak: float,
    warmup: int,
    shape: Shape = "cosine",
    start: float = 0.005,
    final: float = 0.001,
) -> float:
    """Learning rate of one step, 0 <= `step` < `steps`.

    Linear from `start * peak` to `peak` over `warmup` steps, then down to `final * peak` at the
    last step by half a cosine (SparK, sec. 4.1; the official code anneals over
    `steps - 1 - warmup`), by the polynomial of power 0.9 that nnU-Net uses, or not at all.
    """
    if step < warmup:
        return peak * (start + (1 - start) * step / warmup)
    if shape == "constant":
        return peak
    done = (step - warmup) / max(1, steps - 1 - warmup)
    left = (1 + math.cos(math.pi * done)) / 2 if shape == "cosine" else (1 - min(done, 1.0)) ** 0.9
    return peak * (final + (1 - final) * left)


def weight_decay(step: int, steps: int, start: float, end: float | None) -> float:
    """Weight decay of one step: half a cosine from `start` to `end`; constant if `end` is None."""
    if end is None:
        return start
    done = step / max(1, steps - 1)
    return end + (start - end) * (1 + math.cos(math.pi * done)) / 2
