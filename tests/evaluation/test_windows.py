"""Sliding windows: the same blend as MONAI's inferer, in less memory, on any size."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from monai.inferers.utils import sliding_window_inference
from torch import nn

from spark3d.errors import ConfigError
from spark3d.evaluation.accumulator import EMPTY_LOGIT, Accumulator
from spark3d.evaluation.flips import mirrored_pairs
from spark3d.evaluation.windows import (
    WindowPlan,
    largest,
    predict_labels,
    predict_logits,
    window_slices,
)


def small_network(ndim: int, classes: int = 3) -> nn.Module:
    """Two convolutions with padding, so that a voxel's logits depend on where its window ends."""
    conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[ndim]
    torch.manual_seed(ndim)
    return nn.Sequential(conv(1, 4, 3, padding=1), nn.GELU(), conv(4, classes, 3, padding=1))


class Threshold(nn.Module):
    """Logits from the intensity itself: class 1 where positive. Counts the windows it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.windows = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.windows += x.shape[0]
        return torch.cat([-x, x], 1)


@given(
    data=st.data(), ndim=st.sampled_from([1, 2, 3]), overlap=st.sampled_from([0, 0.25, 0.5, 0.7])
)
def test_logits_equal_those_of_monai(data, ndim, overlap):
    size = data.draw(st.lists(st.integers(3, 21), min_size=ndim, max_size=ndim))
    window = tuple(data.draw(st.lists(st.integers(3, 12), min_size=ndim, max_size=ndim)))
    batch = data.draw(st.integers(1, 5))
    network = small_network(ndim)
    volume = torch.randn(1, *size)
    ours = predict_logits(network, volume, WindowPlan(window, overlap, batch))
    with torch.no_grad():
        theirs = sliding_window_inference(
            volume[None], window, batch, network.eval(), overlap, mode="gaussian"
        )
    assert isinstance(theirs, torch.Tensor)
    torch.testing.assert_close(ours, theirs[0], atol=1e-5, rtol=1e-5)


@given(data=st.data(), ndim=st.sampled_from([1, 2]), flips=st.sampled_from([(), ((0,),)]))
def test_a_network_of_slices_predicts_each_slice_by_itself(data, ndim, flips):
    size = data.draw(st.lists(st.integers(3, 21), min_size=ndim + 1, max_size=ndim + 1))
    network = small_network(ndim).train()
    volume = torch.randn(1, *size)
    plan = WindowPlan((7,) * ndim, 0.25, data.draw(st.integers(1, 5)), flips, swaps=((1, 2),))
    whole = predict_logits(network, volume, plan)
    assert network.training
    slices = [predict_logits(network, volume[..., k], plan) for k in range(size[-1])]
    torch.testing.assert_close(whole, torch.stack(slices, -1), atol=1e-5, rtol=1e-5)
    assert torch.equal(predict_labels(network, volume, plan), whole.argmax(0).to(torch.uint8))


@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_labels_are_the_largest_logits(ndim):
    volume = torch.randn(1, *(30, 7, 13)[:ndim])
    plan = WindowPlan((8,) * ndim, batch=2)
    network = small_network(ndim)
    labels = predict_labels(network, volume, plan)
    assert labels.dtype == torch.uint8
    assert torch.equal(labels, predict_logits(network, volume, plan).argmax(0).to(torch.uint8))


@given(
    size=st.lists(st.integers(4, 40), min_size=1, max_size=3),
    overlap=st.floats(0, 0.95),
    data=st.data(),
)
def test_windows_cover_every_voxel_and_stay_inside(size, overlap, data):
    window = [data.draw(st.integers(1, n)) for n in size]
    window = [max(w, n // 4) for w, n in zip(window, size, strict=True)]
    seen = np.zeros(size, int)
    for where in window_slices(size, window, overlap):
        assert all(s.start >= 0 and s.stop <= n for s, n in zip(where, size, strict=True))
        assert [s.stop - s.start for s in where] == window
        seen[where] += 1
    assert seen.min() >= 1


def test_a_constant_network_gives_its_constant_on_a_padded_volume():
    class Constant(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.full((x.shape[0], 2, *x.shape[2:]), 0.7)

    logits = predict_logits(Constant(), torch.zeros(1, 5, 40, 9), WindowPlan((16, 16, 16)))
    assert logits.shape == (2, 5, 40, 9)
    torch.testing.assert_close(logits, torch.full_like(logits, 0.7))


@pytest.mark.parametrize("pad_value", [(-3.0,), (-3.0, 2.0)])
def test_padding_has_the_value_of_its_channel(pad_value):
    seen = []

    class Sees(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(x)
            return x

    predict_logits(Sees(), torch.zeros(2, 6, 20), WindowPlan((10, 20), pad_value=pad_value))
    (window,) = seen
    expected = torch.zeros(1, 2, 10, 20)
    for channel, value in enumerate(pad_value * (2 // len(pad_value))):
        expected[:, channel, :2] = expected[:, channel, 8:] = value
    assert torch.equal(window, expected)


def test_empty_windows_are_background_and_are_not_run():
    volume = torch.full((1, 64, 16, 16), -1.0)
    volume[:, 30:34, 6:9, 6:9] = 2.0
    plain, skipping = Threshold(), Threshold()
    plan = WindowPlan((16, 16, 16))
    expected = predict_labels(plain, volume, plan)
    labels = predict_labels(skipping, volume, WindowPlan((16, 16, 16), empty_below=-1.0))
    assert torch.equal(labels, expected)
    assert labels.sum() == 4 * 3 * 3
    assert skipping.windows < plain.windows == 7
    logits = predict_logits(Threshold(), volume, WindowPlan((16, 16, 16), empty_below=-1.0))
    assert logits[0, 0, 0, 0] == 0
    assert logits[1, 0, 0, 0] == EMPTY_LOGIT
    assert logits[1, 63, 15, 15] == EMPTY_LOGIT


def test_a_volume_of_nothing_but_air_runs_one_window():
    network = Threshold()
    labels = predict_labels(
        network, torch.full((1, 40, 40), -1.0), WindowPlan((16, 16), empty_below=-1.0)
    )
    assert labels.max() == 0
    assert network.windows == 1


def test_flips_average_mirrored_passes_and_exchange_left_and_right():
    class Halves(nn.Module):
        """Says class 1 in the first half along axis 0 and class 2 in the second."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            half = x.shape[2] // 2
            logits = torch.zeros(x.shape[0], 3, *x.shape[2:])
            logits[:, 1, :half] = 1
            logits[:, 2, half:] = 1
            return logits

    volume = torch.zeros(1, 8, 4)
    plain = predict_logits(Halves(), volume, WindowPlan((8, 4)))
    blind = predict_logits(Halves(), volume, WindowPlan((8, 4), flips=((0,),)))
    aware = predict_logits(
        Halves(), volume, WindowPlan((8, 4), flips=((0,), (1,)), swaps=((1, 2),))
    )
    torch.testing.assert_close(aware, plain)
    torch.testing.assert_close(blind[1], torch.full((8, 4), 0.5))


