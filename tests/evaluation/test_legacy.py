"""Dice as others average it: known answers, each under its own name."""

import math

import numpy as np
import pytest

from spark3d.data.grid import SourceGrid, Volume
from spark3d.evaluation.legacy import legacy_table, legacy_variants


def volume(labels: np.ndarray, spacing=(1.0, 1.0, 1.0)) -> Volume:
    affine = np.diag([*spacing, 1.0])
    return Volume(labels[None], affine, SourceGrid(labels.shape, affine))


def halves() -> tuple[Volume, Volume]:
    """Organ 1 half found; organ 2 in neither map; organ 3 invented. 8 x 4 x 4 voxels."""
    reference, prediction = np.zeros((2, 8, 4, 4), np.uint8)
    reference[:4] = 1
    prediction[:2] = 1
    prediction[7] = 3
    return volume(prediction), volume(reference)


def test_what_is_averaged_changes_the_figure() -> None:
    prediction, reference = halves()
    found = legacy_variants(prediction, reference, [1, 2, 3], None)
    one = 2 * 32 / (32 + 64)
    background = 2 * 48 / (80 + 64)
    assert found == {
        "organs, original grid": pytest.approx((one + 0) / 2),
        "with background, original grid": pytest.approx((background + one + 0) / 3),
        "organs, absent counts 0, original grid": pytest.approx((one + 0 + 0) / 3),
    }


def test_the_resampled_grid_is_that_of_the_model() -> None:
    prediction, reference = halves()
    found = legacy_variants(prediction, reference, [1, 3], (2.0, 2.0, 2.0))
    assert len(found) == 6
    assert found["organs, resampled grid"] == pytest.approx((2 * 4 / (4 + 8) + 0) / 2)
    fine = legacy_variants(prediction, reference, [1, 3], (1.0, 1.0, 1.0))
    assert fine["organs, resampled grid"] == fine["organs, original grid"]


def test_means_leave_out_cases_without_a_value() -> None:
    table = legacy_table({"a": {"x": 0.5}, "b": {"x": math.nan}, "c": {"x": 1.0}}, None)
    assert table.means == {"x": 0.75}
