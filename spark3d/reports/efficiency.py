"""The curve of a label-efficiency study: score over labels, and what each start changes."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from spark3d.data.files import write_atomic
from spark3d.reports.curves import FAINT, INK, RULE, RUNS, SHEET, draw_bytes, to_svg

PAPER: Mapping[str, str] = {
    INK: "#1c2430", FAINT: "#5b6675", RULE: "#d9dfe7", SHEET: "#ffffff",
    **dict(zip(RUNS, ("#b45f06", "#2b5fd0", "#0f8a5f", "#7d3fc4", "#c03a78", "#0e8296"),
               strict=True)),
}  # fmt: skip
"""Colours of a chart that stands alone, in place of those of the page."""


@dataclass(frozen=True)
class LabelPoint:
    """One arm at one label count; `change` is (mean, low, high) against the first arm."""

    arm: str
    labels: int
    mean: float
    low: float
    high: float
    change: tuple[float, float, float] | None = None


def efficiency_chart(points: Sequence[LabelPoint], arms: Sequence[str]) -> str:
    """Scores, and changes where there are two arms, as inline `<svg>` in the page's colours."""
    return to_svg(_draw(points, arms, {}), "mean Dice over the number of labels")


def save_chart(points: Sequence[LabelPoint], arms: Sequence[str], path: Path) -> None:
    """The same with a legend as a file, `.svg` or `.png`, on white."""
    figure = _draw(points, arms, PAPER)
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "spark3d"}):
        write_atomic(path, draw_bytes(figure, path.suffix.removeprefix(".")))


def _draw(points: Sequence[LabelPoint], arms: Sequence[str], colours: Mapping[str, str]) -> Figure:
    """`colours` replaces the stand-ins of the page; with any, there is a legend."""
    figure = Figure((10.6 if len(arms) > 1 else 5.3, 3.7), layout="constrained")
    left, *rest = figure.subplots(1, 2 if len(arms) > 1 else 1, squeeze=False)[0]
    counts = sorted({p.labels for p in points})
    for number, arm in enumerate(arms):
        colour = RUNS[number % len(RUNS)]
        colour = colours.get(colour, colour)
        mine = sorted((p for p in points if p.arm == arm), key=lambda p: p.labels)
        shift = 1 + 0.03 * (number - (len(arms) - 1) / 2)
        at = [p.labels * shift for p in mine]
        _series(left, at, [(p.mean, p.low, p.high) for p in mine], colour, arm)
        changed = [(x, p.change) for x, p in zip(at, mine, strict=True) if p.change]
        for right in rest if changed else ():
            _series(right, [x for x, _ in changed], [c for _, c in changed], colour, arm)
    _frame(left, counts, "mean Dice", colours)
    for right in rest:
        right.axhline(0, color=colours.get(FAINT, FAINT), lw=1)
        _frame(right, counts, f"change against {arms[0]}", colours)
    if colours:
        left.legend(frameon=False, fontsize=9, labelcolor=colours[INK])
    return figure


def _series(
    ax: Axes,
    at: Sequence[float],
    values: Sequence[tuple[float, float, float]],
    colour: str,
    name: str,
) -> None:
    """A line through the means with a bar for every interval."""
    means = [mean for mean, _, _ in values]
    ax.plot(at, means, "o-", color=colour, lw=1.9, ms=5, label=name)
    for x, (_, low, high) in zip(at, values, strict=True):
        if not math.isnan(low):
            ax.plot((x, x), (low, high), color=colour, lw=1.3, alpha=0.8)


def _frame(ax: Axes, counts: Sequence[int], title: str, colours: Mapping[str, str]) -> None:
    faint, rule = colours.get(FAINT, FAINT), colours.get(RULE, RULE)
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(FixedLocator(counts))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xticks(counts, [str(c) for c in counts])
    ax.set_xlim(counts[0] / 1.25, counts[-1] * 1.25)
    ax.set_xlabel("labelled training cases", color=faint, fontsize=9.5)
    ax.set_title(title, loc="left", color=faint, fontsize=10)
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.spines["bottom"].set_color(rule)
    ax.grid(axis="y", color=rule, lw=0.8)
    ax.set_axisbelow(True)
    ax.tick_params(colors=faint, labelcolor=faint, labelsize=9, length=0)
