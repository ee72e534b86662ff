"""Cases as pages show them: a picture in three planes, slices to scroll through, scores."""

import math
import shutil
from collections.abc import Sequence
from pathlib import Path

from spark3d import __version__
from spark3d.commands.report_scores import Scored, spaced_out
from spark3d.evaluation.results import CaseScores, Evaluation
from spark3d.evaluation.tables import TITLES, digits
from spark3d.reports.html import (
    CaseCard,
    CaseGroup,
    Report,
    TextTable,
    picture,
    write_report,
)
from spark3d.reports.viewer import load_viewer

CASE_PAGES = "cases"


def case_group(scored: Scored, colour: int) -> CaseGroup:
    """Best, median and worst case of one run, as far as their overlays are there."""
    ranks = scored.scores.settings.get("overlays", {})
    by_id = {c.id: c for c in scored.scores.cases}
    cards = [
        case_card(scored.folder, scored.scores.name, by_id[case], rank)
        for rank, case in ranks.items()
        if case in by_id and overlay_of(scored.folder, case).is_file()
    ]
    return CaseGroup(scored.scores.name, colour, tuple(cards))


def case_card(folder: Path, run: str, case: CaseScores, rank: str) -> CaseCard:
    """One case with its pictures."""
    organs = tuple(
        (spaced_out(organ), "absent" if math.isnan(s["dice"]) else f"{s['dice']:.3f}")
        for organ, s in case.organs.items()
    )
    file = overlay_of(folder, case.id)
    viewer = load_viewer(slices) if (slices := file.with_suffix(".json")).is_file() else None
    caption = f"{case.id}: reference and prediction of {run} in three planes"
    text = f"Dice {case.mean('dice'):.3f}"
    return CaseCard(rank, case.id, text, organs, picture(file, caption), viewer)


def overlay_of(folder: Path, case: str) -> Path:
    """The picture of a case in an evaluation folder."""
    return folder / "overlays" / f"{case}.png"


def write_pages(scores: Evaluation, folder: Path, cases: Sequence[str]) -> None:
    """A page for each of the cases, `cases/<case>.html`; older pages are removed."""
    shutil.rmtree(folder / CASE_PAGES, ignore_errors=True)
    if not cases:
        return
    (folder / CASE_PAGES).mkdir()
    by_id = {c.id: c for c in scores.cases}
    order = scores.ranked()
    for case in cases:
        place = f"{len(order) - order.index(case)} of {len(order)}" if case in order else ""
        card = case_card(folder, scores.name, by_id[case], place)
        page = Report(
            title=case,
            verdict=f"{scores.name}: {card.score}, mean over the organs that are scored.",
            byline=(f"spark3d {__version__}",),
            case_tables=(_table(by_id[case]),),
            cases=(CaseGroup(scores.name, 0, (card,)),),
        )
        write_report(page, folder / CASE_PAGES / f"{case}.html")


def _table(case: CaseScores) -> TextTable:
    rows = []
    for organ, scores in case.organs.items():
        cells = ["n/a" if math.isnan(scores[m]) else f"{scores[m]:.{digits(m)}f}" for m in TITLES]
        rows.append((spaced_out(organ), *cells))
    return TextTable("Scores", ("organ", *TITLES.values()), tuple(rows))
