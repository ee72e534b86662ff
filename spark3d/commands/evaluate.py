"""`spark3d evaluate`: predicted and reference label maps in, scores per case and organ out."""

import logging
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from rich.console import Console

from spark3d.commands.command_line import recorded_command
from spark3d.commands.evaluate_pairs import Pair, Pairs, find_pairs, read_pair, read_record
from spark3d.commands.report_cases import write_pages
from spark3d.commands.runs import versions
from spark3d.commands.splitting import weighed
from spark3d.commands.stores import some
from spark3d.data.files import write_atomic
from spark3d.data.io import read_volume
from spark3d.data.names import safe_name
from spark3d.data.nifti_header import Geometry
from spark3d.engine.progress import step_progress
from spark3d.errors import ConfigError, DataError, EnvironmentProblem
from spark3d.evaluation.legacy import legacy_table, legacy_variants
from spark3d.evaluation.metrics import ABSENT_RULE, score_case
from spark3d.evaluation.results import FILE, REFERENCE_GRID, CaseScores, Evaluation
from spark3d.evaluation.tables import legacy_rich_table, summary_table
from spark3d.protocols import SMOKE_NOTE
from spark3d.reports.panels import overlay
from spark3d.reports.viewer import make_viewer, save_viewer

log = logging.getLogger(__name__)


def evaluate_command(
    predictions: Path,
    references: Path,
    out: Path,
    name: str | None = None,
    labels: Mapping[int, str] | None = None,
    tolerance_mm: float | Mapping[str, float] | None = None,
    partial: bool = False,
    legacy: bool = False,
    pages: bool = False,
    images: Path | None = None,
    console: Console | None = None,
    allow_overlap: bool = False,
    geometry: Geometry | None = None,
) -> Evaluation:
    """Score label maps case by case on the grid of the references, and picture three cases.

    Args:
        predictions: folder of `<case>.nii.gz`, usually of `spark3d predict`.
        references: dataset with labels (Decathlon, nnU-Net, BTCV), or a folder of label maps that
            are called like the predictions.
        out: gets `evaluation.json`, `evaluation.csv` and `overlays/<case>.png`; those of an
            earlier evaluation there are replaced.
        name: how tables call the run; the predictions' folder if not given.
        labels: label -> organ; those recorded with the predictions or the dataset if not given.
        tolerance_mm: of the normalised surface Dice, for all organs, or by name with "" for the
            others; that of the run's recipe if not given, or 2.
        partial: leave out references without a prediction; they are refused otherwise.
        legacy: also print Dice as other programs average it (`evaluation.legacy`), and write it to
            `legacy.csv`; on the resampled grid where `predict` recorded the model's spacing.
        images: folder of the volumes that were predicted, for pictures; needed where `references`
            holds label maps alone.
        pages: picture every case, not three, and write a page for each, `cases/<case>.html`.
        console: where the table is printed; stdout by default.
        allow_overlap: score cases that the model was trained on; they are refused otherwise.
        geometry: which part of a contradictory header of references and images to trust, "agree"
            for none; as the prediction did if not given.

    Raises:
        ConfigError: `out` holds something else, a tolerance that makes no sense.
        DataError: cases of training, files that do not pair, grids that differ, labels that were
            not declared.
    """
    record = read_record(predictions)
    score, protocol = record.get("score") or {}, record.get("protocol") or {}
    if tolerance_mm is None:
        tolerance_mm = float(score.get("tolerance_mm", 2.0))
    console = console or Console()
    pairs = find_pairs(predictions, references, labels, partial, images, geometry)
    within = tolerances(tolerance_mm, pairs.organs.values())
    overlap = weighed(trained_on(pairs), {}, allow_overlap)
    make_folder(out)
    scored = score_pairs(pairs, within, console.is_terminal)
    name = name or safe_name(predictions.resolve().name, "predictions")
    if protocol.get("smoke"):
        name = f"{name} ({SMOKE_NOTE})"
    result = Evaluation(name, pairs.organs, scored)
    shown = ranks(result)
    settings = {
        "tolerance_mm": within if len(set(within.values())) > 1 else next(iter(within.values())),
        "protocol": protocol or None,
        "absent_rule": ABSENT_RULE,
        "grid": REFERENCE_GRID,
        "unpredicted": list(pairs.unpredicted),
        **({"overlap": overlap} if overlap else {}),
        "overlays": shown,
        "predict_command": record.get("command"),
        "command": shlex.join(recorded_command()),
        "versions": versions(),
    }
    result = replace(result, settings=settings)
    write_atomic(out / FILE, result.to_json().encode())
    write_atomic(out / "evaluation.csv", result.to_csv().encode())
    drawn = [pair.id for pair in pairs.cases] if pages else list(shown.values())
    draw_overlays(pairs, drawn, out / "overlays")
    write_pages(result, out, drawn if pages else [])
    console.print(summary_table(result))
    if legacy:
        write_legacy(pairs, out / "legacy.csv", console)
    return result


