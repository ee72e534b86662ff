"""One job of the studies of transfer: pre-train, or fine-tune, predict and score."""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

RATES = (1e-3, 3e-3, 6e-3)
PRETRAIN_SEEDS = (0, 1)
TUNING_SUBSETS = (100, 101)
FROZEN_RATE = 3e-3
"""Of a decoder on a frozen encoder."""
ON_TRAINING_CASES = ("tune", "seen", "frozen", "counts")
"""Stages scored on 12 training cases, whose images pre-training has seen."""
ONE_CORE = ("compute.threads=1", "compute.accelerator=cpu")


@dataclass(frozen=True)
class Job:
    """One fine-tuning: its arm, how many labels, which subset of them, and its budget."""

    stage: str
    arm: str  # scratch, pre, shuffled, or a variant of pre-training in compare_openkbp.py
    labels: int | None
    subset: int
    pretrain_seed: int | None
    lr: float
    steps: int

    @property
    def key(self) -> str:
        """Name of the job's folder."""
        seed = "" if self.pretrain_seed is None else f"-p{self.pretrain_seed}"
        count = self.labels or "all"
        return f"{self.stage}-{self.arm}{seed}-n{count}-s{self.subset}-lr{self.lr:g}-{self.steps}"


def run_job(job: Job, data: Path, work: Path, recipe: str, precision: str) -> dict:
    """Fine-tune (unless the stage scores what another trained), predict, score; one thread."""
    import torch

    torch.set_num_threads(1)
    lists = split_lists(work, job)
    began = time.perf_counter()
    out = work / "runs" / (replace(job, stage="pairs8") if job.stage == "seen" else job).key
    if job.stage != "seen":
        fine_tune(job, out, lists, work, recipe, precision)
    seconds = time.perf_counter() - began
    scores = score(job, out, work, data, lists["validation"], precision == "bf16-mixed")
    return {
        "key": job.key,
        **asdict(job),
        "recipe": recipe,
        "seconds": round(seconds, 1),
        "train": lists["train"],
        "dice": scores,
        "curve": curve(out),
    }


def fine_tune(
    job: Job, out: Path, lists: dict[str, list[str]], work: Path, recipe: str, precision: str
) -> None:
    """`spark3d finetune` as the job wants it."""
    from spark3d.commands.finetune import finetune_command

    overrides = [
        f"seed={job.subset}",
        f"optim.lr={job.lr}",
        f"optim.steps={job.steps}",
        f"optim.warmup={job.steps // 10}",
        f"optim.precision={precision}",
        *ONE_CORE,
        "compute.checkpoint_every=200",
        f"log.validate_every={job.steps // 4}",
        "log.tensorboard=false",
        "split.use=list",
        f"split.train={json.dumps(lists['train'])}",
        f"split.validation={json.dumps(lists['validation'])}",
    ]
    if job.stage == "frozen":
        overrides.append(f"optim.freeze_steps={job.steps}")
    finetune_command(
        work / "store",
        out,
        encoder_of(job, work),
        recipe,
        tuple(overrides),
        allow_overlap=job.stage in ON_TRAINING_CASES,
    )


def curve(out: Path) -> list[tuple[int, float]]:
    """Mean Dice on the store's grid by step."""
    from spark3d.engine.logging import read_metrics

    lines = read_metrics(out / "metrics.jsonl")
    return [(line["step"], line["dice"]) for line in lines if line["kind"] == "val"]


def split_lists(work: Path, job: Job) -> dict[str, list[str]]:
    """Training subset and scored cases of a job: the same for every arm."""
    from spark3d.data.splits import few_labels
    from spark3d.data.store import Store

    cases = Store.open(work / "store").cases
    training = [c.id for c in cases if c.section == "training"]
    validation = [c.id for c in cases if c.section == "validation"]
    if job.stage in ON_TRAINING_CASES:
        order = few_labels(training, len(training), job.subset)
        others = (*order[:8], *order[20:])
        return {"train": list(others[: job.labels]), "validation": list(order[8:20])}
    kept = few_labels(training, job.labels or len(training), job.subset)
    return {"train": list(kept), "validation": validation}


def encoder_of(job: Job, work: Path) -> Path | None:
    """The encoder of an arm; the shuffled one is made on first use."""
    if job.arm == "scratch":
        return None
    if job.arm not in ("pre", "shuffled"):
        return work / f"{job.arm}-seed{job.pretrain_seed}"
    run = work / f"pretrain-seed{job.pretrain_seed}"
    if job.arm == "pre":
        return run
    target = work / f"shuffled-seed{job.pretrain_seed}"
    if not (target / "encoder.json").is_file():
        shuffle(run, target)
    return target


def shuffle(run: Path, target: Path) -> None:
    """A copy of encoder weights whose numbers are permuted in each tensor: scale, no features."""
    import torch

    from spark3d.weights.exchange import load_encoder, save_encoder

    state, passport = load_encoder(run / "encoder.safetensors")
    rng = torch.Generator().manual_seed(0)
    mixed = {
        k: v.flatten()[torch.randperm(v.numel(), generator=rng)].view_as(v)
        for k, v in state.items()
    }
    target.mkdir(exist_ok=True)
    save_encoder(target / "encoder.safetensors", mixed, passport)


