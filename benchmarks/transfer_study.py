"""Scratch against pre-trained on a labelled data set, by the rules of a fair comparison.

    python benchmarks/transfer_study.py --data Task04_Hippocampus/ --recipe hippocampus_small \
        --labels 8,32 --work work/
    python benchmarks/transfer_table.py work/results.jsonl

What runs are `spark3d pretrain` and `spark3d label-efficiency`; this script only says with which
cases. The recipe's own split keeps cases that report; pre-training never reads them. Learning rates
of both arms are tuned on training cases. The first label count is that of tuning, of the validity
gate (scratch with twice the steps) and of the controls: shuffled weights, and scratch with the time
of pre-training on top. Resumable: finished jobs are skipped, started ones go on.
"""

import argparse
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from transfer_jobs import (
    PRETRAIN_SEEDS,
    RATES,
    arguments,
    best_rate,
    pretrain,
    results,
    shuffle,
    spacing_of,
)

from spark3d.commands.label_efficiency import label_efficiency_command
from spark3d.commands.label_tables import RESULTS
from spark3d.commands.prepare import prepare_command
from spark3d.commands.splitting import SplitCases, split_cases
from spark3d.config import FinetuneRecipe, find_recipe, load_recipe
from spark3d.data.splits import few_labels
from spark3d.data.store import Store
from spark3d.engine.logging import read_metrics

STAGES = ("prepare", "pretrain", "tune", "pairs", "gate", "shuffled", "total")
TUNING_CASES = 20
"""Training cases that tuning scores, and does not train on."""
TUNING_SEED = 100
PRE = "pre"


def parts_of(options: argparse.Namespace) -> SplitCases:
    """Who may train and who reports, by the recipe's split."""
    recipe = load_recipe(FinetuneRecipe, find_recipe(options.recipe, "finetune"))
    return split_cases(recipe.split, Store.open(options.work / "store").cases)


def run_pretraining(options: argparse.Namespace) -> None:
    """Both seeds at once, without the cases that report."""
    held_out = options.work / "held_out.txt"
    held_out.write_text("".join(f"{r.id}\n" for r in parts_of(options).validation))
    changes = ("--exclude", str(held_out))

    def run(seed: int) -> None:
        pretrain(options.work, seed, options.recipe, options.precision, changes=changes)

    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(run, PRETRAIN_SEEDS))


def study(
    options: argparse.Namespace,
    stage: str,
    labels: list[int],
    subsets: int,
    steps: int,
    rates: dict[str, float],
    changes: tuple[str, ...] = (),
) -> None:
    """One `spark3d label-efficiency` over the arms that have a rate; its jobs become lines."""
    work = options.work
    folder = {PRE: work / "pretrain-seed{}", "shuffled": work / "shuffled-seed{}"}
    encoders = [
        f"{arm}={str(folder[arm]).format(seed)}"
        for arm in rates
        if arm in folder
        for seed in (PRETRAIN_SEEDS if stage != "tune" else PRETRAIN_SEEDS[:1])
    ]
    name = f"{stage}-{rates[PRE]:g}" if stage == "tune" else stage
    out = work / "studies" / f"{name}-{steps}"
    label_efficiency_command(
        work / "store",
        out,
        encoders,
        labels,
        subsets,
        options.recipe,
        (
            f"optim.steps={steps}",
            f"optim.warmup={steps // 10}",
            f"optim.precision={options.precision}",
            "compute.accelerator=cpu",
            f"log.validate_every={steps // 4}",
            "log.tensorboard=false",
            *changes,
        ),
        volumes=options.data,
        scratch="scratch" in rates,
        jobs=options.jobs,
        allow_overlap=stage == "tune",
        rates=[f"{arm}={rate}" for arm, rate in rates.items()],
    )
    note_lines(options, stage, out, steps, rates)