def test_flips_equal_the_mean_of_passes_over_flipped_volumes():
    network, volume = small_network(2), torch.randn(1, 12, 12)
    flips = ((0,), (1,), (0, 1))
    ours = predict_logits(network, volume, WindowPlan((12, 12), flips=flips))
    with torch.no_grad():
        passes = [network(volume[None])[0]]
        for axes in flips:
            dims = [a + 1 for a in axes]
            passes.append(network(volume.flip(dims)[None])[0].flip(dims))
    torch.testing.assert_close(ours, torch.stack(passes).mean(0))


def test_the_accumulator_moves_to_the_cpu_above_its_memory_bound_with_the_same_result():
    network, volume = small_network(3), torch.randn(1, 20, 9, 9)
    free = predict_logits(network, volume, WindowPlan((8, 8, 8)))
    bound = predict_logits(network, volume, WindowPlan((8, 8, 8), memory_bytes=0))
    torch.testing.assert_close(free, bound, rtol=0, atol=0)
    assert Accumulator.size_in_bytes(14, (512, 512, 300), 96, 0) < 14 * 512 * 512 * 300 * 4


@given(classes=st.integers(1, 300), sizes=st.lists(st.integers(1, 9), min_size=1, max_size=3))
def test_the_largest_class_is_that_of_argmax_the_first_of_equals(classes, sizes):
    rng = torch.Generator().manual_seed(classes)
    logits = torch.randint(0, 3, (classes, *sizes), generator=rng).float()
    torch.testing.assert_close(largest(logits), logits.argmax(0), rtol=0, atol=0)


