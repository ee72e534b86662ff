"""One job of a label-efficiency study: fine-tune one start on one subset, then score it.

A job has a folder of its own, so that jobs may run in any order, at once, or on several machines
that share the disk. `result.json` is written last: without it the job is not done.
"""

import json
import os
import shutil
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from spark3d.build import load_segmenter
from spark3d.commands.evaluate import score_pairs
from spark3d.commands.evaluate_pairs import find_pairs
from spark3d.commands.finetune import finetune_command
from spark3d.commands.inputs import one_hash
from spark3d.commands.predict import PredictSettings, predict_command, window_plan
from spark3d.commands.predict_ledger import OtherPrediction
from spark3d.commands.runs import read_run_record
from spark3d.data.files import write_atomic
from spark3d.data.store import Store
from spark3d.engine.logging import read_metrics
from spark3d.errors import ConfigError
from spark3d.evaluation.metrics import score_case
from spark3d.evaluation.results import (
    FILE,
    REFERENCE_GRID,
    STORE_GRID,
    CaseScores,
    Evaluation,
)
from spark3d.evaluation.windows import predict_labels

RESULT = "result.json"
PREDICTIONS = "predictions"
SCORING = frozenset({"grid", "tolerance_mm", "skip_empty", "padding"})
"""What of a job's identity concerns the scores of its model, not the model."""


@dataclass(frozen=True)
class Job:
    """One fine-tuning.

    Attributes:
        arm: name of the start.
        encoder: its weights; None for scratch.
        encoder_sha256: of the weights.
        labels: training cases with label.
        subset: number of the draw of training cases, and of all other draws.
        seed: of the run: initial weights and crops.
        train: ids of the training cases.
        subset_seed: of the draw.
        lr: learning rate; None takes that of the study's recipe.
    """

    arm: str
    encoder: Path | None
    encoder_sha256: str | None
    labels: int
    subset: int
    seed: int
    train: tuple[str, ...]
    subset_seed: int
    lr: float | None = None

    @property
    def key(self) -> str:
        """Name of its folder."""
        return f"{self.arm}-n{self.labels}-s{self.subset}"


@dataclass(frozen=True)
class Study:
    """What all jobs share.

    Attributes:
        out: folder of the study.
        store: prepared volumes.
        volumes: the files they were prepared from, for scores on the original grid; None scores on
            the grid of the store.
        recipe: file of the resolved recipe.
        digest: of its keys that change results.
        validation: ids of the scored cases.
        voxels: hash of what is stored of every training and validation case, by id.
        labels: name of every class that is scored.
        tolerance_mm: of the surface Dice.
        overlap: of windows, in prediction.
        skip_empty: whether prediction leaves out windows of air.
        padded: whether a scored case is smaller than a window, and what is around it not 0.
        allow_overlap: as in fine-tuning.
        threads: of every job; None leaves them alone.
    """

    out: Path
    store: Path
    volumes: Path | None
    recipe: Path
    digest: str
    validation: tuple[str, ...]
    voxels: dict[str, str]
    labels: dict[int, str]
    tolerance_mm: float
    overlap: float
    skip_empty: bool
    padded: bool
    allow_overlap: bool
    threads: int | None = None

    def folder(self, job: Job) -> Path:
        """Of a job."""
        return self.out / "jobs" / job.key

    def identity(self, job: Job) -> dict[str, Any]:
        """All that the result of a job depends on."""
        return {
            "recipe": self.digest,
            "encoder": job.encoder_sha256,
            "lr": job.lr,
            "seed": job.seed,
            "train": list(job.train),
            "validation": list(self.validation),
            "data": one_hash([self.voxels[case] for case in (*job.train, *self.validation)]),
            "grid": "store" if self.volumes is None else "original",
            "tolerance_mm": self.tolerance_mm,
            "skip_empty": self.skip_empty,
            "padding": "darkest" if self.padded else "none",
        }

    def is_done(self, job: Job) -> bool:
        """Whether the job has a result.

        Raises:
            ConfigError: its folder holds the result of another job.
        """
        result = self.folder(job) / RESULT
        if not result.is_file():
            return False
        try:
            known = json.loads(result.read_text("utf-8"))["identity"]
            mine = self.identity(job)
            padding = "zero" if self.padded else "none"
            before = {
                "lr": None, "skip_empty": False, "padding": padding, "data": mine["data"], **known,
            }  # fmt: skip
            before = {key: before[key] for key in mine}
        except (ValueError, KeyError, TypeError):
            raise ConfigError(f"{result} cannot be read; remove {result.parent}") from None
        different = [key for key, value in mine.items() if before[key] != value]
        if different:
            names = ["state of its voxels or labels" if k == "data" else k for k in different]
            raise ConfigError(
                f"{result.parent} is a job with another {', '.join(names)}; choose a new folder "
                f"for --out, {_way_on(different)}"
            )
        return True


