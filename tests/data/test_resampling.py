"""Axes, grids and resampling: what must hold for every orientation, spacing and obliqueness."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nifti_files import rotation, signed_permutation
from scipy import ndimage

from spark3d.data.geometry import (
    SourceGrid,
    Volume,
    axis_weights,
    crop_affine,
    orient,
    resample,
    resample_onto,
    resampled_grid,
    restore,
    spacing_of,
)

sizes = st.tuples(*[st.integers(2, 9)] * 3)
spacings = st.tuples(*[st.floats(0.4, 6)] * 3)
orders = st.permutations([0, 1, 2]).map(tuple)
signs = st.tuples(*[st.sampled_from([-1, 1])] * 3)
tilts = st.floats(-20, 20)


def make_affine(order, signs, spacing, tilt=0.0):
    affine = np.eye(4)
    turn = rotation(tilt, 0) @ rotation(-tilt / 2, 2)
    affine[:3, :3] = turn @ signed_permutation(order, signs) * np.asarray(spacing)
    affine[:3, 3] = 12.5, -40, 7
    return affine


def ras_volume(array, spacing=(1.0, 1.0, 1.0)):
    affine = np.diag([*spacing, 1.0])
    return Volume(array[None], affine, SourceGrid(array.shape, affine))


@given(size=sizes, spacing=spacings, order=orders, sign=signs, tilt=tilts)
def test_orienting_moves_no_voxel_and_is_undone_exactly(size, spacing, order, sign, tilt):
    affine = make_affine(order, sign, spacing, tilt)
    array = np.arange(np.prod(size)).reshape(size)
    oriented, new_affine = orient(array, affine)
    source = SourceGrid(size, affine)

    assert source.ras()[0] == oriented.shape
    np.testing.assert_allclose(source.ras()[1], new_affine)
    assert (np.diag(new_affine)[:3] > 0).all()
    np.testing.assert_array_equal(restore(oriented, source), array)
    index = np.argwhere(oriented == array[1, 0, 1])[0]
    np.testing.assert_allclose(
        new_affine @ [*index, 1], affine @ [1, 0, 1, 1], atol=1e-9, err_msg="world place changed"
    )


def test_restore_refuses_an_array_of_another_grid():
    source = SourceGrid((4, 5, 6), np.diag([1.0, 1, 1, 1]))
    with pytest.raises(ValueError, match="resample_onto"):
        restore(np.zeros((4, 5, 7)), source)


@given(size=sizes, old=spacings, new=spacings, tilt=tilts)
def test_a_resampled_grid_has_the_spacing_asked_for_and_the_same_centre(size, old, new, tilt):
    affine = make_affine((0, 1, 2), (1, 1, 1), old, tilt)
    out, target = resampled_grid(size, affine, new)
    np.testing.assert_allclose(spacing_of(target), new)
    centre = [*(np.array(size) - 1) / 2, 1]
    np.testing.assert_allclose(target @ [*(np.array(out) - 1) / 2, 1], affine @ centre, atol=1e-9)
    for n, m, a, b in zip(size, out, old, new, strict=True):
        assert abs(n * a - m * b) <= b / 2 + 1e-9 or m == 1


@given(n=st.integers(1, 12), m=st.integers(1, 12), scale=st.floats(0.2, 5), wide=st.booleans())
def test_weights_are_an_average_of_voxels_inside(n, m, scale, wide):
    weights = axis_weights(n, m, scale, 0.3, wide).toarray()
    assert (weights >= 0).all()
    centre = scale * np.arange(m) + 0.3
    inside = (centre >= -0.5) & (centre <= n - 0.5)
    np.testing.assert_allclose(weights.sum(1)[inside], 1, atol=1e-6)
    assert (weights.sum(1)[centre > n - 0.49] == 0).all()


@given(size=st.tuples(*[st.integers(4, 9)] * 3), old=spacings, new=spacings)
def test_resampling_keeps_a_constant_exactly(size, old, new):
    result = resample(ras_volume(np.full(size, 37.0, np.float32), old), new)
    np.testing.assert_allclose(result.array, 37, rtol=1e-5)


def test_resampling_keeps_a_ramp_away_from_the_border():
    i, j, k = np.meshgrid(*[np.arange(24.0)] * 3, indexing="ij")
    volume = ras_volume((2 * i - j + 0.5 * k).astype(np.float32))
    result = resample(volume, (1.7, 0.6, 2.3))
    index = np.argwhere(np.ones(result.size))
    world = index @ result.affine[:3, :3].T + result.affine[:3, 3]
    expected = (world @ [2, -1, 0.5]).reshape(result.size)
    inner = (slice(3, -3),) * 3
    np.testing.assert_allclose(result.array[0][inner], expected[inner], atol=1e-4)


def test_finer_sampling_equals_trilinear_interpolation():
    rng = np.random.default_rng(0)
    array = rng.normal(size=(7, 8, 6)).astype(np.float32)
    result = resample(ras_volume(array, (2, 2, 2)), (0.9, 1.1, 1.3))
    index = np.indices(result.size).reshape(3, -1)
    world = result.affine[:3, :3] @ index + result.affine[:3, 3:]
    expected = ndimage.map_coordinates(array, world / 2, order=1, mode="nearest")
    np.testing.assert_allclose(result.array[0].ravel(), expected, atol=1e-5)


def test_shrinking_averages_instead_of_picking_voxels():
    checkers = (np.indices((32, 32, 32)).sum(0) % 2 * 100).astype(np.float32)
    result = resample(ras_volume(checkers), (4, 4, 4))
    assert np.abs(result.array - 50).max() < 8


@given(size=sizes, spacing=spacings, seed=st.integers(0, 99))
def test_resampling_commutes_with_mirroring(size, spacing, seed):
    array = np.random.default_rng(seed).normal(size=size).astype(np.float32)
    one = resample(ras_volume(array), spacing).array[0]
    other = resample(ras_volume(array[::-1, :, ::-1].copy()), spacing).array[0]
    np.testing.assert_allclose(one[::-1, :, ::-1], other, atol=1e-5)


def test_the_same_spacing_returns_the_volume_as_it_is():
    volume = ras_volume(np.arange(60, dtype=np.int16).reshape(3, 4, 5), (1.5, 1.5, 2))
    assert resample(volume, (1.5, 1.5, 2)) is volume


@given(size=st.tuples(*[st.integers(3, 12)] * 3), new=spacings, seed=st.integers(0, 99))
def test_resampling_labels_invents_and_loses_no_class(size, new, seed):
    rng = np.random.default_rng(seed)
    label = np.zeros(size, np.uint8)
    for value in (1, 2, 7):
        label[tuple(rng.integers(0, n) for n in size)] = value
    result = resample(ras_volume(label), new, label=True)
    assert result.array.dtype == np.uint8
    room = np.prod(result.size) >= 64
    found, expected = set(np.unique(result.array)), set(np.unique(label))
    assert found <= expected
    if room and min(result.size) > 3:
        assert found == expected


def test_labels_come_back_to_the_source_grid():
    grid = np.indices((40, 36, 30)) - np.array([20, 18, 15]).reshape(3, 1, 1, 1)
    label = ((grid**2).sum(0) < 12**2).astype(np.uint8) * 3
    volume = ras_volume(label, (0.8, 0.8, 1.2))
    coarse = resample(volume, (1.5, 1.5, 2.0), label=True)
    back = resample_onto(coarse.array[0], coarse.affine, volume.size, volume.affine, label=True)
    both = ((back == 3) & (label == 3)).sum()
    assert 2 * both / ((back == 3).sum() + (label == 3).sum()) > 0.95


def test_a_tie_between_class_and_background_goes_to_the_class():
    label = np.zeros((4, 4, 4), np.uint8)
    label[:2] = 1
    grown = resample_onto(label, np.eye(4), (1, 4, 4), crop_affine(np.eye(4), (1.5, 0, 0)), True)
    assert (grown == 1).all()


@given(order=orders, sign=signs)
def test_a_target_with_other_axis_order_gets_the_same_voxels(order, sign):
    array = np.random.default_rng(1).normal(size=(5, 6, 7)).astype(np.float32)
    source = SourceGrid((5, 6, 7), make_affine(order, sign, (1, 2, 3)))
    oriented, affine = orient(array, source.affine)
    back = resample_onto(oriented, affine, source.size, source.affine)
    np.testing.assert_allclose(back, array, atol=1e-6)


def test_outside_the_array_is_fill_or_background():
    array = np.full((4, 4, 4), 5, np.int16)
    wide = crop_affine(np.eye(4), (-2, -2, -2))
    image = resample_onto(array, np.eye(4), (8, 8, 8), wide, fill=-1000)
    label = resample_onto(array, np.eye(4), (8, 8, 8), wide, label=True)
    inside = np.zeros((8, 8, 8), bool)
    inside[2:6, 2:6, 2:6] = True
    np.testing.assert_array_equal(image, np.where(inside, 5, -1000))
    np.testing.assert_array_equal(label, np.where(inside, 5, 0))


def test_rotated_grids_are_refused():
    turned = np.eye(4)
    turned[:3, :3] = rotation(10, 2)
    with pytest.raises(ValueError, match="not parallel"):
        resample_onto(np.zeros((9, 9, 9)), np.eye(4), (9, 9, 9), turned)


@given(start=st.tuples(*[st.integers(0, 9)] * 3), tilt=tilts)
def test_the_first_voxel_of_a_crop_keeps_its_place(start, tilt):
    affine = make_affine((2, 0, 1), (1, -1, 1), (1, 2, 3), tilt)
    cropped = crop_affine(affine, start)
    np.testing.assert_allclose(cropped @ [0, 0, 0, 1], affine @ [*start, 1])
    np.testing.assert_array_equal(cropped[:3, :3], affine[:3, :3])
