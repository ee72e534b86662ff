"""How a decoder climbs from the deepest stage to its last stride, axis by axis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log2

from spark3d.errors import ConfigError

Strides = tuple[int, ...]


@dataclass(frozen=True)
class Climb:
    """The up-sampling blocks of a decoder and where the stages enter.

    Attributes:
        factors: Of every block, 2 on the axes that it doubles and 1 on the others.
        level: Of every stage (fine to coarse), how many blocks come before it is added.
        folds: Of every stage, the factor per axis by which it is finer than the last stride.
    """

    factors: tuple[Strides, ...]
    level: tuple[int, ...]
    folds: tuple[Strides, ...]

    def widths(self, width: int, minimum: int) -> tuple[int, ...]:
        """Channels at the bottom and after every block: halved by each, never below `minimum`."""
        return tuple(max(width >> k, min(minimum, width)) for k in range(len(self.factors) + 1))


def plan_climb(strides: Sequence[Strides], stop: Strides) -> Climb:
    """Plan the blocks from the deepest of `strides` (fine to coarse) to `stop`.

    A stage finer than `stop` on some axis is folded: it enters at the level that has `stop` there.

    Raises:
        ConfigError: A ratio between strides is not a power of two, or `stop` does not divide them.
    """
    ndim = len(stop)
    if any(len(s) != ndim for s in strides):
        raise ConfigError(f"stop={stop} must have one number per axis, as strides {list(strides)}")
    for stride in strides:
        for s, t in zip(stride, stop, strict=True):
            if max(s, t) % min(s, t):
                raise ConfigError(f"stop={stop} and the stage stride {stride} do not divide")
    entered = [tuple(map(max, s, stop)) for s in strides]
    if any(t > s for t, s in zip(stop, strides[-1], strict=True)):
        raise ConfigError(f"stop={stop} is coarser than the deepest stage, {strides[-1]}")
    factors: list[Strides] = []
    level = [0] * len(strides)
    here = entered[-1]
    for index in reversed(range(len(strides))):
        factors += up_steps(here, entered[index])
        here = entered[index]
        level[index] = len(factors)
    factors += up_steps(here, stop)
    folds = tuple(
        tuple(e // s for e, s in zip(e_, s_, strict=True))
        for e_, s_ in zip(entered, strides, strict=True)
    )
    return Climb(tuple(factors), tuple(level), folds)


def up_steps(coarse: Strides, fine: Strides) -> list[Strides]:
    """Factors (2 or 1 per axis) that lead from one stride to a finer one.

    Axes with fewer doublings than others do theirs last, where maps are finest: that is cheapest.

    Raises:
        ConfigError: The ratio along some axis is not a power of two.
    """
    doublings = []
    for c, f in zip(coarse, fine, strict=True):
        power = round(log2(c / f))
        if f << max(power, 0) != c:
            raise ConfigError(
                f"from stride {coarse} to {fine} the sizes do not double a whole number of times; "
                "decoders need strides whose ratios are powers of two"
            )
        doublings.append(power)
    most = max(doublings)
    return [tuple(2 if most - k <= d else 1 for d in doublings) for k in range(most)]