def _way_on(different: list[str]) -> str:
    if SCORING.issuperset(different):
        return f"or remove {RESULT} and {PREDICTIONS}/ of each job to score its model again"
    return "or give the same values to go on"


def run_job(study: Study, job: Job) -> None:
    """Fine-tune, score, write the result; what is there of an earlier attempt is used."""
    if study.threads is not None:
        torch.set_num_threads(study.threads)
    folder = study.folder(job)
    folder.mkdir(parents=True, exist_ok=True)
    run = folder / "run"
    finetune_command(
        study.store, run, job.encoder, str(study.recipe), overrides(study, job),
        study.allow_overlap,
    )  # fmt: skip
    began = time.perf_counter()
    score = score_on_store if study.volumes is None else score_on_files
    scores = Evaluation(job.key, study.labels, score(study, run, folder), _settings(study))
    write_atomic(folder / FILE, scores.to_json().encode())
    result = {
        "key": job.key,
        "arm": job.arm,
        "labels": job.labels,
        "subset": job.subset,
        "identity": study.identity(job),
        "seconds": round(read_run_record(run)["seconds"] + time.perf_counter() - began, 1),
        "threads": torch.get_num_threads(),
        "curve": curve(run),
        "cases": json.loads(scores.to_json())["cases"],
    }
    write_atomic(folder / RESULT, (json.dumps(result) + "\n").encode())
    shutil.rmtree(run / "checkpoints", ignore_errors=True)  # the model is there, so they are spent


def curve(run: Path) -> list[tuple[int, float | None]]:
    """Mean Dice on the store's grid by step, as fine-tuning logged it."""
    lines = read_metrics(run / "metrics.jsonl")
    return [(line["step"], line["dice"]) for line in lines if line["kind"] == "val"]


def overrides(study: Study, job: Job) -> tuple[str, ...]:
    """What a job changes in the recipe of the study."""
    threads = () if study.threads is None else (f"compute.threads={study.threads}",)
    return (
        f"seed={job.seed}",
        f"split.labels={job.labels}",
        f"split.subset_seed={job.subset_seed}",
        *(() if job.lr is None else (f"optim.lr={job.lr}",)),
        *threads,
    )


def score_on_files(study: Study, run: Path, folder: Path) -> tuple[CaseScores, ...]:
    """Predict the validation cases from their files and score them on their own grids."""
    volumes = study.volumes
    assert volumes is not None
    prepared = Store.open(study.store).settings

    def predict() -> Path:
        return predict_command(
            run, volumes, folder / PREDICTIONS, study.overlap,
            skip_empty=study.skip_empty, only=study.validation, geometry=prepared["geometry"],
            nan_fill=prepared["nan_fill"],
        )  # fmt: skip

    try:
        found = predict()
    except OtherPrediction:  # what an earlier attempt left, with other settings
        shutil.rmtree(folder / PREDICTIONS)
        found = predict()
    pairs = find_pairs(found, volumes, None, partial=True)
    return score_pairs(pairs, study.tolerance_mm, show=False)


def score_on_store(study: Study, run: Path, folder: Path) -> tuple[CaseScores, ...]:
    """Predict the validation cases of the store and score them on its grid."""
    store, segmenter = Store.open(study.store), load_segmenter(run)
    settings = PredictSettings(study.overlap, skip_empty=study.skip_empty)
    plan = window_plan(segmenter, settings, batch=1)
    scored = []
    for case in study.validation:
        record = store.record(case)
        window, statistics = segmenter.window, (record.mean, record.std)
        volume = torch.from_numpy(window.apply(store.read(case), *statistics))
        padded = replace(plan, pad_value=window.outside(record.minimum, *statistics))
        labels = predict_labels(segmenter.network, volume, padded).numpy()
        scores = score_case(
            labels, store.read_label(case), study.labels, store.spacing_mm, study.tolerance_mm
        )
        scored.append(CaseScores(case, {o: asdict(s) for o, s in scores.items()}))
    return tuple(scored)


def run_job_apart(study: Study, job: Job) -> None:
    """The same in a process of its own, whose screen is `log.txt` in the job's folder."""
    folder = study.folder(job)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log.txt").open("ab", buffering=0) as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        run_job(study, job)


def read_result(folder: Path) -> dict[str, Any]:
    """The line of a finished job."""
    return json.loads((folder / RESULT).read_text("utf-8"))


def _settings(study: Study) -> dict[str, Any]:
    grid = STORE_GRID if study.volumes is None else REFERENCE_GRID
    return {"grid": grid, "tolerance_mm": study.tolerance_mm}
