"""Does 2D pre-training help to classify images with few labels? Scratch against pre-trained.

    python benchmarks/transfer_images.py --work work/ [--table]

The images are the 1797 handwritten digits that scikit-learn ships (8 x 8 pixels, enlarged to 32):
real data without a download. 997 of them are pre-trained on without labels and are where the few
labelled ones are drawn from; 300 tune the learning rates; 500 only report. Resumable: each
fine-tuning is one line of `work/results.jsonl`, and finished ones are skipped. One thread.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits

from spark3d.commands.classify import classify_command
from spark3d.commands.pretrain import pretrain_command
from spark3d.evaluation.statistics import paired_difference

SIDE, TUNING, REPORTING = 32, 300, 500
PER_CLASS = 5
RATES = (5e-4, 2e-3, 8e-3)
SUBSETS = {0: range(6), 1: range(6, 12)}
"""Label subsets by the seed of the pre-training that is tried on them."""
TUNING_SUBSET = 100
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
    "optim.steps=100",
    "optim.warmup=10",
    "optim.batch=25",
    "log.validate_every=100",
)
Line = dict


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


def pretrain(work: Path, seed: int) -> None:
    """One pre-training on the training images, without their labels; done ones are left alone."""
    began = time.process_time()
    words = (*NETWORK, *PRETRAIN, *HERE, f"seed={seed}")
    target = work / f"pretrained-seed{seed}"
    pretrain_command(work / "images/report/train", target, None, words, dims=2)
    print(f"pre-training {seed}: {time.process_time() - began:.0f} s of CPU", flush=True)


def fine_tune(work: Path, stage: str, arm: str, subset: int, seed: int | None, lr: float) -> None:
    """One fine-tuning, unless its line is there; both arms have the same subset, draws and head."""
    key = f"{stage}-{arm}-s{subset}-lr{lr:g}"
    if any(line["key"] == key for line in results(work)):
        return
    began = time.process_time()
    encoder = None if seed is None else work / f"pretrained-seed{seed}"
    model = NETWORK if encoder is None else ()
    done = classify_command(
        work / "images" / stage,
        work / "runs" / key,
        encoder,
        "images_small_2d",
        (
            *model,
            *FINETUNE,
            *HERE,
            f"seed={subset}",
            f"images.subset_seed={subset}",
            f"optim.lr={lr}",
        ),
    )
    line = {"key": key, "stage": stage, "arm": arm, "subset": subset, "pretrain_seed": seed}
    line |= {"lr": lr, **done.scores, "cpu_seconds": round(time.process_time() - began, 1)}
    with (work / "results.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    print(time.strftime("%H:%M:%S"), line, flush=True)


def best_rates(lines: list[Line]) -> dict[str, float]:
    """Each arm's best learning rate on the tuning images."""
    tuned = [line for line in lines if line["stage"] == "tune"]
    return {
        arm: max((line for line in tuned if line["arm"] == arm), key=lambda line: line["top1"])[
            "lr"
        ]
        for arm in ("scratch", "pre")
    }


def print_tables(lines: list[Line]) -> None:
    """Tuning, the pairs, and the paired difference with its 95 % t-interval."""
    print("| rate | scratch | pre-trained |\n|---|---|---|")
    tuned = {(line["arm"], line["lr"]): line["top1"] for line in lines if line["stage"] == "tune"}
    for lr in RATES:
        print(f"| {lr:g} | {tuned['scratch', lr]:.3f} | {tuned['pre', lr]:.3f} |")
    print("\n| subset | pre-training seed | scratch | pre-trained | difference |")
    print("|---|---|---|---|---|")
    arms = {
        arm: {
            line["subset"]: line
            for line in lines
            if (line["stage"], line["arm"]) == ("report", arm)
        }
        for arm in ("scratch", "pre")
    }
    both = sorted(arms["scratch"].keys() & arms["pre"].keys())
    for subset in both:
        a, b = arms["scratch"][subset], arms["pre"][subset]
        row = (subset, b["pretrain_seed"], f"{a['top1']:.3f}", f"{b['top1']:.3f}")
        print("| " + " | ".join(map(str, row)) + f" | {b['top1'] - a['top1']:+.3f} |")
    first, second = ({str(s): arms[arm][s]["top1"] for s in both} for arm in ("scratch", "pre"))
    d = paired_difference(first, second, np.random.default_rng(0))
    means = [np.mean(list(arm.values())) for arm in (first, second)]
    print(
        f"\nMean top-1 {means[0]:.3f} -> {means[1]:.3f}; paired difference {d.mean:+.3f}, 95 % "
        f"interval {d.interval.low:+.3f} to {d.interval.high:+.3f}, {d.positive} of {d.pairs} "
        f"pairs positive, permutation p {d.permutation_p:.3f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder for all that is made")
    parser.add_argument("--table", action="store_true", help="only print the tables")
    options = parser.parse_args()
    work = options.work.resolve()
    if not options.table:
        torch.set_num_threads(1)
        write_images(work)
        for seed, subsets in SUBSETS.items():
            pretrain(work, seed)
            if seed == 0:
                for lr in RATES:
                    for arm, used in (("scratch", None), ("pre", 0)):
                        fine_tune(work, "tune", arm, TUNING_SUBSET, used, lr)
            best = best_rates(results(work))
            for subset in subsets:
                fine_tune(work, "report", "scratch", subset, None, best["scratch"])
                fine_tune(work, "report", "pre", subset, seed, best["pre"])
    print_tables(results(work))


if __name__ == "__main__":
    main()
