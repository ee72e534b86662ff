"""What share of a real pre-training waits for data."""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from spark3d.errors import EnvironmentProblem

SKIPPED_STEPS = 3
"""At the start, not counted."""


@dataclass(frozen=True)
class Pace:
    """The counted steps of a run.

    Attributes:
        step: Mean seconds of a step.
        idle: Share of the time that waits for data.
        device: Name of the GPU, or "cpu".
    """

    step: float
    idle: float
    device: str


def measure_pretraining(words: Sequence[str], steps: int, out: Path) -> Pace:
    """Run `spark3d pretrain`, without figures or checkpoints, and read its metrics.

    Args:
        words: recipe, overrides and options; not steps, workers' logs or `--out`.
        steps: counted ones, after `SKIPPED_STEPS`.
        out: folder of the run.

    Raises:
        EnvironmentProblem: the run failed.
    """
    quiet = (
        f"optim.steps={steps + SKIPPED_STEPS}", "optim.warmup=1", "log.every=1",
        "log.tensorboard=false", "log.panels_every=100000", "compute.checkpoint_every=100000",
    )  # fmt: skip
    call = [sys.executable, "-m", "spark3d.cli", "pretrain", *words, *quiet, "--out", str(out)]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise EnvironmentProblem(f"the training step could not be measured: {reason}")
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    kept = [line for line in lines if line["step"] > SKIPPED_STEPS]
    total, waited = (sum(line[k] for line in kept) for k in ("seconds", "data_seconds"))
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu"
    return Pace(total / len(kept), waited / total, device)
