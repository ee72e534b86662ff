"""Does 2D pre-training help to classify images with few labels? Scratch against pre-trained.

    python benchmarks/transfer_images.py --work work/ [--steps 400] [--stages tune pairs] [--table]

The images are the 1797 handwritten digits that scikit-learn ships (8 x 8 pixels, enlarged to 32):
real data without a download. 997 of them are pre-trained on without labels and are where the few
labelled ones are drawn from; 300 tune the learning rates; 500 only report. Resumable: each
fine-tuning is one line of `work/results.jsonl`, and finished ones are skipped; an encoder is
pre-trained when the first fine-tuning needs it. One thread.

Stages: `tune` chooses a rate for each arm; `pairs` are twelve of scratch and pre-trained, six to
each of two pre-trainings; `controls` give both arms twice the steps and fine-tune weights shuffled
within each tensor (scale without features); `total` gives scratch the compute of pre-training too.
"""

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits

from spark3d.commands.classify import classify_command
from spark3d.commands.pretrain import pretrain_command
from spark3d.evaluation.statistics import paired_difference
from spark3d.weights.exchange import load_encoder, save_encoder

SIDE, TUNING, REPORTING = 32, 300, 500
PER_CLASS = 5
RATES = (5e-4, 2e-3, 8e-3, 3.2e-2)
SHORTEST = 100
"""Steps of the first of these studies, whose keys and lines do not name them."""
SUBSETS = {0: range(6), 1: range(6, 12)}
"""Label subsets by the seed of the pre-training that is tried on them."""
TUNING_SUBSET = 100
CONTROL_SEED = 1
SHUFFLED, DOUBLED, TOTAL = range(6, 12), range(6, 9), range(6, 8)
"""Label subsets of each control."""
PRETRAIN_IN_STEPS = 3500
"""Of fine-tuning that take as much of a core as a pre-training, or more (see `cpu_seconds`)."""
STAGES = ("tune", "pairs", "controls", "total")
NETWORK = (
    "model.backbone=timm/convnext_atto",
    "model.options={stem_type: patch, patch_size: 1, depths: [1,1,2,1], dims: [16,32,64,128]}",
)
HERE = (
    "compute.accelerator=cpu",
    "compute.threads=1",
    "compute.workers=0",
    "log.tensorboard=false",
    "log.every=20",
)
PRETRAIN = (
    "images.crop=32",
    "images.flip=0",
    "mask.ratio=0.6",
    "objective.decoder_width=64",
    "optim.lr=2e-3",
    "optim.steps=1000",
    "optim.warmup=50",
    "optim.batch=64",
)
FINETUNE = (
    "images.crop=32",
    "images.evaluation_share=1.0",
    f"images.per_class={PER_CLASS}",
    "augment.flip=0",
    "optim.batch=25",
)
Line = dict


@dataclass(frozen=True)
class Job:
    """One fine-tuning.

    Attributes:
        images: "tune" or "report".
        arm: Its start: "scratch", "pre" or "shuffled".
        subset: Of the labels; both arms of a pair have the same one, the same draws and head.
        seed: Of the pre-training; None from scratch.
        lr: Learning rate.
        steps: Of training.
    """

    images: str
    arm: str
    subset: int
    seed: int | None
    lr: float
    steps: int

    @property
    def key(self) -> str:
        longer = f"-n{self.steps}" if self.steps != SHORTEST else ""
        return f"{self.images}-{self.arm}-s{self.subset}-lr{self.lr:g}{longer}"


def write_images(work: Path) -> None:
    """The digits as PNG files: `tune` and `report` share their training images."""
    if (work / "written").is_file():
        return
    digits: Any = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.images))
    parts = {
        "report/val": order[:REPORTING],
        "tune/val": order[REPORTING : REPORTING + TUNING],
        "report/train": order[REPORTING + TUNING :],
        "tune/train": order[REPORTING + TUNING :],
    }
    for part, members in parts.items():
        for number in members:
            folder = work / "images" / part / f"digit{digits.target[number]}"
            folder.mkdir(parents=True, exist_ok=True)
            grey = Image.fromarray((digits.images[number] * (255 / 16)).astype(np.uint8))
            enlarged = grey.resize((SIDE, SIDE), Image.Resampling.BICUBIC).convert("RGB")
            enlarged.save(folder / f"{number:04d}.png")
    (work / "written").touch()


