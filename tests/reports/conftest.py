"""Small run and evaluation folders, as the commands write them."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from spark3d.evaluation.metrics import METRICS
from spark3d.evaluation.results import CaseScores, Evaluation

ORGANS = {1: "brainstem", 2: "spinal cord", 3: "right parotid", 4: "left parotid", 5: "mandible"}


def write_picture(path: Path) -> None:
    """A grey PNG of a few pixels in place of a real picture."""
    Image.new("RGB", (6, 3), "gray").save(path)


def write_run(folder: Path, kind: str, steps: int = 120, seed: int = 0) -> Path:
    """A training run with a falling loss and, for pre-training, three reconstruction panels."""
    rng = np.random.default_rng(seed)
    (folder / "panels").mkdir(parents=True)
    record = {
        "kind": kind,
        "command": ["spark3d", kind, "--data", "my scans", "--out", str(folder)],
        "inputs": {"encoder": "ab" * 32 if seed == 2 else None, "train": ["a", "b"]},
        "versions": {"spark3d": "0.1.0", "torch": "2.15.0"},
        "git": "0123456789ab",
        "seconds": 372.4,
        "summary": {"dice": 0.71} if kind == "finetune" else {"steps": steps},
    }
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "recipe.yaml").write_text(
        "data: {crop: [48, 64, 48], spacing_mm: [4.0, 4.0, 3.0], "
        "window: {mode: unit, low: -200.0, high: 300.0}}\n"
        "model: {backbone: monai/segresnet}\n"
        + ("mask: {ratio: 0.7, cell_size: [8, 8, 8]}\n" if kind == "pretrain" else "")
        + f"optim: {{name: adamw, lr: 1e-3, steps: {steps}, batch: 4, schedule: cosine}}\n"
    )
    lines = []
    for step in range(1, steps + 1):
        loss = 0.4 + 0.5 * np.exp(-3 * step / steps) + rng.normal(0, 0.03)
        lines.append({"kind": "train", "step": step, "loss": loss, "lr": 1e-3, "seconds": 0.2})
        if kind == "finetune" and step % (steps // 6) == 0:
            lines.append(
                {"kind": "val", "step": step, "dice": 0.72 * (1 - np.exp(-4 * step / steps))}
            )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if kind == "pretrain":
        for step in (1, steps // 2, steps):
            write_picture(folder / "panels" / f"step_{step:06d}.png")
    return folder


def write_evaluation(folder: Path, name: str, gain: float = 0.0, cases: int = 8) -> Path:
    """Scores of the same cases, `gain` above a common base, with three overlays."""
    base, rng = np.random.default_rng(1), np.random.default_rng(len(name))
    scored = []
    for i in range(cases):
        organs = {}
        for organ in ORGANS.values():
            dice = float(np.clip(base.normal(0.7, 0.07) + gain + rng.normal(0, 0.01), 0, 1))
            values = (dice, min(dice + 0.1, 1), 12 * (1 - dice), 3 * (1 - dice), 0.5 - dice / 2)
            organs[organ] = dict(zip(METRICS, values, strict=True))
        if i == 2:
            organs["mandible"] = dict.fromkeys(METRICS, float("nan"))
        scored.append(CaseScores(f"case_{i:02d}", organs))
    scores = Evaluation(name, ORGANS, tuple(scored))
    ranked = scores.ranked()
    shown = {"best": ranked[-1], "median": ranked[len(ranked) // 2], "worst": ranked[0]}
    settings = {
        "tolerance_mm": 2.0,
        "overlays": shown,
        "command": f"spark3d evaluate --name {name}",
    }
    (folder / "overlays").mkdir(parents=True)
    text = Evaluation(name, ORGANS, tuple(scored), settings).to_json()
    (folder / "evaluation.json").write_text(text)
    for case in shown.values():
        write_picture(folder / "overlays" / f"{case}.png")
    return folder


@pytest.fixture
def run_folder(tmp_path: Path) -> Callable[..., Path]:
    """Make a run folder by name: `run_folder("pre", "pretrain")`."""
    return lambda name, *args, **kw: write_run(tmp_path / name, *args, **kw)


@pytest.fixture
def evaluation_folder(tmp_path: Path) -> Callable[..., Path]:
    """Make an evaluation folder by name: `evaluation_folder("a", "scratch", gain=0.0)`."""
    return lambda name, *args, **kw: write_evaluation(tmp_path / name, *args, **kw)


@pytest.fixture(scope="session")
def make_run() -> Callable[..., Path]:
    """`make_run(folder, kind)` writes a run folder."""
    return write_run


@pytest.fixture(scope="session")
def make_evaluation() -> Callable[..., Path]:
    """`make_evaluation(folder, name, gain)` writes an evaluation folder."""
    return write_evaluation
