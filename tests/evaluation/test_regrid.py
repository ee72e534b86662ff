"""Class probabilities on another grid: the same as moving all classes whole, and in place."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from spark3d.data.geometry import resample_onto
from spark3d.data.grid import SourceGrid
from spark3d.evaluation.regrid import labels_onto


def scaled(spacing, origin) -> np.ndarray:
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = origin
    return affine


def blobs(rng: np.random.Generator, classes: int, size: tuple[int, ...]) -> np.ndarray:
    """Smooth probabilities with each class in a place of its own."""
    axes = np.ogrid[tuple(slice(n) for n in size)]
    logits = [np.zeros(size)]
    for _ in range(classes - 1):
        centre = [rng.uniform(0, n) for n in size]
        far = sum((a - c) ** 2 for a, c in zip(axes, centre, strict=True))
        logits.append(6 - 2 * np.sqrt(far))
    power = np.exp(np.stack(logits))
    return (power / power.sum(0)).astype(np.float32)


@settings(max_examples=15)
@given(seed=st.integers(0, 2**32 - 1), classes=st.integers(2, 5))
def test_equals_moving_every_class_whole(seed, classes):
    rng = np.random.default_rng(seed)
    probabilities = blobs(rng, classes, tuple(int(n) for n in rng.integers(5, 14, 3)))
    affine = scaled(rng.uniform(0.8, 3, 3), rng.uniform(-5, 5, 3))
    size = tuple(int(n) for n in rng.integers(5, 24, 3))
    target = scaled(rng.uniform(0.5, 5, 3), rng.uniform(-9, 9, 3))
    whole = np.stack([resample_onto(p, affine, size, target) for p in probabilities])
    margin = np.sort(whole, axis=0)[-1] - np.sort(whole, axis=0)[-2]
    labels = labels_onto(probabilities, affine, size, target)
    clear = margin > 1e-5
    np.testing.assert_array_equal(labels[clear], whole.argmax(0)[clear])
    assert (labels[whole.sum(0) == 0] == 0).all()


def test_the_same_grid_gives_the_largest_class():
    probabilities = blobs(np.random.default_rng(0), 4, (9, 10, 11))
    affine = scaled((2, 1, 3), (1, 2, 3))
    labels = labels_onto(probabilities, affine, (9, 10, 11), affine)
    np.testing.assert_array_equal(labels, probabilities.argmax(0))
    assert labels.dtype == np.uint8


def test_an_object_keeps_its_place_and_volume_on_a_finer_oblique_grid_of_other_orientation():
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(0.3), -np.sin(0.3)], [np.sin(0.3), np.cos(0.3)]]
    file = SourceGrid((30, 44, 36), turn @ np.diag([-1.0, -1.0, 2.0, 1.0]))
    size, target = file.ras()
    spacing = np.abs(np.linalg.norm(target[:3, :3], axis=0))
    coarse = target @ np.diag([*(2.0 / spacing), 1.0])
    coarse_size = tuple(int(n * s / 2) for n, s in zip(size, spacing, strict=True))
    inside = np.zeros(coarse_size, np.float32)
    inside[4:10, 6:14, 5:20] = 1
    labels = labels_onto(np.stack([1 - inside, inside]), coarse, size, target)
    volume = labels.sum() * abs(np.linalg.det(target[:3, :3]))
    assert abs(volume - 6 * 8 * 15 * 8) / (6 * 8 * 15 * 8) < 0.15
    middle = (target @ [*np.argwhere(labels).mean(0), 1])[:3]
    np.testing.assert_allclose(middle, (coarse @ [6.5, 9.5, 12, 1])[:3], atol=1.0)
