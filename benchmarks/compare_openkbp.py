"""Which decoder, which objective? Pre-training on OpenKBP at equal time, by Dice at 8 labels.

    python benchmarks/compare_openkbp.py --data openkbp/ --work work/ --study decoders
    python benchmarks/compare_openkbp.py --data openkbp/ --work work/ --study objectives

Goes on in the folder of transfer_openkbp.py, whose pre-training, scratch and pairs at 8 labels it
shares. A variant gets as many steps as fit into the time of the recipe's own pre-training; seconds
a step are measured first, one variant after the other (stage `pace`, which wants a quiet machine),
and kept in `pace.json`. Resumable as the other study is.
"""

import json
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor

from transfer_jobs import (
    FROZEN_RATE,
    ONE_CORE,
    PRETRAIN_SEEDS,
    TUNING_SUBSETS,
    Job,
    arguments,
    best_rate,
    pretrain,
    start_job,
    tuning_jobs,
)

from spark3d.benchmarks.training import measure_pretraining

LIGHT = "objective.decoder_width="
VARIANTS = {
    "decoders": {
        "light256": (f"{LIGHT}256",),
        "light384": (f"{LIGHT}384",),
        "official": ("objective.decoder=official", f"{LIGHT}768", "objective.decoder_norm=bn"),
    },
    "objectives": {
        "localmim": ("objective={name: localmim, target: hog, width: 96}",),
        "a2mim": ("objective={name: a2mim, fourier: 0.5}",),
    },
}
"""What each variant changes in the recipe; the recipe itself is the arm `pre`."""
PACE_STEPS = 5
STAGES = ("pace", "pretrain", "tune", "pairs8")
FROZEN = "frozen"
"""What a decoder makes of the features alone, beside `pre` and shuffled weights; if asked for."""


def pace_of(name: str, changes: tuple[str, ...], options: Namespace) -> float:
    """Mean seconds of a step, the first three left out."""
    words = [options.recipe, *changes, *ONE_CORE, f"optim.precision={options.precision}"]
    words += ["--data", str(options.work / "store")]
    return measure_pretraining(words, PACE_STEPS, options.work / "pace" / name).step


def measure_pace(variants: dict[str, tuple[str, ...]], options: Namespace) -> dict[str, float]:
    """Seconds a step of the recipe and of every variant, measured once."""
    path = options.work / "pace.json"
    known = json.loads(path.read_text()) if path.is_file() else {}
    for name, changes in {"pre": (), **variants}.items():
        if name not in known:
            known[name] = pace_of(name, changes, options)
            path.write_text(json.dumps(known, indent=1))
    return known


def budget_of(name: str, pace: dict[str, float], recipe: str) -> tuple[str, str]:
    """Steps of a variant in the time of the recipe's own pre-training; its share of warm-up."""
    from spark3d.config import PretrainRecipe, find_recipe, load_recipe

    optim = load_recipe(PretrainRecipe, find_recipe(recipe, "pretrain")).optim
    steps = max(1, round(optim.steps * pace["pre"] / pace[name]))
    warmup = max(1, round(steps * optim.warmup / optim.steps))
    return f"optim.steps={steps}", f"optim.warmup={warmup}"


def jobs_of(stage: str, variants: list[str], options: Namespace) -> list[Job]:
    """The fine-tunings of one stage."""
    if stage == "tune":
        return tuning_jobs(dict.fromkeys(variants, PRETRAIN_SEEDS[0]), options.steps)
    if stage == FROZEN:
        arms = ("shuffled", "pre", *variants)
        seed = PRETRAIN_SEEDS[0]
        return [
            Job(stage, arm, 8, subset, seed, FROZEN_RATE, options.steps)
            for subset in TUNING_SUBSETS
            for arm in arms
        ]
    best = {arm: best_rate(arm, options) for arm in variants}
    return [
        Job(stage, arm, 8, subset, PRETRAIN_SEEDS[subset % 2], best[arm], options.steps)
        for subset in range(options.subsets)
        for arm in variants
    ]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--study", required=True, choices=tuple(VARIANTS))
    parser.add_argument("--stages", nargs="+", choices=(*STAGES, FROZEN), default=STAGES)
    parser.add_argument("--subsets", type=int, default=5, help="fine-tunings a variant")
    parser.add_argument("--variants", nargs="+", help="some of the study's variants; default all")
    options = parser.parse_args()
    options.data, options.work = options.data.resolve(), options.work.resolve()
    chosen = {
        name: changes
        for name, changes in VARIANTS[options.study].items()
        if not options.variants or name in options.variants
    }
    with ThreadPoolExecutor(options.jobs) as pool:
        if "pace" in options.stages:
            measure_pace(chosen, options)
        if "pretrain" in options.stages:
            pace = json.loads((options.work / "pace.json").read_text())

            def run(name: str, seed: int) -> None:
                changes = (*chosen[name], *budget_of(name, pace, options.recipe))
                pretrain(options.work, seed, options.recipe, options.precision, name, changes)

            pairs = [(name, seed) for name in chosen for seed in PRETRAIN_SEEDS]
            list(pool.map(lambda pair: run(*pair), pairs))
        for stage in ("tune", "pairs8", FROZEN):
            if stage in options.stages:
                jobs = jobs_of(stage, list(chosen), options)
                list(pool.map(lambda job: start_job(job, options), jobs))


if __name__ == "__main__":
    main()
