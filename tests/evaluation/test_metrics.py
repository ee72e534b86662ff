"""Scores with known answers, and equality with scipy by hand and with MONAI's own functions."""

import math

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.metrics.hausdorff_distance import compute_hausdorff_distance
from monai.metrics.surface_dice import compute_surface_dice
from monai.metrics.surface_distance import compute_average_surface_distance
from scipy.ndimage import binary_erosion, distance_transform_edt

from spark3d.evaluation.metrics import METRICS, OrganScores, score_case

LABELS = {1: "spleen", 2: "liver"}


def blocks(*boxes: tuple[int, tuple[slice, ...]], size=(20, 18, 16)) -> np.ndarray:
    labels = np.zeros(size, np.uint8)
    for label, where in boxes:
        labels[where] = label
    return labels


def blob(rng: np.random.Generator, size: tuple[int, ...]) -> np.ndarray:
    """A random ellipsoid, sometimes cut by the border of the volume."""
    centre = [rng.uniform(0, n) for n in size]
    radius = [rng.uniform(1.5, n / 2) for n in size]
    axes = np.ogrid[tuple(slice(n) for n in size)]
    far = sum(((a - c) / r) ** 2 for a, c, r in zip(axes, centre, radius, strict=True))
    return np.asarray(far < 1)


def by_hand(p: np.ndarray, r: np.ndarray, spacing, tolerance) -> OrganScores:
    """The definitions with distance transforms of the whole volume: slow and obvious."""
    surfaces = [x & ~binary_erosion(x) for x in (p, r)]
    to_r = distance_transform_edt(~surfaces[1], sampling=spacing)[surfaces[0]]
    to_p = distance_transform_edt(~surfaces[0], sampling=spacing)[surfaces[1]]
    both = np.concatenate([to_r, to_p])
    return OrganScores(
        dice=2 * (p & r).sum() / (p.sum() + r.sum()),
        nsd=np.mean(both <= tolerance),
        hd95_mm=max(np.percentile(to_r, 95), np.percentile(to_p, 95)),
        asd_mm=both.mean(),
        volume_error=(int(p.sum()) - int(r.sum())) / int(r.sum()),
    )


def assert_same(ours: OrganScores, theirs: OrganScores) -> None:
    for metric in METRICS:
        np.testing.assert_allclose(
            getattr(ours, metric), getattr(theirs, metric), rtol=1e-5, atol=1e-6, err_msg=metric
        )


def test_a_perfect_prediction():
    labels = blocks((1, np.s_[2:8, 3:9, 4:7]), (2, np.s_[10:19, 3:9, 4:7]))
    for scores in score_case(labels, labels.astype(np.int16), LABELS, (1, 1, 3)).values():
        assert scores == OrganScores(1.0, 1.0, 0.0, 0.0, 0.0)


def test_a_plate_shifted_by_two_voxels_has_its_distance_in_mm():
    """Two plates one voxel thick, two voxels apart along an axis of 1.5 mm: every distance is 3."""
    reference = blocks((1, np.s_[4:5, 2:12, 2:12]))
    prediction = blocks((1, np.s_[6:7, 2:12, 2:12]))
    for tolerance, nsd in ((2.99, 0.0), (3.0, 1.0)):
        scores = score_case(prediction, reference, {1: "plate"}, (1.5, 1, 1), tolerance)["plate"]
        assert scores == OrganScores(0.0, nsd, 3.0, 3.0, 0.0)


def test_twice_the_volume():
    reference = blocks((1, np.s_[4:8, 2:12, 2:12]))
    prediction = blocks((1, np.s_[4:12, 2:12, 2:12]))
    scores = score_case(prediction, reference, {1: "slab"}, (1, 1, 1))["slab"]
    assert scores.volume_error == 1.0
    assert scores.dice == pytest.approx(2 / 3)
    assert scores.hd95_mm == 4.0


@given(seed=st.integers(0, 2**32 - 1), ndim=st.sampled_from([2, 3]))
def test_equals_an_independent_implementation(seed, ndim):
    rng = np.random.default_rng(seed)
    size = tuple(int(n) for n in rng.integers(6, 22, ndim))
    spacing = tuple(float(s) for s in rng.uniform(0.5, 4, ndim))
    p, r = blob(rng, size), blob(rng, size)
    p.flat[0] = r.flat[-1] = True
    scores = score_case(p.astype(np.uint8) * 3, r.astype(np.int16) * 3, {3: "x"}, spacing, 1.7)
    assert_same(scores["x"], by_hand(p, r, spacing, 1.7))


