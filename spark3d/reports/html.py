"""One HTML file with everything in it: opens offline, reads without script, light and dark theme.

The page is a tree of plain records, filled by the command and laid out by
`templates/report.html.j2`. Empty parts leave no trace on the page.
"""

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal

from jinja2 import Environment, PackageLoader, StrictUndefined

from spark3d.data.files import write_atomic
from spark3d.reports.viewer import Viewer

Tone = Literal["good", "bad", "even"]
"""Whether a number is an improvement, a loss, or too uncertain to say."""


@dataclass(frozen=True)
class Picture:
    """A picture with its own bytes in `uri`."""

    uri: str
    caption: str


@dataclass(frozen=True)
class Headline:
    """A large number at the top; `colour` is the run's (0 to 5) or None."""

    label: str
    value: str
    note: str
    tone: Tone = "even"
    colour: int | None = None


@dataclass(frozen=True)
class RunCard:
    """One training run: facts to read, details to unfold, reconstructions over time."""

    name: str
    kind: str
    facts: tuple[tuple[str, str], ...]
    details: tuple[tuple[str, str], ...] = ()
    film: tuple[Picture, ...] = ()


@dataclass(frozen=True)
class Chart:
    """An inline `<svg>`, and which run has which colour in it."""

    title: str
    svg: str
    legend: tuple[tuple[str, int], ...] = ()
    note: str = ""


@dataclass(frozen=True)
class ScoreCell:
    """Mean and spread as text; `bar` is the mean as a share of 1, where that makes sense."""

    mean: str
    spread: str = ""
    bar: float | None = None
    best: bool = False


@dataclass(frozen=True)
class Change:
    """A paired difference to the first run, as text."""

    mean: str
    interval: str
    pairs: str
    tone: Tone


@dataclass(frozen=True)
class ScoreRow:
    """One organ; `total` marks the mean over organs."""

    name: str
    cells: tuple[ScoreCell, ...]
    changes: tuple[Change, ...] = ()
    total: bool = False


@dataclass(frozen=True)
class ScoreTable:
    """One metric of all runs, with a sentence on how to read it."""

    title: str
    runs: tuple[str, ...]
    rows: tuple[ScoreRow, ...]
    note: str = ""


@dataclass(frozen=True)
class CaseCard:
    """One case of one run: rank ("best", "median", "worst"), scores per organ, pictures."""

    rank: str
    case: str
    score: str
    organs: tuple[tuple[str, str], ...]
    picture: Picture
    viewer: Viewer | None = None


@dataclass(frozen=True)
class CaseGroup:
    """The cases shown of one run."""

    run: str
    colour: int
    cards: tuple[CaseCard, ...]


@dataclass(frozen=True)
class TextTable:
    """A table of texts; the first column stands to the left."""

    title: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Study:
    """Label efficiency: a sentence on what was done, warnings, a chart and tables."""

    lead: str
    warnings: tuple[str, ...]
    chart: Chart
    tables: tuple[TextTable, ...]


@dataclass(frozen=True)
class Report:
    """The whole page, in reading order."""

    title: str
    verdict: str
    byline: tuple[str, ...] = ()
    headlines: tuple[Headline, ...] = ()
    runs: tuple[RunCard, ...] = ()
    curves: tuple[Chart, ...] = ()
    studies: tuple[Study, ...] = ()
    tables: tuple[ScoreTable, ...] = ()
    grid: str = ""
    spreads: tuple[Chart, ...] = ()
    cases: tuple[CaseGroup, ...] = ()
    case_tables: tuple[TextTable, ...] = ()
    commands: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def picture(path: Path, caption: str) -> Picture:
    """A PNG file as a picture that carries its bytes."""
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return Picture(f"data:image/png;base64,{data}", caption)


def spaced(paths: Sequence[Path], most: int) -> list[Path]:
    """At most `most` of the paths, evenly spaced, the first and the last among them."""
    if len(paths) <= most:
        return list(paths)
    return [paths[round(i * (len(paths) - 1) / (most - 1))] for i in range(most)]


def render(report: Report) -> str:
    """The page as text; everything but the charts is escaped.

    The only script is the viewer's own, where there is a viewer, allowed by its hash.
    """
    shown = any(card.viewer for group in report.cases for card in group.cards)
    script = (resources.files("spark3d.reports") / "templates" / "viewer.js").read_text("utf-8")
    environment = Environment(
        loader=PackageLoader("spark3d.reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2").render(
        report=report,
        script=script if shown else "",
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii"),
    )


def write_report(report: Report, path: Path) -> None:
    """Write the page, whole or not at all."""
    write_atomic(path, render(report).encode("utf-8"))
