"""Does pre-training help on OpenKBP? Scratch and pre-trained over label counts, subsets and seeds.

    python benchmarks/transfer_openkbp.py --data openkbp/ --work work/ [--recipe openkbp_small]

Resumable: each job is one line of `work/results.jsonl`; finished jobs are skipped, started ones
resume from their checkpoint. Two jobs run at a time (`--jobs`), one thread each. What each job runs
is `spark3d finetune`, then `spark3d predict` and a Dice on the original grid of the scored cases.
"""

import argparse
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from transfer_jobs import (
    FROZEN_RATE,
    PRETRAIN_SEEDS,
    TUNING_SUBSETS,
    Job,
    arguments,
    best_rate,
    note,
    pretrain,
    run_job,
    spacing_of,
    start_job,
    tuning_jobs,
)

STAGES = (
    "prepare",
    "pretrain",
    "tune",
    "pairs8",
    "seen",
    "gate",
    "shuffled",
    "pairs20",
    "pairsall",
    "total",
    "pairs4",
    "frozen",
    "counts",
)


LABELS = {"pairs4": 4, "pairs8": 8, "seen": 8, "pairs20": 20, "pairsall": None}
SUBSETS = {"pairs4": 5, "pairs8": 5, "seen": 5, "pairs20": 5, "pairsall": 2}
"""Pairs of a stage; `seen` scores those of pairs8 on cases whose images pre-training has seen."""


def pairs(stage: str, subsets: int, best: dict[str, float], steps: int) -> list[Job]:
    """Scratch and pre-trained on the same subset, with the same draws and the same initial head.

    The pre-training seed alternates from subset to subset.
    """
    labels = LABELS[stage]
    jobs = []
    for subset in range(subsets):
        seed = PRETRAIN_SEEDS[subset % 2]
        jobs.append(Job(stage, "scratch", labels, subset, None, best["scratch"], steps))
        jobs.append(Job(stage, "pre", labels, subset, seed, best["pre"], steps))
    return jobs


def jobs_of(stage: str, options: argparse.Namespace) -> list[Job]:
    """The fine-tunings of one stage."""
    steps = options.steps
    if stage == "tune":  # both arms, same grid, training cases only; scored on other training cases
        return tuning_jobs({"scratch": None, "pre": PRETRAIN_SEEDS[0]}, steps)
    if stage == "frozen":  # what the decoder makes of features alone: pre-trained, and shuffled
        arms = ("pre", "shuffled")
        return [Job(stage, a, 8, s, 0, FROZEN_RATE, steps) for s in TUNING_SUBSETS for a in arms]
    best = {arm: best_rate(arm, options) for arm in ("scratch", "pre")}
    if stage == "gate":  # is scratch trained enough? twice the steps must gain less than .03
        return [Job(stage, "scratch", 8, s, None, best["scratch"], 2 * steps) for s in range(2)]
    if stage == "shuffled":  # the pre-trained numbers, permuted within each tensor
        return [Job(stage, "shuffled", 8, s, PRETRAIN_SEEDS[s], best["pre"], steps) for s in (0, 1)]
    if stage == "total":  # scratch, given the compute of pre-training too
        total = total_steps(options.work, steps)
        return [Job(stage, "scratch", 8, 0, None, best["scratch"], total)]
    if stage == "counts":  # do labels limit the network? the tuning cases with fewer and with all
        arms = (("scratch", None), ("pre", PRETRAIN_SEEDS[0]))
        counts = [(count, s) for count in (2, 85) for s in TUNING_SUBSETS]
        return [Job(stage, a, n, s, seed, best[a], steps) for n, s in counts for a, seed in arms]
    return pairs(stage, options.subsets or SUBSETS[stage], best, steps)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--subsets", type=int, help="pairs of each stage instead of 5 (all: 2)")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.data, options.work = options.data.resolve(), options.work.resolve()
    data, work = options.data, options.work
    if options.job:
        job = Job(**json.loads(options.job))
        line = run_job(job, data, work, options.recipe, options.precision)
        note(work / "results.jsonl", line)
        return
    work.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(options.jobs) as pool:
        if "prepare" in options.stages:
            from spark3d.commands.prepare import prepare_command

            prepare_command(data, work / "store", spacing_of(options.recipe))
        if "pretrain" in options.stages:
            runs = [(work, seed, options.recipe, options.precision) for seed in PRETRAIN_SEEDS]
            list(pool.map(lambda run: pretrain(*run), runs))
        for stages in (["tune"], [s for s in options.stages if s in STAGES[3:]]):
            jobs = [job for s in stages if s in options.stages for job in jobs_of(s, options)]
            list(pool.map(lambda job: start_job(job, options), jobs))


def total_steps(work: Path, steps: int) -> int:
    """Fine-tuning steps that take as long as pre-training and fine-tuning together."""
    import numpy as np

    from spark3d.engine.logging import read_metrics

    pre = work / "pretrain-seed0" / "metrics.jsonl"
    fine = sorted((work / "runs").glob("tune-scratch-*/metrics.jsonl"))

    def seconds(path: Path) -> list[float]:
        return [line["seconds"] for line in read_metrics(path) if line["kind"] == "train"]

    spent = len(seconds(pre)) * np.median(seconds(pre))
    return steps + int(spent / np.median(seconds(fine[0])) / 100) * 100


if __name__ == "__main__":
    main()