def test_rows_handed_out_are_finished_and_the_others_move_up_whatever_the_overlap():
    sums = Accumulator(2, (12, 3), 5, 0, torch.device("cpu"))
    logits, weight = torch.randn(8, 2, 5, 3), torch.rand(5, 3) + 0.1
    whole, weights = torch.zeros(2, 12, 3), torch.zeros(12, 3)
    found = []
    for start in range(8):  # every row but the first and last lies in several windows
        found += [(first, rows.clone()) for first, rows in sums.advance(start)]
        sums.add((slice(start, start + 5), slice(0, 3)), logits[start], weight)
        whole[:, start : start + 5] += logits[start] * weight
        weights[start : start + 5] += weight
    found += [(first, rows.clone()) for first, rows in sums.advance(12)]
    assert [first for first, _ in found] == list(range(8))
    torch.testing.assert_close(torch.cat([rows for _, rows in found], 1), whole / weights)


def test_the_network_is_left_in_the_mode_it_was_in_and_runs_in_evaluation_mode():
    class Mode(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert not self.training
            assert not torch.is_grad_enabled()
            return x

    network = Mode().train()
    predict_logits(network, torch.zeros(1, 4, 4), WindowPlan((4, 4)))
    assert network.training


def test_progress_counts_every_window():
    seen: list[tuple[int, int]] = []
    predict_labels(
        Threshold(), torch.zeros(1, 20), WindowPlan((8,), batch=2), lambda *n: seen.append(n)
    )
    assert seen == [(2, 4), (4, 4)]


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"window": (0, 4)}, "window"),
        ({"window": (4, 4), "overlap": 1.0}, "overlap"),
        ({"window": (4, 4), "batch": 0}, "batch"),
        ({"window": (4, 4), "flips": ((2,),)}, "flip"),
        ({"window": (4, 4), "flips": ((0, 0),)}, "flip"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(options, word):
    with pytest.raises(ConfigError, match=word):
        WindowPlan(**options)


def test_wrong_networks_and_volumes_are_refused():
    with pytest.raises(ConfigError, match="does not fit a window"):
        predict_labels(Threshold(), torch.zeros(1, 4, 4), WindowPlan((4, 4, 4)))
    with pytest.raises(ConfigError, match="does not fit a window"):  # slices are one axis fewer
        predict_labels(Threshold(), torch.zeros(1, 4, 4, 4), WindowPlan((4,)))
    with pytest.raises(TypeError, match="returned"):
        predict_labels(nn.MaxPool2d(2), torch.zeros(1, 4, 4), WindowPlan((4, 4)))
    with pytest.raises(ConfigError, match="not finite"):
        predict_labels(nn.Identity(), torch.full((1, 4, 4), torch.nan), WindowPlan((4, 4)))


def test_left_and_right_labels_are_paired_by_name():
    labels = {1: "liver", 2: "right kidney", 3: "left kidney", 4: "Left lung", 5: "right lung"}
    assert mirrored_pairs(labels) == ((2, 3), (4, 5))
    with pytest.raises(ConfigError, match="no counterpart 'right eye'"):
        mirrored_pairs({1: "left eye"})


@pytest.mark.parametrize(
    "labels",
    [
        {1: "Parotid_L", 2: "Parotid_R", 3: "Larynx"},
        {1: "r kidney", 2: "l kidney", 3: "L1"},
        {1: "lung-l", 2: "lung-r", 3: "vena cava r"},
    ],
)
def test_sides_may_be_single_letters(labels):
    assert mirrored_pairs(labels) == ((1, 2),)
