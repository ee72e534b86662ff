"""The tables of docs/results/ from the lines that transfer_openkbp.py or transfer_study.py wrote.

python benchmarks/transfer_table.py work/results.jsonl
"""

import argparse
import json
from pathlib import Path

import numpy as np
from transfer_jobs import mean_dice, organ_means

from spark3d.evaluation.statistics import paired_difference

Result = dict
PAIRS = ("pairs", "seen")
"""Stages whose two arms are compared subset by subset start with these words."""


def pairs_of(
    results: list[Result], stage: str, first: str = "scratch", second: str = "pre"
) -> list[tuple[Result, Result]]:
    """Two arms of a stage on the same subsets."""
    mine = [r for r in results if r["stage"] == stage]
    a, b = ({r["subset"]: r for r in mine if r["arm"] == arm} for arm in (first, second))
    return [(a[s], b[s]) for s in sorted(a.keys() & b.keys())]


def paired_summary(pairs: list[tuple[Result, Result]]) -> str:
    """Paired mean, its 95 % t-interval, how many are positive, and the sign-flip test."""
    first, second = ({str(k): mean_dice(pair[i]) for k, pair in enumerate(pairs)} for i in (0, 1))
    d = paired_difference(first, second, np.random.default_rng(0))
    low, high = d.interval.low, d.interval.high
    return (
        f"paired difference {d.mean:+.3f}, 95 % CI {low:+.3f} to {high:+.3f}, "
        f"{d.positive} of {d.pairs} pairs positive, permutation p {d.permutation_p:.3f}"
    )


def steps_to_reach(result: Result, dice: float) -> int | None:
    """First validated step with at least `dice`, on the store's grid; None if it never has."""
    return next((step for step, found in result["curve"] if found >= dice), None)


def print_pairs(results: list[Result], stage: str) -> None:
    """A row per pair, then the paired mean with its 95 % t-interval."""
    pairs = pairs_of(results, stage)
    if not pairs:
        return
    head = ("subset", "pre-training seed", "scratch", "pre-trained", "difference")
    head += ("pre-trained has the end of scratch", "scratch has that of pre-trained")
    print(f"\n### {stage}\n\n| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for a, b in pairs:
        reached = (steps_to_reach(b, a["curve"][-1][1]), steps_to_reach(a, b["curve"][-1][1]))
        first, second = mean_dice(a), mean_dice(b)
        scores = (f"{first:.3f}", f"{second:.3f}", f"{second - first:+.3f}")
        by = ("never" if step is None else f"by step {step}" for step in reached)
        print(f"| {a['subset']} | {b['pretrain_seed']} | {' | '.join((*scores, *by))} |")
    a, b = (np.array([mean_dice(pair[i]) for pair in pairs]) for i in (0, 1))
    line = f"\nMean {a.mean():.3f} (SD {a.std(ddof=1):.3f})" if len(a) > 1 else f"\n{a[0]:.3f}"
    line += f" -> {b.mean():.3f}" + (f" (SD {b.std(ddof=1):.3f})" if len(b) > 1 else "")
    print(line + (f"; {paired_summary(pairs)}" if len(pairs) > 1 else ""))
    print(
        "\n| organ | scratch | pre-trained | difference | pairs positive |\n|---|---|---|---|---|"
    )
    for organ in organ_means(pairs[0][0]):
        x, y = (np.array([organ_means(pair[i])[organ] for pair in pairs]) for i in (0, 1))
        gain = f"{(y - x).mean():+.3f} | {sum(y > x)} of {len(x)}"
        print(f"| {organ} | {x.mean():.3f} | {y.mean():.3f} | {gain} |")


def print_rest(results: list[Result]) -> None:
    """Tuning and controls, a row each."""
    print("\n### tuning and controls\n\n| job | Dice | worst organ | by step | seconds |")
    print("|---|---|---|---|---|")
    for r in results:
        if not r["stage"].startswith(PAIRS):
            organ, worst = min(organ_means(r).items(), key=lambda item: item[1])
            curve = ", ".join(f"{step}: {dice:.3f}" for step, dice in r["curve"])
            cells = (r["key"], f"{mean_dice(r):.3f}", f"{organ} {worst:.3f}", curve, r["seconds"])
            print(f"| {' | '.join(map(str, cells))} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    lines = parser.parse_args().results.read_text().splitlines()
    results = [json.loads(line) for line in lines]
    for stage in dict.fromkeys(r["stage"] for r in results if r["stage"].startswith(PAIRS)):
        print_pairs(results, stage)
    print_rest(results)


if __name__ == "__main__":
    main()
