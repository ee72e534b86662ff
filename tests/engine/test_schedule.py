"""Schedules against their formulas and end points."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spark3d.engine.schedule import learning_rate, weight_decay


def test_official_spark_end_points() -> None:
    at = [learning_rate(s, 1000, 2.0, 100) for s in (0, 50, 100, 999)]
    assert at == pytest.approx([0.01, 2 * (0.005 + 0.995 / 2), 2.0, 0.002])
    middle = learning_rate(100 + 899 // 2, 1000, 2.0, 100)
    expected = 2 * (0.001 + 0.999 * (1 + math.cos(math.pi * (899 // 2) / 899)) / 2)
    assert middle == pytest.approx(expected)


@given(
    steps=st.integers(2, 500),
    share=st.floats(0, 0.9),
    shape=st.sampled_from(["cosine", "poly", "constant"]),
)
def test_rates_rise_in_the_warm_up_alone(steps: int, share: float, shape: str) -> None:
    warmup = int(steps * share)
    rates = [learning_rate(s, steps, 1.0, warmup, shape) for s in range(steps)]  # type: ignore[arg-type]
    assert all(0 < r <= 1 or (r >= 0 and s == steps - 1) for s, r in enumerate(rates))
    rise, tail = rates[:warmup], rates[warmup:]
    assert all(a < b for a, b in pairwise(rise))
    assert all(a >= b for a, b in pairwise(tail))


def test_weight_decay_anneals_from_start_to_end() -> None:
    assert weight_decay(0, 100, 0.04, 0.2) == pytest.approx(0.04)
    assert weight_decay(99, 100, 0.04, 0.2) == pytest.approx(0.2)
    assert weight_decay(50, 100, 0.05, None) == 0.05
