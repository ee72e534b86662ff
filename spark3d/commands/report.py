"""`spark3d report`: run folders and evaluation folders in, one HTML page out."""

import logging
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from spark3d import __version__
from spark3d.commands.label_tables import STUDY
from spark3d.commands.report_cases import case_group
from spark3d.commands.report_runs import Run, duration, read_run, run_card, run_curves
from spark3d.commands.report_scores import (
    Scored,
    check_comparable,
    command_of,
    grid_of,
    headlines,
    read_scores,
    score_table,
    spread_charts,
    verdict,
)
from spark3d.commands.report_studies import StudyFolder, read_study_folder, study_section
from spark3d.errors import ConfigError, DataError
from spark3d.evaluation.metrics import ABSENT_RULE, METRICS
from spark3d.evaluation.results import FILE, Evaluation, shared_organs
from spark3d.reports.html import Headline, Report, write_report

log = logging.getLogger(__name__)

DEFINITIONS = (
    "Dice: twice the common volume over the sum of volumes. NSD: share of both surfaces that lies "
    "within the tolerance of the other. HD95: the larger of the two directed 95th percentiles of "
    "the surface distances. Volume error: signed, relative to the reference."
)


def report_command(
    runs: Sequence[Path | str], out: Path, title: str = "Pre-training and segmentation report"
) -> Path:
    """Write one self-contained page about training runs and evaluations.

    Args:
        runs: folders, each `FOLDER` or `NAME=FOLDER`, in the order of the page. The others are
            compared with the first evaluation.
        out: HTML file; an existing one is replaced.
        title: heading of the page.

    Raises:
        ConfigError: no folder, two with one name, or scores of another grid or tolerance.
        DataError: a folder that is neither a run nor an evaluation, or runs without common organs.
    """
    trained, scored, studies = read_folders(runs)
    evaluations = [s.scores for s in scored]
    if len(evaluations) > 1 and not shared_organs(evaluations):
        names = ", ".join(e.name for e in evaluations)
        raise DataError(f"{names} have no organ in common; report on them one by one")
    check_comparable(evaluations)
    colours = run_colours(trained, scored)
    groups = [case_group(s, i) for i, s in enumerate(scored)]
    page = Report(
        title=title,
        verdict=_verdict(trained, evaluations, studies),
        byline=_byline(trained, scored),
        headlines=tuple(headlines(evaluations) if evaluations else _loss_headlines(trained)),
        runs=tuple(run_card(r) for r in trained),
        curves=tuple(run_curves(trained, colours)),
        studies=tuple(study_section(s) for s in studies),
        tables=tuple(score_table(evaluations, m) for m in METRICS) if evaluations else (),
        grid=grid_of(evaluations[0]) if evaluations else "",
        spreads=tuple(spread_charts(evaluations)) if evaluations else (),
        cases=tuple(g for g in groups if g.cards),
        commands=_commands(trained, scored, studies),
        notes=_notes(scored),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    write_report(page, out)
    log.info("report: %s", out)
    return out


def read_folders(
    runs: Sequence[Path | str],
) -> tuple[list[Run], list[Scored], list[StudyFolder]]:
    """Tell runs, evaluations and label-efficiency studies apart by what lies there; read them.

    Raises:
        ConfigError: no folder at all, or a name given twice.
        DataError: a folder that is neither; lists all of them.
    """
    trained, scored, studies, neither = [], [], [], []
    for item in runs:
        name, folder = _named(item)
        if (folder / FILE).is_file():
            scored.append(read_scores(name, folder))
        elif (folder / "run.json").is_file():
            trained.append(read_run(name or folder.name, folder))
        elif (folder / STUDY).is_file():
            studies.append(read_study_folder(name or folder.name, folder))
        else:
            neither.append(str(folder))
    if neither:
        raise DataError(
            f"neither a run (run.json), an evaluation ({FILE}) nor a study ({STUDY}) in: "
            f"{', '.join(neither)}"
        )
    if not trained and not scored and not studies:
        raise ConfigError("nothing to report on; name run folders or evaluation folders")
    for names in ([r.name for r in trained], [s.scores.name for s in scored]):
        twice = sorted({n for n in names if names.count(n) > 1})
        if twice:
            raise ConfigError(f"name {twice[0]!r} stands twice; tell them apart with NAME=FOLDER")
    return trained, scored, studies


def run_colours(trained: Sequence[Run], scored: Sequence[Scored]) -> dict[str, int]:
    """Numbers of colours by name; a run shares that of the evaluation of the same name."""
    colours = {s.scores.name: i for i, s in enumerate(scored)}
    for run in trained:
        colours.setdefault(run.name, len(colours))
    return colours


def _named(item: Path | str) -> tuple[str | None, Path]:
    name, equals, folder = str(item).partition("=")
    if equals and name and not Path(item).exists():
        return name, Path(folder)
    return None, Path(item)


def _byline(trained: Sequence[Run], scored: Sequence[Scored]) -> tuple[str, ...]:
    seconds = sum(r.record.get("seconds", 0.0) for r in trained)
    cases = {c.id for s in scored for c in s.scores.cases}
    return tuple(
        part
        for part in (
            datetime.now().astimezone().strftime("%-d %B %Y"),
            f"spark3d {__version__}",
            _count(len(trained), "training run") if trained else "",
            f"{duration(seconds)} of training" if seconds else "",
            _count(len(cases), "test case") if cases else "",
        )
        if part
    )


def _loss_headlines(trained: Sequence[Run]) -> list[Headline]:
    found = []
    for i, run in enumerate(trained):
        losses = [(m["step"], m["loss"]) for m in run.metrics if m.get("kind") == "train"]
        known = [(step, loss) for step, loss in losses if loss is not None]
        if known:
            note = f"loss at step {known[-1][0]}, {known[0][1]:.3g} at first"
            found.append(Headline(run.name, f"{known[-1][1]:.3g}", note, colour=i))
    return found


def _verdict(
    trained: Sequence[Run], evaluations: Sequence[Evaluation], studies: Sequence[StudyFolder]
) -> str:
    if evaluations:
        return verdict(evaluations)
    if studies:
        return " ".join(s.verdict for s in studies)
    return _count(len(trained), "training run") + "."


def _commands(
    trained: Sequence[Run], scored: Sequence[Scored], studies: Sequence[StudyFolder]
) -> tuple[str, ...]:
    lines = [r.command for r in trained] + [s.command for s in studies]
    lines += [line for s in scored for line in command_of(s.folder)]
    return tuple(dict.fromkeys(line for line in lines if line))


def _notes(scored: Sequence[Scored]) -> tuple[str, ...]:
    if not scored:
        return ()
    rules = {str(s.scores.settings.get("absent_rule", ABSENT_RULE)) for s in scored}
    return (
        DEFINITIONS,
        *(line for s in scored for line in _overlap(s.scores)),
        *(f"Absent organs: {rule}." for rule in sorted(rules)),
        "The mean of organs is taken per case first, then over cases; the background is not in it.",
    )


def _overlap(scores: Evaluation) -> list[str]:
    """Leaks that were allowed when a run was scored."""
    told = scores.settings.get("overlap", {}).get("allowed", ())
    return [f"{scores.name}: {line}. Scores are not those of unseen cases." for line in told]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