def trained_on(pairs: Pairs) -> list[str]:
    """The cases that the model was trained on, told as errors are."""
    if not (seen := pairs.trained_on):
        return []
    what = f"{len(seen)} of {len(pairs.cases)} predicted cases were trained on: {some(seen)}"
    return [f"{what}; predict the others alone, such as with --held-out, into a new folder"]


def tolerances(given: float | Mapping[str, float], organs: Iterable[str]) -> dict[str, float]:
    """The tolerance of every organ in mm.

    Raises:
        ConfigError: not above 0, an organ that is not scored, or one without a tolerance.
    """
    by_name = dict(given) if isinstance(given, Mapping) else {"": given}
    names = list(organs)
    if unknown := sorted(by_name.keys() - {"", *names}):
        raise ConfigError(f"tolerance_mm names {', '.join(unknown)}; scored are {', '.join(names)}")
    found = {name: by_name.get(name, by_name.get("", 0.0)) for name in names}
    for name, value in found.items():
        if not value > 0:
            raise ConfigError(
                f"tolerance_mm={value:g} for {name} must be above 0; 1 to 3 mm are usual"
            )
    return found


def write_legacy(pairs: Pairs, path: Path, console: Console) -> None:
    """Score all cases again as other programs do, print the means and write every case."""
    cases = {}
    for pair in pairs.cases:
        reference, prediction = read_pair(pair, pairs.labels)
        cases[pair.id] = legacy_variants(prediction, reference, pairs.organs, pairs.spacing_mm)
    table = legacy_table(cases, pairs.spacing_mm)
    console.print(legacy_rich_table(table))
    if pairs.spacing_mm is None:
        console.print("not on the resampled grid: no predict.json tells the model's spacing")
    lines = [",".join(["case", *(f'"{name}"' for name in table.means)])]
    for case, row in table.cases.items():
        lines.append(",".join([case, *(f"{row[name]:.6g}" for name in table.means)]))
    write_atomic(path, ("\n".join(lines) + "\n").encode())


def score_pairs(
    pairs: Pairs, tolerance_mm: float | Mapping[str, float], show: bool
) -> tuple[CaseScores, ...]:
    """Score every pair on the grid of its reference; `show` draws a bar."""
    scored = []
    with step_progress("scoring", len(pairs.cases), show=show) as bar:
        for pair in pairs.cases:
            reference, prediction = read_pair(pair, pairs.labels)
            scores = score_case(
                prediction.array[0], reference.array[0], pairs.organs, reference.spacing_mm,
                tolerance_mm,
            )  # fmt: skip
            scored.append(CaseScores(pair.id, {o: asdict(s) for o, s in scores.items()}))
            bar.advance(pair.id)
    return tuple(scored)


def ranks(scores: Evaluation) -> dict[str, str]:
    """The case of the best, median and worst mean Dice; fewer where there are not three cases."""
    ranked = scores.ranked("dice")
    if not ranked:
        return {}
    chosen = {"best": ranked[-1], "median": ranked[len(ranked) // 2], "worst": ranked[0]}
    seen: dict[str, str] = {}
    for rank, case in chosen.items():
        if case not in seen.values():
            seen[rank] = case
    return seen


def draw_overlays(pairs: Pairs, shown: Iterable[str], folder: Path) -> None:
    """Draw the cases, on the image where it is known, and make them ready for scrolling.

    Older pictures are removed.
    """
    folder.mkdir(exist_ok=True)
    for old in (*folder.glob("*.png"), *folder.glob("*.json")):
        old.unlink()
    by_id = {pair.id: pair for pair in pairs.cases}
    for case in shown:
        pair = by_id[case]
        reference, prediction = read_pair(pair, pairs.labels)
        volumes = image_of(pair, reference.size), reference.array[0], prediction.array[0]
        spacing = reference.spacing_mm
        overlay(*volumes, folder / f"{case}.png", spacing, pairs.labels, pairs.window)
        viewer = make_viewer(*volumes, spacing, pairs.labels, pairs.window)
        save_viewer(viewer, folder / f"{case}.json")


def image_of(pair: Pair, size: tuple[int, ...]) -> np.ndarray | None:
    """The first channel of a case's image, None where it is unknown or cannot be laid under."""
    if pair.image is None:
        log.info("%s: its overlay has no image; --images tells where it is", pair.id)
        return None
    try:
        volume = read_volume(pair.image, geometry=pair.geometry, channels=True, nan_fill=0.0)
    except DataError as error:
        log.warning("%s: its overlay has no image: %s", pair.id, error)
        return None
    if volume.size != size:
        log.warning("%s: image and reference differ in size, so its overlay has no image", pair.id)
        return None
    return volume.array[0]


def make_folder(out: Path) -> None:
    """Make `out`, or go on with one that holds an evaluation.

    Raises:
        ConfigError: it holds something else.
        EnvironmentProblem: it cannot be made.
    """
    inside = {f.name for f in out.iterdir()} if out.is_dir() else set()
    if out.is_file() or (inside and FILE not in inside):
        raise ConfigError(f"--out {out} holds something else; choose a new folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EnvironmentProblem(
            f"cannot write --out {out}: {error.strerror}; choose another folder"
        ) from None