def note_lines(
    options: argparse.Namespace, stage: str, out: Path, steps: int, rates: dict[str, float]
) -> None:
    """The study's jobs in the form of `transfer_jobs.run_job`, once each."""
    known = results(options.work)
    keys = {line["key"] for line in known}
    for text in (out / RESULTS).read_text("utf-8").splitlines():
        job = json.loads(text)
        part = f"pairs{job['labels']}" if stage == "pairs" else stage
        rate = rates[job["arm"]]
        key = f"{part}-{job['arm']}-n{job['labels']}-s{job['subset']}-lr{rate:g}-{steps}"
        seeds = PRETRAIN_SEEDS if stage != "tune" else PRETRAIN_SEEDS[:1]
        seed = None if job["arm"] == "scratch" else seeds[job["subset"] % len(seeds)]
        line = {
            "key": key,
            "stage": part,
            **{k: job[k] for k in ("arm", "labels", "subset")},
            "pretrain_seed": seed,
            "lr": rate,
            "steps": steps,
            "recipe": options.recipe,
            "seconds": job["seconds"],
            "train": job["identity"]["train"],
            "dice": {
                case["id"]: {organ: s["dice"] for organ, s in case["organs"].items()}
                for case in job["cases"]
            },
            "curve": job["curve"],
        }
        if key not in keys:
            known.append(line)
    lines = "".join(json.dumps(line) + "\n" for line in known)
    (options.work / "results.jsonl").write_text(lines)


def tune(options: argparse.Namespace, labels: int) -> None:
    """Both arms at every rate, on training cases only."""
    ids = [r.id for r in parts_of(options).train]
    order = few_labels(ids, len(ids), TUNING_SEED)
    scored, others = order[:TUNING_CASES], order[TUNING_CASES:]
    changes = (
        "split.use=list",
        f"split.train={json.dumps(others)}",
        f"split.validation={json.dumps(scored)}",
    )
    for rate in RATES:
        study(options, "tune", [labels], 2, options.steps, {"scratch": rate, PRE: rate}, changes)


def total_steps(options: argparse.Namespace) -> int:
    """Fine-tuning steps that take as long as pre-training and fine-tuning together."""
    spent = seconds_of(options.work / "pretrain-seed0" / "metrics.jsonl")
    runs = (options.work / "studies").glob(f"pairs-{options.steps}/jobs/scratch-*/run")
    steps = [np.median(seconds_of(run / "metrics.jsonl")) for run in sorted(runs)]
    return options.steps + int(len(spent) * np.median(spent) / np.median(steps) / 100) * 100


def seconds_of(metrics: Path) -> list[float]:
    """Of every training step."""
    return [line["seconds"] for line in read_metrics(metrics) if line["kind"] == "train"]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--labels", default="8,32", help="label counts; the first is for tuning")
    parser.add_argument("--subsets", type=int, default=5, help="pairs of every label count")
    parser.add_argument("--shuffled", type=int, default=2, help="subsets for shuffled weights")
    options = parser.parse_args()
    options.data, options.work = options.data.resolve(), options.work.resolve()
    options.work.mkdir(parents=True, exist_ok=True)
    counts, steps = [int(n) for n in options.labels.split(",")], options.steps
    few = counts[0]
    if "prepare" in options.stages:
        prepare_command(options.data, options.work / "store", spacing_of(options.recipe))
    if "pretrain" in options.stages:
        run_pretraining(options)
    if "tune" in options.stages:
        tune(options, few)
    after = [stage for stage in STAGES[3:] if stage in options.stages]
    best = {arm: best_rate(arm, options) for arm in ("scratch", PRE)} if after else {}
    alone = {"scratch": best.get("scratch", 0.0)}
    for stage in after:
        if stage == "pairs":
            study(options, stage, counts, options.subsets, steps, best)
        elif stage == "gate":  # is scratch trained enough? twice the steps must gain less than .03
            study(options, stage, [few], 2, 2 * steps, alone)
        elif stage == "shuffled":  # the pre-trained numbers, permuted within each tensor
            for seed in PRETRAIN_SEEDS:
                run = options.work / f"pretrain-seed{seed}"
                shuffle(run, options.work / f"shuffled-seed{seed}")
            study(options, stage, [few], options.shuffled, steps, {"shuffled": best[PRE]})
        else:  # scratch, given the time of pre-training too
            study(options, stage, [few], 2, total_steps(options), alone)


if __name__ == "__main__":
    main()
