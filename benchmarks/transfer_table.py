"""The tables of docs/results/openkbp.md from the lines that transfer_openkbp.py wrote.

python benchmarks/transfer_table.py work/results.jsonl
"""

import argparse
import json
from pathlib import Path

import numpy as np

from spark3d.evaluation.statistics import paired_difference

Result = dict


def organ_means(result: Result) -> dict[str, float]:
    """Mean Dice over cases, per organ; cases without the organ do not count."""
    organs = next(iter(result["dice"].values())).keys()
    table = {o: [c[o] for c in result["dice"].values() if c[o] is not None] for o in organs}
    return {organ: float(np.mean(values)) for organ, values in table.items()}


def score(result: Result) -> float:
    """Mean over organs of the mean over cases."""
    return float(np.mean(list(organ_means(result).values())))


def pairs_of(results: list[Result], stage: str) -> list[tuple[Result, Result]]:
    """(scratch, pre-trained) on the same subset."""
    mine = [r for r in results if r["stage"] == stage]
    scratch = {r["subset"]: r for r in mine if r["arm"] == "scratch"}
    pre = {r["subset"]: r for r in mine if r["arm"] == "pre"}
    return [(scratch[s], pre[s]) for s in sorted(scratch.keys() & pre.keys())]


def print_pairs(results: list[Result], stage: str) -> None:
    """A row per pair, then the paired mean with its 95 % t-interval."""
    pairs = pairs_of(results, stage)
    if not pairs:
        return
    print(f"\n### {stage}\n\n| subset | pre-training seed | scratch | pre-trained | difference |")
    print("|---|---|---|---|---|")
    for a, b in pairs:
        gain = score(b) - score(a)
        row = (
            a["subset"],
            b["pretrain_seed"],
            f"{score(a):.3f}",
            f"{score(b):.3f}",
            f"{gain:+.3f}",
        )
        print("| " + " | ".join(str(cell) for cell in row) + " |")
    a, b = (np.array([score(pair[i]) for pair in pairs]) for i in (0, 1))
    line = f"\nMean {a.mean():.3f} (SD {a.std(ddof=1):.3f})" if len(a) > 1 else f"\n{a[0]:.3f}"
    line += f" -> {b.mean():.3f}" + (f" (SD {b.std(ddof=1):.3f})" if len(b) > 1 else "")
    if len(pairs) > 1:
        first, second = ({str(i): float(v) for i, v in enumerate(arm)} for arm in (a, b))
        d = paired_difference(first, second, np.random.default_rng(0))
        low, high = d.interval.low, d.interval.high
        line += f"; paired difference {d.mean:+.3f}, 95 % CI {low:+.3f} to {high:+.3f}"
        line += f", {d.positive} of {d.pairs} pairs positive, permutation p {d.permutation_p:.3f}"
    print(line)
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
        if not r["stage"].startswith("pairs"):
            organ, worst = min(organ_means(r).items(), key=lambda item: item[1])
            curve = ", ".join(f"{step}: {dice:.3f}" for step, dice in r["curve"])
            print(
                f"| {r['key']} | {score(r):.3f} | {organ} {worst:.3f} | {curve} | {r['seconds']} |"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    lines = parser.parse_args().results.read_text().splitlines()
    results = [json.loads(line) for line in lines]
    for stage in ("pairs8", "pairs20", "pairsall"):
        print_pairs(results, stage)
    print_rest(results)


if __name__ == "__main__":
    main()