def score(job: Job, out: Path, work: Path, data: Path, cases: list[str], amp: bool) -> dict:
    """Dice per case and organ on the original grid: `spark3d predict` against the references."""
    from spark3d.commands.predict import predict_command
    from spark3d.data.io import read_label
    from spark3d.evaluation.metrics import dice_per_label

    images = work / "images" / job.stage
    images.mkdir(parents=True, exist_ok=True)
    for case in cases:
        link = images / f"{case}.nii.gz"
        if not link.exists():
            link.symlink_to((data / "imagesTr" / link.name).resolve())
    found = predict_command(
        out,
        images,
        work / "predictions" / job.key,
        overlap=0.25,
        batch=4,
        amp=amp,
    )
    organs = json.loads((data / "dataset.json").read_text())["labels"]
    names = {int(number): name for number, name in organs.items() if int(number)}
    scores = {}
    for case in cases:
        prediction = read_label(found / f"{case}.nii.gz").array[0]
        reference = read_label(data / "labelsTr" / f"{case}.nii.gz").array[0]
        dice = dice_per_label(prediction, reference, names)
        scores[case] = {name: None if dice[k] != dice[k] else dice[k] for k, name in names.items()}
    return scores


def results(work: Path) -> list[dict]:
    """All finished jobs."""
    path = work / "results.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def organ_means(result: dict) -> dict[str, float]:
    """Mean Dice over cases, per organ; cases without the organ do not count."""
    organs = next(iter(result["dice"].values())).keys()
    table = {o: [c[o] for c in result["dice"].values() if c[o] is not None] for o in organs}
    return {organ: statistics.mean(values) for organ, values in table.items()}


def mean_dice(result: dict) -> float:
    """Mean over organs of the mean over cases."""
    return statistics.mean(organ_means(result).values())


def pretrain(
    work: Path,
    seed: int,
    recipe: str,
    precision: str,
    name: str = "pretrain",
    changes: tuple[str, ...] = (),
) -> None:
    """One pre-training run by the shipped recipe with `changes`, one thread."""
    out = work / f"{name}-seed{seed}"
    if (out / "encoder.json").is_file():
        return
    call = [
        "spark3d",
        "pretrain",
        recipe,
        f"seed={seed}",
        f"optim.precision={precision}",
        *ONE_CORE,
        *changes,
        "log.panels_every=800",
    ]
    call += ["--data", str(work / "store"), "--out", str(out)]
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "spark3d.cli", *call[1:]], check=True)
    seconds = round(time.perf_counter() - began, 1)
    note(work / "pretrain.jsonl", {"name": name, "seed": seed, "seconds": seconds})


def note(path: Path, line: dict) -> None:
    """Append one JSON line."""
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def start_job(job: Job, options: argparse.Namespace) -> None:
    """Run one fine-tuning in a process of its own, unless its line is there."""
    work = options.work
    if any(r["key"] == job.key for r in results(work)):
        return
    (work / "logs").mkdir(exist_ok=True)
    script = Path(__file__).with_name("transfer_openkbp.py")
    call = [sys.executable, str(script), "--data", str(options.data), "--work", str(work)]
    call += ["--recipe", options.recipe, "--precision", options.precision]
    call += ["--job", json.dumps(asdict(job))]
    with (work / "logs" / f"{job.key}.log").open("w") as log:
        done = subprocess.run(
            call, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
    print(f"{time.strftime('%H:%M:%S')} {job.key}: exit {done.returncode}", flush=True)


def spacing_of(recipe: str) -> str:
    """Spacing of the store, as `spark3d prepare` takes it."""
    from spark3d.config import FinetuneRecipe, find_recipe, load_recipe

    spacing = load_recipe(FinetuneRecipe, find_recipe(recipe, "finetune")).data.spacing_mm
    return ",".join(str(mm) for mm in spacing)


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """What every study of transfer is told."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a data set in Decathlon layout")
    parser.add_argument("--work", type=Path, required=True, help="folder for all that is made")
    parser.add_argument(
        "--recipe", default="openkbp_segresnet", help="of pre-training and of fine-tuning"
    )
    parser.add_argument("--precision", default="32-true", choices=("32-true", "bf16-mixed"))
    parser.add_argument("--steps", type=int, default=800, help="of a fine-tuning")
    parser.add_argument("--rate", type=float, help="for all arms; default each arm's best, tuned")
    parser.add_argument("--jobs", type=int, default=2, help="at a time, one thread each")
    return parser


def tuning_jobs(arms: dict[str, int | None], steps: int) -> list[Job]:
    """Every arm, named with its pre-training seed, at every rate on every tuning subset."""
    return [
        Job("tune", arm, 8, subset, seed, lr, steps)
        for subset in TUNING_SUBSETS
        for lr in RATES
        for arm, seed in arms.items()
    ]


def best_rate(arm: str, options: argparse.Namespace) -> float:
    """`--rate`, or an arm's best learning rate by the mean over the tuning subsets."""
    if options.rate:
        return options.rate
    mine = [r for r in results(options.work) if r["stage"] == "tune" and r["arm"] == arm]
    scores: dict[float, list[float]] = {}
    for result in mine:
        if result["steps"] == options.steps:
            scores.setdefault(result["lr"], []).append(mean_dice(result))
    if any(len(scores.get(lr, ())) < len(TUNING_SUBSETS) for lr in RATES):
        missing = f"tuning of {arm} at {options.steps} steps is not finished"
        raise SystemExit(f"{missing}: run --stages tune, or name a --rate")
    return max(RATES, key=lambda lr: statistics.mean(scores[lr]))