@pytest.mark.filterwarnings("ignore:.*always_return_as_numpy")  # raised within MONAI 1.6
@settings(max_examples=8)
@given(seed=st.integers(0, 2**32 - 1))
def test_equals_the_functions_of_monai_on_the_whole_volume(seed):
    rng = np.random.default_rng(seed)
    size, spacing = (14, 18, 11), (1.0, 0.7, 3.0)
    p, r = blob(rng, size), blob(rng, size)
    p[7, 9, 5] = r[7, 9, 5] = True
    both = [torch.from_numpy(np.stack([~x, x]))[None] for x in (p, r)]
    ours = score_case(p.astype(int), r.astype(int), {1: "x"}, spacing, 2.0)["x"]
    nsd = compute_surface_dice(both[0], both[1], class_thresholds=[2.0], spacing=spacing)
    hd95 = compute_hausdorff_distance(both[0], both[1], percentile=95, spacing=spacing)
    asd = compute_average_surface_distance(both[0], both[1], symmetric=True, spacing=spacing)
    assert ours.nsd == pytest.approx(nsd.item(), rel=1e-5)
    assert ours.hd95_mm == pytest.approx(hd95.item(), rel=1e-5)
    assert ours.asd_mm == pytest.approx(asd.item(), rel=1e-5)


@settings(max_examples=8)
@given(seed=st.integers(0, 2**32 - 1))
def test_equals_simpleitk_on_several_organs_and_uneven_voxels(seed):
    """Overlap and volumes by its label filter, HD95 by its distance maps, organ by organ."""
    rng = np.random.default_rng(seed)
    size, spacing = (16, 14, 10), (0.8, 1.1, 3.3)
    p, r = np.zeros((2, *size), np.uint8)
    for label in (1, 2):
        p[blob(rng, size)], r[blob(rng, size)] = label, label
    padded = [np.pad(x, 1) for x in (p, r)]  # at the border of a volume a surface ends too
    images = [sitk.GetImageFromArray(x.transpose(2, 1, 0)) for x in padded]
    for image in images:
        image.SetSpacing(spacing)
    overlap = sitk.LabelOverlapMeasuresImageFilter()
    overlap.Execute(*images)
    ours = score_case(p, r, LABELS, spacing, 2.0)
    for label, organ in LABELS.items():
        if not (p == label).any() or not (r == label).any():
            continue
        assert ours[organ].dice == pytest.approx(overlap.GetDiceCoefficient(label), rel=1e-6)
        volumes = []
        for image in images:
            shape = sitk.LabelShapeStatisticsImageFilter()
            shape.Execute(image == label)
            volumes.append(shape.GetPhysicalSize(1))
        error = (volumes[0] - volumes[1]) / volumes[1]
        assert ours[organ].volume_error == pytest.approx(error, rel=1e-6, abs=1e-9)
        surfaces = [sitk.LabelContour(image == label) for image in images]
        from_other = [
            sitk.GetArrayFromImage(
                sitk.SignedMaurerDistanceMap(s, squaredDistance=False, useImageSpacing=True)
            )
            for s in surfaces
        ]
        there = [sitk.GetArrayFromImage(s) > 0 for s in surfaces]
        far = [np.abs(from_other[1][there[0]]), np.abs(from_other[0][there[1]])]
        both = np.concatenate(far)
        assert ours[organ].hd95_mm == pytest.approx(
            max(np.percentile(d, 95) for d in far), rel=1e-4, abs=1e-4
        )
        assert ours[organ].nsd == pytest.approx(float(np.mean(both <= 2.0)), abs=1e-6)


def test_absent_organs_follow_the_stated_rule():
    """In neither map: not scored. Missed or invented: the worst score there can be."""
    reference = blocks((1, np.s_[2:8, 3:9, 4:7]), size=(20, 18, 16))
    prediction = blocks((2, np.s_[2:8, 3:9, 4:7]), size=(20, 18, 16))
    labels = {1: "missed", 2: "invented", 3: "nowhere"}
    scores = score_case(prediction, reference, labels, (2, 1, 1))
    diagonal = math.sqrt(40**2 + 18**2 + 16**2)
    assert scores["missed"] == OrganScores(0.0, 0.0, diagonal, diagonal, -1.0)
    invented = scores["invented"]
    assert (invented.dice, invented.nsd, invented.hd95_mm) == (0.0, 0.0, diagonal)
    assert math.isnan(invented.volume_error)
    assert all(math.isnan(getattr(scores["nowhere"], m)) for m in METRICS)
    assert list(scores) == ["missed", "invented", "nowhere"]


def test_maps_on_two_grids_are_refused():
    with pytest.raises(ValueError, match="one grid"):
        score_case(blocks(), blocks(size=(4, 4, 4)), LABELS, (1, 1, 1))
    with pytest.raises(ValueError, match="spacing_mm"):
        score_case(blocks(), blocks(), LABELS, (1, 1))
