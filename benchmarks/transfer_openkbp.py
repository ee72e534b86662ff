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
    PRETRAIN_SEEDS,
    RATES,
    STEPS,
    Job,
    arguments,
    best_rate,
    note,
    pretrain,
    run_job,
    spacing_of,
    start_job,
)

STAGES = (
    "prepare",
    "pretrain",
    "tune",
    "pairs8",
    "total",
    "gate",
    "shuffled",
    "pairs20",
    "pairsall",
)


def pairs(stage: str, labels: int | None, subsets: int, best: dict[str, float]) -> list[Job]:
    """Scratch and pre-trained on the same subset, with the same draws and the same initial head.

    The pre-training seed alternates from subset to subset.
    """
    jobs = []
    for subset in range(subsets):
        jobs.append(Job(stage, "scratch", labels, subset, None, best["scratch"]))
        jobs.append(Job(stage, "pre", labels, subset, PRETRAIN_SEEDS[subset % 2], best["pre"]))
    return jobs


def jobs_of(stage: str, best: dict[str, float], total_steps: int) -> list[Job]:
    """The fine-tunings of one stage."""
    if stage == "tune":  # both arms, same grid, training cases only; scored on other training cases
        arms = (("scratch", None), ("pre", 0))
        return [Job(stage, arm, 8, 100, seed, lr) for lr in RATES for arm, seed in arms]
    if stage == "gate":  # is scratch trained enough? twice the steps must gain less than .03
        return [Job(stage, "scratch", 8, s, None, best["scratch"], 2 * STEPS) for s in range(2)]
    if stage == "shuffled":  # the pre-trained numbers, permuted within each tensor
        return [Job(stage, "shuffled", 8, s, PRETRAIN_SEEDS[s], best["pre"]) for s in range(2)]
    if stage == "total":  # scratch, given the compute of pre-training too
        return [Job(stage, "scratch", 8, 0, None, best["scratch"], total_steps)]
    labels, subsets = {"pairs8": (8, 5), "pairs20": (20, 3), "pairsall": (None, 2)}[stage]
    return pairs(stage, labels, subsets, best)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
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
        if "tune" in options.stages:
            jobs = jobs_of("tune", {}, 0)
            list(pool.map(lambda job: start_job(job, options), jobs))
        best = {arm: options.rate or best_rate(work, arm) for arm in ("scratch", "pre")}
        steps = total_steps(work)
        rest = [s for s in options.stages if s not in ("prepare", "pretrain", "tune")]
        jobs = [job for stage in rest for job in jobs_of(stage, best, steps)]
        list(pool.map(lambda job: start_job(job, options), jobs))


def total_steps(work: Path) -> int:
    """Fine-tuning steps that take as long as pre-training and fine-tuning together."""
    import numpy as np

    pre = work / "pretrain-seed0" / "metrics.jsonl"
    fine = sorted((work / "runs").glob("tune-scratch-*/metrics.jsonl"))
    if not pre.is_file() or not fine:
        return 3 * STEPS

    def seconds(path: Path) -> float:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        return float(np.median([line["seconds"] for line in lines if line["kind"] == "train"]))

    steps = sum(1 for _ in pre.open())
    return STEPS + int(steps * seconds(pre) / seconds(fine[0]) / 100) * 100


if __name__ == "__main__":
    main()
