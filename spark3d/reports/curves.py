"""Charts as inline SVG that follows the page's light or dark theme.

Figures are drawn with stand-in colours, each of which becomes a CSS variable of the page.
Matplotlib's object interface only: no pyplot, no state.
"""

import html
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

INK, FAINT, RULE, SHEET = "#010101", "#020202", "#030303", "#040404"
RUNS = tuple(f"#05050{i}" for i in range(6))
"""Stand-ins of the runs' colours: `--run-0` to `--run-5` of the page."""

VARIABLES = {INK: "--ink", FAINT: "--faint", RULE: "--rule", SHEET: "--sheet"} | {
    colour: f"--run-{i}" for i, colour in enumerate(RUNS)
}
SMOOTHING = 40
"""A curve is smoothed over a fortieth of its length."""
MOST_POINTS = 600


@dataclass(frozen=True)
class Curve:
    """One line of a chart; `colour` numbers the run's colour."""

    name: str
    steps: Sequence[float]
    values: Sequence[float]
    colour: int = 0


@dataclass(frozen=True)
class Scores:
    """The values of one run: group (organ) -> one value per case, NaN where not scored."""

    name: str
    groups: Mapping[str, Sequence[float]]


def line_chart(curves: Sequence[Curve], y_label: str, smooth: bool = True) -> str:
    """Values over steps; with `smooth`, a moving average and the values faintly behind it."""
    figure, ax = _new(5.2, 2.7)
    for curve in curves:
        colour = RUNS[curve.colour % len(RUNS)]
        steps, values = np.asarray(curve.steps, float), np.asarray(curve.values, float)
        known = np.isfinite(values)
        steps, values = steps[known], values[known]
        if not len(values):
            continue
        if smooth and len(values) > 2 * SMOOTHING:
            ax.plot(*_thin(steps, values), color=colour, lw=0.6, alpha=0.28)
            values = moving_average(values, max(len(values) // SMOOTHING, 1))
        style = {} if len(values) > 12 else {"marker": "o", "ms": 4}
        ax.plot(*_thin(steps, values), color=colour, lw=1.9, label=curve.name, **style)
    ax.set_xlabel("step")
    ax.set_ylabel(y_label)
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    _focus(ax, curves)
    return to_svg(figure, y_label)


def box_chart(runs: Sequence[Scores], x_label: str, limits: tuple[float, float] | None) -> str:
    """A box and the cases as dots for each group and run; groups from top to bottom.

    Args:
        limits: ends of the axis; None lets the values decide.
    """
    groups = list(runs[0].groups)
    step = 0.8 / len(runs)
    figure, ax = _new(10.6, 0.75 + len(groups) * max(0.27 * len(runs), 0.4))
    for i, run in enumerate(runs):
        colour = RUNS[i % len(RUNS)]
        for row, group in enumerate(groups):
            values = np.asarray(run.groups[group], float)
            values = values[np.isfinite(values)]
            at = row - 0.4 + step * (i + 0.5)
            _box(ax, values, at, 0.62 * step, colour)
    ax.set_yticks(range(len(groups)), groups, parse_math=False)
    ax.set_ylim(len(groups) - 0.45, -0.55)
    ax.set_xlabel(x_label)
    if limits is not None:
        ax.set_xlim(*limits)
    _only_upright_lines(ax)
    return to_svg(figure, x_label)


def pair_chart(first: Mapping[str, float], second: Mapping[str, float], x_label: str) -> str:
    """Each case as a line from its value in the first run to that in the second, sorted.

    Cases that one of the runs lacks are left out.
    """
    both = [k for k in first if math.isfinite(first[k]) and math.isfinite(second.get(k, math.nan))]
    both.sort(key=lambda k: first[k])
    figure, ax = _new(10.6, 0.75 + 0.26 * max(len(both), 2))
    for row, case in enumerate(both):
        ends = first[case], second[case]
        ax.plot(ends, (row, row), color=RULE, lw=3, solid_capstyle="round", zorder=1)
        for i, value in enumerate(ends):
            ax.plot(value, row, "o", ms=6.5, color=RUNS[i], mec=SHEET, mew=1, zorder=2 + i)
    ax.set_yticks(range(len(both)), both, parse_math=False)
    ax.set_ylim(-0.7, max(len(both), 1) - 0.3)
    ax.set_xlabel(x_label)
    _only_upright_lines(ax)
    return to_svg(figure, x_label)


def moving_average(values: np.ndarray, width: int) -> np.ndarray:
    """Mean over `width` neighbours on each side, fewer at the ends; as long as `values`."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    low, high = np.maximum(at - width, 0), np.minimum(at + width + 1, len(values))
    return (total[high] - total[low]) / (high - low)


def to_svg(figure: Figure, label: str) -> str:
    """The figure as one `<svg>` element in the page's colours and font, with a text alternative."""
    text = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "spark3d"}):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(
        r' id="(?:figure|axes|patch|line2d|text|matplotlib\.axis|xtick|ytick)_\d+"', "", svg
    )
    svg = re.sub(r"font-family: [^;\"]*;?", "", svg)
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    kind = "chart wide" if figure.get_figwidth() > 8 else "chart"
    return svg.replace(
        "<svg ", f'<svg role="img" aria-label="{html.escape(label)}" class="{kind}" ', 1
    )


