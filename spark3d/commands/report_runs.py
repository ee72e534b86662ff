"""Training runs as the report shows them: facts, recipe, curves, reconstructions over time."""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from spark3d.config import read_yaml
from spark3d.engine.logging import read_metrics
from spark3d.errors import DataError
from spark3d.protocols import SMOKE_NOTE
from spark3d.reports.curves import Curve, line_chart
from spark3d.reports.html import Chart, RunCard, picture, spaced

MOST_PANELS = 8
KINDS = {"pretrain": "pre-training", "finetune": "fine-tuning", "classify": "classification"}
CURVES = (
    ("train", "loss", "loss"),
    ("probe", "dice", "Dice of a linear probe"),
    ("val", "dice", "validation Dice"),
    ("val", "top1", "validation top-1"),
    ("val", "top5", "validation top-5"),
)
"""What is drawn where it was logged: kind of line, its value, and what the chart calls it."""


@dataclass(frozen=True)
class Run:
    """A run folder, read: `record` is its `run.json`, `recipe` its resolved recipe."""

    name: str
    folder: Path
    record: Mapping[str, Any]
    recipe: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]

    @property
    def kind(self) -> str:
        """What was trained: pretrain or finetune."""
        return str(self.record.get("kind", "run"))

    @property
    def command(self) -> str:
        """The command line, or nothing if the run did not record it."""
        words = self.record.get("command", "")
        return words if isinstance(words, str) else shlex.join(map(str, words))


def read_run(name: str, folder: Path) -> Run:
    """Read a run folder.

    Raises:
        DataError: if `run.json` or the recipe in it cannot be read.
    """
    file = folder / "run.json"
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read ({error}); is {folder} a run folder?") from None
    if not isinstance(record, dict):
        raise DataError(f"{file} holds no record of a run; is {folder} a run folder?")
    recipe_file = folder / "recipe.yaml"
    recipe = (
        read_yaml(recipe_file.read_text("utf-8"), str(recipe_file)) if recipe_file.is_file() else {}
    )
    return Run(name, folder, record, recipe or {}, read_metrics(folder / "metrics.jsonl"))


def run_card(run: Run) -> RunCard:
    """Facts to read, recipe and versions to unfold, pictures on the way."""
    recipe = run.folder / "recipe.yaml"
    details = [
        ("Command", run.command),
        ("Recipe, as resolved", recipe.read_text("utf-8").strip() if recipe.is_file() else ""),
        ("Versions", _lines(run.record.get("versions", {}))),
    ]
    film = [picture(p, f"step {step_of(p)}") for p in _panels(run.folder)]
    return RunCard(
        run.name,
        KINDS.get(run.kind, run.kind),
        tuple((name, text) for name, text in _facts(run) if text),
        tuple((name, text) for name, text in details if text),
        tuple(film),
    )


def run_curves(runs: Sequence[Run], colours: Mapping[str, int]) -> list[Chart]:
    """Losses, and validation scores of fine-tuning: one chart each, where logged."""
    charts = []
    for kind, title in KINDS.items():
        chosen = [r for r in runs if r.kind == kind]
        for line, value, name in CURVES:
            curves = [c for r in chosen if (c := _curve(r, line, value, colours)) is not None]
            if curves:
                legend = tuple((c.name, c.colour) for c in curves)
                svg = line_chart(curves, name, smooth=line == "train")
                charts.append(Chart(f"{title.capitalize()}: {name}", svg, legend))
    return charts + [chart for run in runs if (chart := _ranks(run)) is not None]


def _ranks(run: Run) -> Chart | None:
    """Effective rank of every stage of a pre-trained encoder; near 1 it has collapsed."""
    names = sorted({k for m in run.metrics for k in m if k.startswith("rank ")})
    stages = {f"stage {name.removeprefix('rank ')}": i for i, name in enumerate(names)}
    curves = [
        replace(curve, name=stage, colour=i)
        for (stage, i), name in zip(stages.items(), names, strict=True)
        if (curve := _curve(run, "probe", name, {run.name: i})) is not None
    ]
    if not curves:
        return None
    legend = tuple((c.name, c.colour) for c in curves)
    svg = line_chart(curves, "effective rank", smooth=False)
    return Chart(f"{run.name}: effective rank of the stages", svg, legend)


def duration(seconds: float) -> str:
    """Seconds in words: 42 s, 3 min 20 s, 2 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.0f} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def step_of(panel: Path) -> str:
    """The step in a panel's name, `step_000500.png`, with thin groups of thousands."""
    digits = "".join(c for c in panel.stem if c.isdigit())
    return f"{int(digits):,}".replace(",", "\u2009") if digits else panel.stem