def results(work: Path) -> list[Line]:
    """All finished fine-tunings."""
    path = work / "results.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def encoder_of(job: Job, work: Path) -> Path | None:
    """The encoder that a job starts from, made when it is first needed; None from scratch."""
    if job.seed is None:
        return None
    run = work / f"pretrained-seed{job.seed}"
    if not (run / "encoder.safetensors").is_file():
        began = time.process_time()
        words = (*NETWORK, *PRETRAIN, *HERE, f"seed={job.seed}")
        pretrain_command(work / "images/report/train", run, None, words, dims=2)
        print(f"pre-training {job.seed}: {time.process_time() - began:.0f} s of CPU", flush=True)
    return shuffled(run) if job.arm == "shuffled" else run


def shuffled(run: Path) -> Path:
    """A copy of the run's encoder whose numbers are permuted in each tensor."""
    target = run.with_name(f"{run.name}-shuffled")
    if not (target / "encoder.json").is_file():
        state, passport = load_encoder(run)
        rng = torch.Generator().manual_seed(0)
        mixed = {
            key: value.flatten()[torch.randperm(value.numel(), generator=rng)].view_as(value)
            for key, value in state.items()
        }
        target.mkdir(exist_ok=True)
        save_encoder(target / "encoder.safetensors", mixed, passport)
    return target


