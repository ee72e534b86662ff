"""Augmentations move image and label together, keep geometry honest and cost little."""

import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spark3d.data.augment import (
    Affine,
    Augment,
    Flips,
    Intensity,
    SegmentationAugment,
    Turns,
    grown,
    resample_crop,
    rotation,
)
from spark3d.data.intensity import Window
from spark3d.errors import ConfigError

STILL = Affine(probability=0.0)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("ndim", [2, 3])
def test_an_identity_matrix_cuts_the_centre(ndim):
    crop, size = torch.rand(2, *(13, 16, 10)[:ndim]), (9, 8, 6)[:ndim]
    label = torch.randint(0, 5, crop.shape[1:])
    cut = resample_crop(crop, label, None, size)
    sampled = resample_crop(crop, label, np.eye(ndim), size)
    torch.testing.assert_close(cut[0], sampled[0], atol=1e-5, rtol=0)
    assert cut[1] is not None
    assert sampled[1] is not None
    assert torch.equal(cut[1], sampled[1])


def test_a_quarter_turn_is_a_transposition_with_a_flip():
    """Fixes the order of axes and the sense of rotation, the part that is easy to get wrong."""
    crop = torch.rand(1, 8, 8, 4)
    turned = resample_crop(crop, None, rotation([np.pi / 2, 0, 0], 3), (8, 8, 4))[0]
    torch.testing.assert_close(turned, crop.transpose(1, 2).flip(2), atol=1e-5, rtol=0)


def test_zoom_magnifies_one_axis_only():
    ramp = torch.arange(32.0)[None, :, None, None].expand(1, 32, 32, 32)
    zoomed = resample_crop(ramp, None, np.diag([0.5, 1, 1]), (16, 16, 16))[0]
    expected = torch.linspace(15.5 - 3.75, 15.5 + 3.75, 16)
    torch.testing.assert_close(zoomed[0, :, 0, 0], expected, atol=1e-4, rtol=0)


def test_rotations_keep_lengths_in_millimetres():
    spacing = np.array([1.0, 2.0, 5.0])
    matrix = Affine(1.0, 30.0, (1, 1), spacing=tuple(spacing)).draw(3, rng())
    assert matrix is not None
    in_mm = matrix * spacing[:, None] / spacing[None, :]
    np.testing.assert_allclose(in_mm @ in_mm.T, np.eye(3), atol=1e-12)
    assert not np.allclose(matrix @ matrix.T, np.eye(3))


@given(seed=st.integers(0, 2**32))
def test_label_follows_the_image(seed):
    """Where the label is a threshold of a smooth image, it still is one afterwards."""
    axes = torch.meshgrid(*[torch.linspace(-1, 1, n) for n in (56, 52, 48)], indexing="ij")
    image = sum((a - s) ** 2 for a, s in zip(axes, rng(seed).uniform(-0.3, 0.3, 3), strict=True))
    assert isinstance(image, torch.Tensor)
    label = (image < 0.3).long()
    augment = SegmentationAugment(Affine(1.0), Flips(), Intensity(probability=0.0))
    crop, out = augment(image[None], label, (40, 36, 32), rng(seed))
    assert out is not None
    assert ((crop[0] < 0.3) == (out == 1)).float().mean() > 0.97


def test_a_left_right_mirror_image_swaps_sides():
    label = torch.zeros(4, 4, 4, dtype=torch.long)
    label[0], label[3], label[1] = 2, 3, 5
    flips = Flips((1.0, 0.0, 0.0), swap=((2, 3),))
    crop, out = flips(label[None].float(), label, rng())
    assert out is not None
    assert (out[0] == 2).all()
    assert (out[3] == 3).all()
    assert (out[2] == 5).all()
    assert (crop[0, 0] == 3).all()


def test_flips_along_other_axes_keep_labels():
    label = torch.randint(0, 4, (5, 4, 3))
    out = Flips((0.0, 1.0, 1.0), swap=((2, 3),))(label[None].float(), label, rng())[1]
    assert out is not None
    assert torch.equal(out, label.flip(1, 2))


def test_contrast_keeps_air_at_zero():
    crop = torch.zeros(1, 4, 4, 4)
    assert torch.equal(Intensity(probability=1.0)(crop, rng()), crop)
    assert not torch.equal(Intensity(probability=1.0, shift=0.1)(crop, rng()), crop)


def test_noise_has_the_strength_asked_for():
    crop = torch.zeros(1, 40, 40, 40)
    spreads = [
        float(Intensity(1.0, scale=0, noise=0.2)(crop, rng(seed)).std()) for seed in range(20)
    ]
    assert 0.15 < max(spreads) <= 0.21