def _curve(run: Run, line: str, value: str, colours: Mapping[str, int]) -> Curve | None:
    points = [(m["step"], m[value]) for m in run.metrics if m.get("kind") == line and value in m]
    known = [(step, v) for step, v in points if v is not None]
    if not known:
        return None
    steps, values = zip(*known, strict=True)
    return Curve(run.name, steps, values, colours[run.name])


def _facts(run: Run) -> list[tuple[str, str]]:
    recipe, record = run.recipe, run.record
    losses = [
        m["loss"] for m in run.metrics if m.get("kind") == "train" and m.get("loss") is not None
    ]
    data = _section(recipe, "data")
    summary = record.get("summary", {})
    return [
        ("Protocol", _protocol(_section(recipe, "protocol"))),
        ("Network", str(_section(recipe, "model").get("backbone", ""))),
        ("Masking", _masking(_section(recipe, "mask"))),
        ("Started from", _start(run)),
        ("Training cases", _cases(_section(record, "inputs").get("train"))),
        ("Training images", str(_section(record, "inputs").get("images", ""))),
        ("Seen in pre-training", _seen(_section(_section(record, "inputs"), "overlap"), run.kind)),
        ("Overlap allowed", _allowed(_section(_section(record, "inputs"), "overlap"))),
        ("Budget", _budget(_section(recipe, "optim"))),
        ("Crop", _times(data.get("crop") or _section(recipe, "images").get("crop"))),
        ("Spacing", f"{_times(data['spacing_mm'])} mm" if data.get("spacing_mm") else ""),
        ("Intensities", _window(data.get("window"))),
        ("Loss", f"{losses[0]:.3g} at first, {losses[-1]:.3g} at the end" if losses else ""),
        ("Validation Dice", _number(summary.get("dice"))),
        ("Validation top-1", _share(summary.get("top1"))),
        ("Validation top-5", _share(summary.get("top5"))),
        ("Time", duration(record["seconds"]) if "summary" in record else "not finished"),
        ("Version", str(_section(record, "versions").get("spark3d", ""))),
        ("Commit", str(record.get("git") or "")),
    ]


def _section(tree: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = tree.get(name)
    return found if isinstance(found, Mapping) else {}


def _start(run: Run) -> str:
    inputs = _section(run.record, "inputs")
    encoder = inputs.get("encoder") or inputs.get("init")
    if run.kind == "pretrain" and not encoder:
        return ""
    return f"encoder weights {str(encoder)[:12]}" if encoder else "random weights (scratch)"


def _cases(names: Any) -> str:
    return str(len(names)) if isinstance(names, list) else ""


def _seen(overlap: Mapping[str, Any], kind: str) -> str:
    counts = _section(overlap, "pretraining")
    parts = [f"{n} of {of} {part}" for part, (n, of) in counts.items() if of]
    things = "images" if kind == "classify" else "volumes"
    text = f"{', '.join(parts)} {things}" if parts else ""
    known = [f"{n} of {of} {part}" for part, (n, of) in _section(overlap, "patients").items() if of]
    return f"{text}; patients of {', '.join(known)} volumes" if known else text


def _allowed(overlap: Mapping[str, Any]) -> str:
    told = overlap.get("allowed")
    return f"{'; '.join(told)}. Scores are not those of unseen cases." if told else ""


def _protocol(section: Mapping[str, Any]) -> str:
    if not section:
        return ""
    smoke = f". {SMOKE_NOTE.capitalize()}" if section.get("smoke") else ""
    return f"{section['name']} ({str(section['sha256'])[:12]}){smoke}"


def _masking(mask: Mapping[str, Any]) -> str:
    if "ratio" not in mask:
        return ""
    return f"{mask['ratio']:.0%} hidden, cells of {_times(mask.get('cell_size'))}"


def _budget(optim: Mapping[str, Any]) -> str:
    if "steps" not in optim:
        return ""
    return (
        f"{optim['steps']} steps, batch {optim.get('batch')}, {optim.get('name')} at "
        f"{optim.get('lr')}, {optim.get('schedule')}"
    )


def _window(window: Any) -> str:
    if not isinstance(window, Mapping) or window.get("low") is None:
        return str(window.get("mode", "")) if isinstance(window, Mapping) else ""
    return f"{window['low']:g} to {window['high']:g}, {window.get('mode', 'unit')}"


def _times(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " × ".join(f"{v:.3g}" if isinstance(v, float) else str(v) for v in value)  # noqa: RUF001
    return "" if value is None else str(value)


def _number(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, int | float) else ""


def _share(value: Any) -> str:
    return f"{value:.1%}" if isinstance(value, int | float) else ""


def _lines(values: Any) -> str:
    if not isinstance(values, Mapping):
        return ""
    return "\n".join(f"{name} {text}" for name, text in values.items())


def _panels(folder: Path) -> list[Path]:
    return spaced(sorted((folder / "panels").glob("*.png")), MOST_PANELS)