def fine_tune(job: Job, work: Path) -> None:
    """One fine-tuning, unless its line is there."""
    if any(line["key"] == job.key for line in results(work)):
        return
    encoder = encoder_of(job, work)
    began = time.process_time()
    words = (
        *(NETWORK if encoder is None else ()),
        *FINETUNE,
        *HERE,
        f"seed={job.subset}",
        f"images.subset_seed={job.subset}",
        f"optim.lr={job.lr}",
        f"optim.steps={job.steps}",
        f"optim.warmup={job.steps // 10}",
        f"log.validate_every={job.steps}",
    )
    done = classify_command(
        work / "images" / job.images, work / "runs" / job.key, encoder, "images_small_2d", words
    )
    line = {"key": job.key, "stage": job.images, "arm": job.arm, "subset": job.subset}
    line |= {"pretrain_seed": job.seed, "lr": job.lr, "steps": job.steps, **done.scores}
    line["cpu_seconds"] = round(time.process_time() - began, 1)
    with (work / "results.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    print(time.strftime("%H:%M:%S"), line, flush=True)


def jobs(stage: str, steps: int, count: int, lines: list[Line]) -> list[Job]:
    """The fine-tunings of a stage, at most `count` for each pre-training; see `best_rates`."""
    if stage == "tune":
        starts = (("scratch", None), ("pre", 0))
        return [
            Job("tune", arm, TUNING_SUBSET, seed, lr, steps) for lr in RATES for arm, seed in starts
        ]
    best = best_rates(steps, lines)

    def pair(subset: int, seed: int, steps: int) -> list[Job]:
        return [
            Job("report", "scratch", subset, None, best["scratch"], steps),
            Job("report", "pre", subset, seed, best["pre"], steps),
        ]

    if stage == "pairs":
        return [
            job
            for seed, group in SUBSETS.items()
            for s in group[:count]
            for job in pair(s, seed, steps)
        ]
    if stage == "total":
        total = steps + PRETRAIN_IN_STEPS
        return [Job("report", "scratch", s, None, best["scratch"], total) for s in TOTAL]
    return [
        *(Job("report", "shuffled", s, CONTROL_SEED, best["pre"], steps) for s in SHUFFLED[:count]),
        *(job for s in DOUBLED for job in pair(s, CONTROL_SEED, 2 * steps)),
    ]


def steps_of(line: Line) -> int:
    """Steps of a finished fine-tuning."""
    return line.get("steps", SHORTEST)


def best_rates(steps: int, lines: list[Line]) -> dict[str, float]:
    """Each arm's best learning rate on the tuning images."""
    tuned = [line for line in lines if line["stage"] == "tune" and steps_of(line) == steps]
    return {
        arm: max((line for line in tuned if line["arm"] == arm), key=lambda line: line["top1"])[
            "lr"
        ]
        for arm in ("scratch", "pre")
    }


def scores(lines: list[Line], arm: str, steps: int) -> dict[int, float]:
    """Top-1 on the reporting images by label subset."""
    return {
        line["subset"]: line["top1"]
        for line in lines
        if (line["stage"], line["arm"], steps_of(line)) == ("report", arm, steps)
    }


def print_tables(lines: list[Line], steps: int) -> None:
    """Tuning, the pairs with their mean difference, the controls."""
    print("| rate | scratch | pre-trained |\n|---|---|---|")
    tuned = {
        (line["arm"], line["lr"]): line["top1"]
        for line in lines
        if line["stage"] == "tune" and steps_of(line) == steps
    }
    for lr in RATES:
        print(f"| {lr:g} | {tuned['scratch', lr]:.3f} | {tuned['pre', lr]:.3f} |")
    scratch, pre = scores(lines, "scratch", steps), scores(lines, "pre", steps)
    seeds = {subset: seed for seed, group in SUBSETS.items() for subset in group}
    print("\n| subset | pre-training seed | scratch | pre-trained | difference |")
    print("|---|---|---|---|---|")
    for s in sorted(scratch.keys() & pre.keys()):
        a, b = scratch[s], pre[s]
        print(f"| {s} | {seeds[s]} | {a:.3f} | {b:.3f} | {b - a:+.3f} |")
    print()
    for seed, group in SUBSETS.items():
        ours = {s: v for s, v in pre.items() if s in group}
        print(told(f"pre-training seed {seed}: scratch -> pre-trained", scratch, ours))
    shuffled = scores(lines, "shuffled", steps)
    print(told("all: scratch -> pre-trained", scratch, pre))
    print(told("scratch -> shuffled weights", scratch, shuffled))
    print(told("shuffled weights -> pre-trained", shuffled, pre))
    for more in (2 * steps, steps + PRETRAIN_IN_STEPS):
        longer = scores(lines, "scratch", more)
        print(told(f"scratch -> scratch with {more} steps", scratch, longer))
        print(told(f"scratch with {more} steps -> pre-trained", longer, pre))
        both = f"{more} steps: scratch -> pre-trained"
        print(told(both, longer, scores(lines, "pre", more)))


def told(what: str, first: dict[int, float], second: dict[int, float]) -> str:
    """Means over the subsets that both have, and the paired difference."""
    both = sorted(first.keys() & second.keys())
    if len(both) < 2:
        return f"{what}: {len(both)} pairs"
    one, two = ({str(s): arm[s] for s in both} for arm in (first, second))
    d = paired_difference(one, two, np.random.default_rng(0))
    means = [np.mean(list(arm.values())) for arm in (one, two)]
    return (
        f"{what}: {means[0]:.3f} -> {means[1]:.3f}; paired difference {d.mean:+.3f}, 95 % interval "
        f"{d.interval.low:+.3f} to {d.interval.high:+.3f}, {d.positive} of {d.pairs} positive, "
        f"permutation p {d.permutation_p:.3f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder for all that is made")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, help="default: all")
    parser.add_argument("--steps", type=int, default=SHORTEST, help="of a fine-tuning")
    parser.add_argument("--pairs", type=int, default=6, help="of each pre-training seed")
    parser.add_argument("--table", action="store_true", help="only print the tables")
    options = parser.parse_args()
    work = options.work.resolve()
    if not options.table:
        torch.set_num_threads(1)
        write_images(work)
        for stage in options.stages:
            for job in jobs(stage, options.steps, options.pairs, results(work)):
                fine_tune(job, work)
    print_tables(results(work), options.steps)


if __name__ == "__main__":
    main()
