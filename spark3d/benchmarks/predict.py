"""One measurement of prediction: agreement, time side by side, or the peak memory of a process.

python -m spark3d.benchmarks.predict 2 '{"measure": "time", ...}'
"""

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from spark3d.benchmarks import meter
from spark3d.benchmarks.predict_cases import PredictCase, PredictJob
from spark3d.evaluation.peer import monai_labels, monai_logits
from spark3d.evaluation.windows import WindowPlan, predict_labels, predict_logits
from spark3d.models.backbones import build_backbone

BUFFERED = {"buffer_steps": 1, "buffer_dim": 0}


def make(case: PredictCase) -> tuple[nn.Module, Tensor, WindowPlan]:
    """A network with random weights, a random volume in [0, 1], and the plan."""
    torch.manual_seed(0)
    options = {
        "init_filters": case.filters, "blocks_down": (1, 1, 1), "blocks_up": (1, 1),
        "out_channels": case.classes,
    }  # fmt: skip
    network = build_backbone("monai/segresnet", 3, 1, **options).network.eval()
    volume = torch.rand(1, *case.size, generator=torch.Generator().manual_seed(1))
    return network, volume, WindowPlan(case.window, case.overlap, case.batch)


def contestants(case: PredictCase) -> dict[str, Callable[[], Tensor]]:
    """By name, what predicts the same label map in its own way."""
    network, volume, plan = make(case)
    return {
        "monai": lambda: monai_labels(network, volume, plan),
        "monai buffered": lambda: monai_labels(network, volume, plan, BUFFERED),
        "spark3d": lambda: predict_labels(network, volume, plan),
    }


def run_job(job: PredictJob) -> dict[str, Any]:
    """Do what `job` says, in this process."""
    if job.measure == "agree":
        return _agreement(job.case)
    if job.measure == "peak":
        assert job.contestant is not None
        run = contestants(job.case)[job.contestant]
        before = meter.peak_memory()
        run()
        return {"before": before, "peak": meter.peak_memory()}
    return _one_round(job)


def _one_round(job: PredictJob) -> dict[str, Any]:
    """Seconds of every contestant, in reversed order in every other round.

    Each predicts a volume of one window first, which is not counted.
    """
    load = os.getloadavg()[0]
    for run in contestants(replace(job.case, size=job.case.window)).values():
        run()
    runs = list(contestants(job.case).items())
    seconds = {}
    for name, run in reversed(runs) if job.round % 2 else runs:
        start = time.perf_counter()
        run()
        seconds[name] = time.perf_counter() - start
    return {"seconds": seconds, "load": [load, os.getloadavg()[0]]}


def _agreement(case: PredictCase) -> dict[str, float]:
    """Largest difference of a logit on a volume of two windows and a half per axis."""
    x, y, z = (min(n, w * 5 // 2) for n, w in zip(case.size, case.window, strict=True))
    small = replace(case, size=(x, y, z))
    network, volume, plan = make(small)
    ours, theirs = predict_logits(network, volume, plan), monai_logits(network, volume, plan)
    return {
        "largest_difference": float((ours - theirs).abs().max()),
        "largest_logit": float(theirs.abs().max()),
        "labels_that_differ": float((ours.argmax(0) != theirs.argmax(0)).float().mean()),
    }


def main() -> None:
    """Run the job given on the command line with so many threads."""
    threads, text = sys.argv[1:]
    torch.set_num_threads(int(threads))
    job = PredictJob.from_dict(json.loads(text))
    result = {"result": run_job(job), "machine": meter.machine(int(threads))}
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
