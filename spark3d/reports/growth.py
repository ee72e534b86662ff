"""The curve of `spark3d bench core --curve`: cost of packed cells over the visible share."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from spark3d.data.files import write_atomic
from spark3d.reports.curves import FAINT, INK, RULE, RUNS, draw_bytes
from spark3d.reports.efficiency import PAPER


@dataclass(frozen=True)
class GrowthPoint:
    """Cost of packed cells over that of the whole grid, at one crop and visible share."""

    network: str
    what: str
    crop: int
    visible: float
    cost: float


def save_growth(points: Sequence[GrowthPoint], path: Path) -> None:
    """A panel for every network and measure as a file, `.svg` or `.png`; the ideal is dashed."""
    networks = list(dict.fromkeys(p.network for p in points))
    measures = list(dict.fromkeys(p.what for p in points))
    crops = sorted({p.crop for p in points})
    figure = Figure((4.6 * len(networks), 3.5 * len(measures)), layout="constrained")
    panels = figure.subplots(len(measures), len(networks), squeeze=False)
    for row, what in zip(panels, measures, strict=True):
        for ax, network in zip(row, networks, strict=True):
            mine = [p for p in points if (p.network, p.what) == (network, what)]
            _panel(ax, mine, crops)
            ax.set_title(f"{network}: {what}", loc="left", color=PAPER[FAINT], fontsize=10)
    panels[0][0].legend(frameon=False, fontsize=9, labelcolor=PAPER[INK])
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "spark3d"}):
        write_atomic(path, draw_bytes(figure, path.suffix.removeprefix(".")))


def _panel(ax: Axes, points: Sequence[GrowthPoint], crops: Sequence[int]) -> None:
    """One line per crop; on the dashed line a cell costs what it costs on the whole grid."""
    colours: Mapping[int, str] = dict(zip(crops, (PAPER[run] for run in RUNS), strict=False))
    for crop in crops:
        mine = sorted((p for p in points if p.crop == crop), key=lambda p: p.visible)
        at, cost = [p.visible for p in mine], [p.cost for p in mine]
        ax.plot(at, cost, "o-", color=colours[crop], lw=1.7, ms=4, label=f"{crop}³")
    ax.plot((0, 1), (0, 1), "--", color=PAPER[FAINT], lw=1, label="ideal")
    ax.set_xlim(0, 1)
    ax.set_ylim(bottom=0)
    ax.set_xlabel("visible share of the cells", color=PAPER[FAINT], fontsize=9.5)
    ax.set_ylabel("over the whole grid", color=PAPER[FAINT], fontsize=9.5)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(color=PAPER[RULE], lw=0.8)
    ax.set_axisbelow(True)
    ax.tick_params(colors=PAPER[FAINT], labelcolor=PAPER[FAINT], labelsize=9, length=0)