def draw_bytes(figure: Figure, kind: str) -> bytes:
    """The figure as a file of its own, "svg" or "png", on white."""
    buffer = io.BytesIO()
    metadata = {"Date": None} if kind == "svg" else None
    figure.savefig(buffer, format=kind, dpi=150, facecolor="white", metadata=metadata)
    return buffer.getvalue()


def _new(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure((width, height), layout="constrained")
    ax = figure.add_subplot()
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.spines["bottom"].set_color(RULE)
    ax.grid(axis="y", color=RULE, lw=0.8)
    ax.set_axisbelow(True)
    ax.tick_params(colors=FAINT, labelcolor=FAINT, labelsize=9, length=0)
    for name in (ax.xaxis.label, ax.yaxis.label):
        name.set_color(FAINT)
        name.set_fontsize(9.5)
    return figure, ax


def _only_upright_lines(ax: Axes) -> None:
    ax.grid(visible=False, axis="y")
    ax.grid(axis="x", color=RULE, lw=0.8)
    ax.tick_params(axis="y", labelcolor=INK)


def _box(ax: Axes, values: np.ndarray, at: float, width: float, colour: str) -> None:
    if not len(values):
        return
    low, middle, high = np.percentile(values, (25, 50, 75))
    reach = 1.5 * (high - low)
    inside = values[(values >= low - reach) & (values <= high + reach)]
    ax.plot((inside.min(), inside.max()), (at, at), color=colour, lw=1.1, zorder=2)
    ax.barh(at, high - low, width, low, color=colour, alpha=0.28, zorder=3)
    ax.plot((middle, middle), (at - width / 2, at + width / 2), color=colour, lw=2.4, zorder=5)
    spread = np.linspace(-0.32, 0.32, len(values)) * width if len(values) > 1 else np.zeros(1)
    order = np.argsort(np.argsort(np.sin(np.arange(len(values)) * 12.9898)))
    ax.plot(values, at + spread[order], "o", ms=2.6, color=colour, alpha=0.75, mew=0, zorder=4)


def _focus(ax: Axes, curves: Sequence[Curve]) -> None:
    """End the axis at the 99.5th percentile, so that a few large values do not flatten the rest."""
    values = np.concatenate([np.asarray(c.values, float) for c in curves] or [np.zeros(1)])
    values = values[np.isfinite(values)]
    if len(values) > 50:
        low, high = values.min(), np.percentile(values, 99.5)
        margin = 0.06 * max(high - low, 1e-9)
        ax.set_ylim(low - margin, high + margin)


def _thin(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most 600 points, evenly chosen, the last among them."""
    kept = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), MOST_POINTS)).astype(int))
    return steps[kept], values[kept]
