"""The tables and the loss curves of a study that compare_openkbp.py ran.

python benchmarks/compare_table.py work/ --arms scratch pre localmim a2mim --figure objectives.svg
"""

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from transfer_jobs import PRETRAIN_SEEDS, mean_dice, organ_means, results
from transfer_table import paired_summary, pairs_of

from spark3d.engine.logging import read_metrics

STAGE = "pairs8"
WINDOW = 50
"""Steps of the mean of a loss; of a short run a tenth of all."""
POINTS = 300
"""Of a line, about."""


def run_of(work: Path, arm: str, seed: int) -> Path:
    """Folder of an arm's pre-training."""
    return work / f"{'pretrain' if arm == 'pre' else arm}-seed{seed}"


def losses(run: Path) -> np.ndarray:
    """Loss of every step of a pre-training."""
    lines = read_metrics(run / "metrics.jsonl")
    return np.array([line["loss"] for line in lines if line["kind"] == "train"])


def window_of(loss: np.ndarray) -> int:
    """Steps that are averaged."""
    return max(1, min(WINDOW, len(loss) // 10))


def print_pretraining(work: Path, arms: list[str]) -> None:
    """The pace by which an arm got its steps, and the loss at both ends of every pre-training."""
    pace = json.loads((work / "pace.json").read_text())
    print("| arm | s a step, alone | seed | steps | loss at the start | at the end |")
    print("|---|---|---|---|---|---|")
    for arm in arms:
        for seed in PRETRAIN_SEEDS:
            loss = losses(run_of(work, arm, seed))
            window = window_of(loss)
            ends = f"{loss[:window].mean():.3f} | {loss[-window:].mean():.3f}"
            print(f"| {arm} | {pace[arm]:.3g} | {seed} | {len(loss)} | {ends} |")


def by_subset(
    lines: list[dict], arms: list[str], what: Callable[[dict], Any]
) -> dict[str, dict[int, Any]]:
    """`what` of every arm's result on each label subset that all arms have."""
    found = {
        arm: {r["subset"]: what(r) for r in lines if (r["stage"], r["arm"]) == (STAGE, arm)}
        for arm in arms
    }
    subsets = sorted(set.intersection(*(set(scores) for scores in found.values())))
    return {arm: {subset: found[arm][subset] for subset in subsets} for arm in arms}


def row(head: str | int, scores: Iterable[float]) -> str:
    """A row of a table."""
    return f"| {head} | {' | '.join(f'{score:.3f}' for score in scores)} |"


def print_scores(work: Path, arms: list[str]) -> None:
    """A row per label subset, every arm against every earlier one, paired; a row per organ."""
    lines = results(work)
    found = by_subset(lines, arms, mean_dice)
    print(f"\n| subset | {' | '.join(arms)} |\n|---|{'---|' * len(arms)}")
    for subset in found[arms[0]]:
        print(row(subset, (found[arm][subset] for arm in arms)))
    print(row("mean", (fmean(found[arm].values()) for arm in arms)) + "\n")
    for k, second in enumerate(arms):
        for first in arms[:k]:
            pairs = pairs_of(lines, STAGE, first, second)
            if len(pairs) > 1:
                print(f"- {second} against {first}: {paired_summary(pairs)}")
    organs = by_subset(lines, arms, organ_means)
    print(f"\n| organ | {' | '.join(arms)} |\n|---|{'---|' * len(arms)}")
    for organ in next(iter(organs[arms[0]].values())):
        print(row(organ, (fmean(s[organ] for s in organs[arm].values()) for arm in arms)))


def draw_losses(work: Path, arms: list[str], path: Path) -> None:
    """A panel per arm, a line per seed: running mean of the loss over steps."""
    figure = Figure((3.6 * len(arms), 3.0), layout="constrained")
    for ax, arm in zip(figure.subplots(1, len(arms), squeeze=False)[0], arms, strict=True):
        for seed in PRETRAIN_SEEDS:
            loss = losses(run_of(work, arm, seed))
            window = window_of(loss)
            smooth = np.convolve(loss, np.ones(window) / window, mode="valid")
            every = slice(None, None, max(1, len(smooth) // POINTS))
            steps = np.arange(window, len(loss) + 1)
            ax.plot(steps[every], smooth[every], lw=1.4, label=f"seed {seed}")
        ax.set_title(arm, loc="left", fontsize=10)
        ax.set_xlabel("step", fontsize=9)
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(lw=0.4)
        ax.legend(frameon=False, fontsize=9)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("work", type=Path)
    parser.add_argument("--arms", nargs="+", required=True)
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args()
    trained = [arm for arm in options.arms if arm != "scratch"]
    print_pretraining(options.work, trained)
    print_scores(options.work, options.arms)
    if options.figure:
        draw_losses(options.work, trained, options.figure)


if __name__ == "__main__":
    main()
