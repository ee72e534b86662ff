"""`spark3d bench predict`: equal answers, honest memory, results that are kept."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from spark3d.benchmarks.predict import contestants, run_job
from spark3d.benchmarks.predict_cases import (
    CONTESTANTS,
    QUICK,
    PredictCase,
    PredictJob,
    predict_jobs,
)
from spark3d.commands.bench_predict import bench_predict_command
from spark3d.errors import ConfigError, DataError
from spark3d.evaluation.peer import monai_labels
from spark3d.evaluation.windows import WindowPlan

TINY = PredictCase((20, 18, 16), 3, (8, 8, 8), 0.25, 8)


def invented(job: PredictJob, threads: int) -> dict[str, Any]:
    """Answers of the right form, at once."""
    values: dict[str, Any] = {
        "agree": {"largest_difference": 2e-6, "largest_logit": 3.5, "labels_that_differ": 0.0},
        "peak": {"before": 1 << 20, "peak": (3 if job.contestant == "spark3d" else 9) << 20},
        "time": {
            "seconds": {n: 2.0 if n == "spark3d" else 3.0 + job.round for n in CONTESTANTS},
            "load": [0.5, 1.5],
        },
    }
    return {"result": values[job.measure], "machine": {"threads": threads, "cpu": "test"}}


def test_all_contestants_predict_the_same_labels() -> None:
    maps = [run() for run in contestants(TINY).values()]
    assert len(maps) == len(CONTESTANTS)
    assert maps[0].shape == TINY.size
    assert len(torch.unique(maps[0])) > 1
    for other in maps[1:]:
        assert float((other != maps[0]).float().mean()) < 1e-3


def test_logits_agree_to_1e_5() -> None:
    found = run_job(PredictJob("agree", TINY))
    assert found["largest_logit"] > 0.01
    assert found["largest_difference"] < 1e-5


def test_peak_and_time_are_measured() -> None:
    peak = run_job(PredictJob("peak", TINY, "spark3d"))
    assert peak["peak"] >= peak["before"] > 0
    for number in (1, 2):
        time = run_job(PredictJob("time", TINY, None, number))
        order = list(CONTESTANTS) if number == 2 else list(reversed(CONTESTANTS))
        assert list(time["seconds"]) == order
        assert min(time["seconds"].values()) > 0


def test_table_and_file_of_a_whole_run_are_completed(tmp_path: Path) -> None:
    out, console, calls = tmp_path / "p.json", Console(record=True, width=200), []

    def count(job: PredictJob, threads: int) -> dict[str, Any]:
        calls.append(job)
        return invented(job, threads)

    bench_predict_command(out, ["agree", "peak"], True, runner=count, console=console)
    assert len(calls) == 1 + len(CONTESTANTS)
    bench_predict_command(out, quick=True, runner=count, console=console, seconds=0)
    assert [job.key for job in calls[4:]] == ["time: round 1"]
    bench_predict_command(out, quick=True, runner=count, console=console)
    assert [job.key for job in calls[5:]] == ["time: round 2", "time: round 3"]
    text = console.export_text()
    assert "2.50 (2.00-3.00)" in text
    assert "3.00" in text
    assert "2.0e-06" in text
    assert set(json.loads(out.read_text())["results"]) == {QUICK.name}


def test_jobs_survive_json() -> None:
    for job in predict_jobs(PredictCase(), ["time", "peak", "agree"], 3):
        assert PredictJob.from_dict(json.loads(json.dumps(job.as_dict()))) == job


def test_mistakes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="choose from agree, peak, time"):
        bench_predict_command(tmp_path / "p.json", ["speed"])
    (tmp_path / "p.json").write_text("[]")
    with pytest.raises(DataError, match="no results"):
        bench_predict_command(tmp_path / "p.json", ["agree"], True)
    plan = WindowPlan((8, 8), flips=((0,),))
    with pytest.raises(ConfigError, match="no flips"):
        monai_labels(torch.nn.Identity(), torch.zeros(1, 9, 9), plan)
