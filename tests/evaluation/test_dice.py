"""The fast Dice of validation."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spark3d.evaluation.metrics import dice_per_label


def test_known_answers():
    reference = np.array([[1, 1, 2], [0, 2, 2]], np.int16)
    prediction = np.array([[1, 0, 2], [3, 2, 0]], np.uint8)
    dice = dice_per_label(prediction, reference, [1, 2, 3, 4])
    assert dice[1] == pytest.approx(2 / 3)
    assert dice[2] == pytest.approx(4 / 5)
    assert dice[3] == 0
    assert np.isnan(dice[4])


@given(seed=st.integers(0, 2**32 - 1), shape=st.lists(st.integers(1, 6), min_size=1, max_size=3))
def test_equals_the_definition(seed, shape):
    rng = np.random.default_rng(seed)
    prediction, reference = rng.integers(0, 4, (2, *shape))
    for label, dice in dice_per_label(prediction, reference, range(5)).items():
        p, r = prediction == label, reference == label
        expected = 2 * (p & r).sum() / (p.sum() + r.sum()) if p.any() or r.any() else np.nan
        np.testing.assert_allclose(dice, expected)


def test_different_shapes_are_refused():
    with pytest.raises(ValueError, match="one grid"):
        dice_per_label(np.zeros((2, 2), int), np.zeros((4,), int), [1])
