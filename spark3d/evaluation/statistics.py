"""Intervals of a mean over cases, and the difference of two runs on the same cases."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from scipy import stats

EXACT_UP_TO = 12
"""Pairs up to which the sign-flip test enumerates all sign patterns (2^12)."""


@dataclass(frozen=True)
class Interval:
    """A confidence interval `[low, high]`; NaN on both sides where there are too few values."""

    low: float
    high: float


UNKNOWN = Interval(math.nan, math.nan)
"""Of too few values."""


@dataclass(frozen=True)
class PairedDifference:
    """Second run minus first, over the cases (or seeds) that both have.

    Args:
        pairs: number of pairs where neither value is NaN.
        mean: mean difference; `sd` its standard deviation over pairs (ddof 1).
        interval: t-interval of the mean.
        positive: pairs where the second run is larger; `negative` where it is smaller.
        wilcoxon_p: two-sided signed-rank test; 1 if all differences are 0.
        permutation_p: two-sided test of the mean by flipping signs, exact up to 12 pairs.
    """

    pairs: int
    mean: float
    sd: float
    interval: Interval
    positive: int
    negative: int
    wilcoxon_p: float
    permutation_p: float


def mean_and_sd(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Mean and standard deviation (ddof 1) of what is not NaN; NaN where there is too little."""
    known = _known(values)
    mean = float(known.mean()) if known.size else math.nan
    return mean, float(known.std(ddof=1)) if known.size > 1 else math.nan


def t_interval(values: Sequence[float] | np.ndarray, confidence: float = 0.95) -> Interval:
    """Student's interval of the mean of `values`, NaN values left out; NaN for fewer than two."""
    known = _known(values)
    if known.size < 2:
        return UNKNOWN
    quantile = stats.t.ppf((1 + confidence) / 2, known.size - 1)
    half = float(quantile * known.std(ddof=1) / math.sqrt(known.size))
    return Interval(float(known.mean()) - half, float(known.mean()) + half)


def bootstrap_interval(
    values: Sequence[float] | np.ndarray,
    rng: np.random.Generator,
    confidence: float = 0.95,
    repeats: int = 10_000,
) -> Interval:
    """Percentile bootstrap interval of the mean of `values` (one per case), NaN values left out."""
    known = _known(values)
    if known.size < 2:
        return UNKNOWN
    means = known[rng.integers(0, known.size, (repeats, known.size))].mean(1)
    tail = 100 * (1 - confidence) / 2
    low, high = np.percentile(means, [tail, 100 - tail])
    return Interval(float(low), float(high))


def paired_difference(
    first: Mapping[str, float],
    second: Mapping[str, float],
    rng: np.random.Generator,
    confidence: float = 0.95,
) -> PairedDifference:
    """Second minus first over the keys (case ids, seeds) of both; pairs with a NaN are left out.

    Args:
        rng: draws the sign flips where there are more than 12 pairs.
    """
    keys = [k for k in first if k in second]
    difference = _known([second[k] - first[k] for k in keys])
    mean, sd = mean_and_sd(difference)
    return PairedDifference(
        pairs=difference.size,
        mean=mean,
        sd=sd,
        interval=t_interval(difference, confidence),
        positive=int((difference > 0).sum()),
        negative=int((difference < 0).sum()),
        wilcoxon_p=_wilcoxon(difference),
        permutation_p=_sign_flips(difference, rng),
    )


def _wilcoxon(difference: np.ndarray) -> float:
    if not difference.size:
        return math.nan
    if not difference.any():
        return 1.0
    result: Any = stats.wilcoxon(difference)  # scipy's type has no fields
    return float(result.pvalue)


def _sign_flips(difference: np.ndarray, rng: np.random.Generator, repeats: int = 20_000) -> float:
    if not difference.size:
        return math.nan
    if difference.size <= EXACT_UP_TO:
        signs = np.array(list(product((-1, 1), repeat=difference.size)))
    else:
        signs = rng.choice((-1, 1), (repeats, difference.size))
        signs = np.concatenate([np.ones((1, difference.size)), signs])
    means = np.abs(signs @ difference)
    return float((means >= abs(difference.sum()) - 1e-12).mean())


def _known(values: Sequence[float] | np.ndarray) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    return array[~np.isnan(array)]
