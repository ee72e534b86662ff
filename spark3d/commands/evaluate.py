"""`spark3d evaluate`: predicted and reference label maps in, scores per case and organ out."""

import logging
import shlex
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from rich.console import Console

from spark3d.commands.evaluate_pairs import Pair, Pairs, find_pairs, read_pair, read_record
from spark3d.commands.runs import versions
from spark3d.data.files import write_atomic
from spark3d.data.io import read_volume
from spark3d.engine.logging import step_progress
from spark3d.errors import ConfigError, EnvironmentProblem
from spark3d.evaluation.metrics import ABSENT_RULE, score_case
from spark3d.evaluation.results import FILE, CaseScores, Evaluation
from spark3d.evaluation.tables import summary_table
from spark3d.protocols import SMOKE_NOTE
from spark3d.reports.panels import overlay

log = logging.getLogger(__name__)


def evaluate_command(
    predictions: Path,
    references: Path,
    out: Path,
    name: str | None = None,
    labels: Mapping[int, str] | None = None,
    tolerance_mm: float | None = None,
    partial: bool = False,
    console: Console | None = None,
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
        tolerance_mm: of the normalised surface Dice; that of the run's recipe if not given, or 2.
        partial: leave out references without a prediction; they are refused otherwise.
        console: where the table is printed; stdout by default.

    Raises:
        ConfigError: `out` holds something else, a tolerance that makes no sense.
        DataError: files that do not pair, grids that differ, labels that were not declared.
    """
    record = read_record(predictions)
    score, protocol = record.get("score") or {}, record.get("protocol") or {}
    if tolerance_mm is None:
        tolerance_mm = float(score.get("tolerance_mm", 2.0))
    if not tolerance_mm > 0:
        raise ConfigError(f"tolerance_mm={tolerance_mm} must be above 0; 1 to 3 mm are usual")
    console = console or Console()
    make_folder(out)
    pairs = find_pairs(predictions, references, labels, partial)
    scored = []
    with step_progress("scoring", len(pairs.cases), show=console.is_terminal) as bar:
        for pair in pairs.cases:
            reference, prediction = read_pair(pair, pairs.labels)
            scores = score_case(
                prediction.array[0], reference.array[0], pairs.organs, reference.spacing_mm,
                tolerance_mm,
            )  # fmt: skip
            scored.append(CaseScores(pair.id, {o: asdict(s) for o, s in scores.items()}))
            bar.advance(pair.id)
    name = name or predictions.resolve().name
    if protocol.get("smoke"):
        name = f"{name} ({SMOKE_NOTE})"
    result = Evaluation(name, pairs.organs, tuple(scored))
    shown = ranks(result)
    settings = {
        "tolerance_mm": tolerance_mm,
        "protocol": protocol or None,
        "absent_rule": ABSENT_RULE,
        "grid": "of the reference files",
        "predictions": str(predictions.resolve()),
        "references": str(references.resolve()),
        "unpredicted": list(pairs.unpredicted),
        "overlays": shown,
        "command": shlex.join(["spark3d", *sys.argv[1:]]),
        "versions": versions(),
    }
    result = replace(result, settings=settings)
    write_atomic(out / FILE, result.to_json().encode())
    write_atomic(out / "evaluation.csv", result.to_csv().encode())
    draw_overlays(pairs, shown, out / "overlays")
    console.print(summary_table(result))
    return result


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


def draw_overlays(pairs: Pairs, shown: Mapping[str, str], folder: Path) -> None:
    """Draw the chosen cases, on the image where it is known; older pictures are removed."""
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.png"):
        old.unlink()
    by_id = {pair.id: pair for pair in pairs.cases}
    for case in shown.values():
        pair = by_id[case]
        reference, prediction = read_pair(pair, pairs.labels)
        overlay(
            image_of(pair, reference.size), reference.array[0], prediction.array[0],
            folder / f"{case}.png", reference.spacing_mm, pairs.labels, pairs.window,
        )  # fmt: skip


def image_of(pair: Pair, size: tuple[int, ...]) -> np.ndarray | None:
    """The first channel of a case's image, None where it is unknown or lies on another grid."""
    if pair.image is None or not pair.image.is_file():
        log.info("%s: no image beside the labels, so its overlay has none", pair.id)
        return None
    volume = read_volume(pair.image, channels=True, nan_fill=0.0)
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