@pytest.mark.parametrize("augment", [Augment(), SegmentationAugment()])
@pytest.mark.parametrize("size", [(16, 12), (16, 12, 8)])
def test_output_has_the_size_asked_for_and_input_is_left_alone(augment, size):
    for seed in range(8):
        crop = torch.rand(1, *augment.read_size(size))
        label = torch.randint(0, 3, crop.shape[1:])
        kept = crop.clone(), label.clone()
        out, out_label = augment(crop, label, size, rng(seed))
        assert out.shape == (1, *size)
        assert out_label is not None
        assert out_label.shape == size
        assert torch.equal(crop, kept[0])
        assert torch.equal(label, kept[1])


def test_the_margin_is_even():
    assert grown((48, 64, 48), 0.25) == (60, 80, 60)
    assert grown((7, 5), 0.1) == (9, 7)
    assert grown((8,), 0.0) == (8,)
    assert SegmentationAugment(affine=STILL).read_size((8, 8)) == (8, 8)


@pytest.mark.parametrize("options", [{"zoom": (1.2, 0.8)}, {"zoom": (0, 1)}, {"stretch": 1.0}])
def test_impossible_ranges_are_refused(options):
    with pytest.raises(ConfigError, match="augmentation"):
        Affine(**options)


def test_spacing_of_another_dimension_is_refused():
    with pytest.raises(ConfigError, match="one number per axis"):
        Affine(spacing=(1.0, 2.0)).draw(3, rng())


def test_a_crop_takes_milliseconds():
    augment, crop = SegmentationAugment(affine=Affine(1.0)), torch.rand(1, 60, 80, 60)
    label = torch.randint(0, 3, (60, 80, 60))
    times = []
    for seed in range(6):
        start = time.perf_counter()
        augment(crop, label, (48, 64, 48), rng(seed))
        times.append(time.perf_counter() - start)
    assert min(times) < 0.1


def test_the_window_maps_air_to_zero_and_clips():
    window = Window("unit", -200, 300, 2)
    out = window.apply(np.array([[-1000, -200, 50, 300, 3000]], dtype=np.float32))
    np.testing.assert_allclose(out, [[0, 0, 1, 2, 2]])


def test_a_z_score_is_per_channel_and_a_constant_channel_becomes_zero():
    values = np.array([[1.0, 3.0], [5.0, 5.0]])
    out = Window("zscore").apply(values, (2.0, 5.0), (1.0, 0.0))
    np.testing.assert_allclose(out, [[-1, 1], [0, 0]])
    fixed = Window("zscore", low=0, high=2, mean=1, std=2).apply(values[:1])
    np.testing.assert_allclose(fixed, [[0, 0.5]])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "unit"}, "needs low and high"),
        ({"mode": "unit", "low": 3, "high": 3}, "is empty"),
        ({"mode": "log"}, "unit or zscore"),
        ({"mode": "zscore", "mean": 1}, "go together"),
    ],
)
def test_impossible_windows_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        Window(**options)


def test_missing_statistics_are_refused():
    with pytest.raises(ConfigError, match="needs the mean and std"):
        Window("zscore").apply(np.zeros((1, 2)))


def test_quarter_turns_move_image_and_label_together_and_keep_sides():
    crop = torch.arange(5.0 * 5 * 3).reshape(1, 5, 5, 3)
    seen = set()
    for seed in range(40):
        turned, label = Turns(0.5)(crop, crop[0].long(), rng(seed))
        assert torch.equal(turned[0].long(), label)
        seen |= {k for k in range(4) if torch.equal(turned, torch.rot90(crop, k, (1, 2)))}
    assert seen == {0, 1, 2, 3}  # no mirror image: left stays apart from right
    turned = [torch.equal(Turns(0.2)(crop, None, rng(n))[0], crop) for n in range(500)]
    assert 0.75 < np.mean(turned) < 0.85


def test_no_turn_draws_nothing_and_unequal_sides_are_refused():
    generator, other = rng(), rng()
    crop = torch.zeros(1, 4, 6, 4)
    assert Turns()(crop, None, generator)[0] is crop
    assert generator.random() == other.random()
    with pytest.raises(ConfigError, match=r"equal first sides, not \(4, 6, 4\)"):
        Turns(0.1)(crop, None, rng())


def test_each_change_of_intensity_has_its_own_probability():
    crop = torch.ones(1, 4, 4, 4)
    shifted = Intensity((0.0, 1.0, 0.0), scale=0.5, shift=0.5, noise=0.5)
    scaled = Intensity((1.0, 0.0, 0.0), scale=0.5, shift=0.5, noise=0.5)
    for seed in range(20):
        offset = shifted(crop, rng(seed)) - crop
        assert float(offset.std()) == pytest.approx(0, abs=1e-6)
        assert 0 < abs(float(offset.mean())) <= 0.5
        torch.testing.assert_close(shifted(0 * crop, rng(seed)), offset)
        assert float(scaled(0 * crop, rng(seed)).abs().max()) == 0
