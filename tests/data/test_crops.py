"""Crops start where the rules say, hold what they promise and never touch what they should not."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_store import cell_shares

from spark3d.data.crops import (
    ChannelStatistics,
    CropRule,
    body_share,
    choose_start,
    class_start,
    classes_present,
    foreground_start,
    needs_padding,
    overlap,
    pad_crop,
    random_start,
)
from spark3d.errors import ConfigError, DataError

axes = st.integers(1, 3).flatmap(
    lambda n: st.tuples(st.tuples(*[st.integers(1, 90)] * n), st.tuples(*[st.integers(1, 60)] * n))
)


@dataclass(frozen=True)
class Record:
    """No more of a record than crops ask for."""

    id: str
    size: tuple[int, ...]
    body: np.ndarray
    class_coordinates: Mapping[int, np.ndarray] = field(default_factory=dict)
    labels: tuple[int, ...] | None = ()
    intensity: tuple[ChannelStatistics, ...] = ()


def record_of(body: np.ndarray, **classes: np.ndarray) -> Record:
    coordinates = {int(k[1:]): v for k, v in classes.items()}
    return Record("a", body.shape, cell_shares(body), coordinates)


@given(axes=axes, seed=st.integers(0, 2**32))
def test_a_random_crop_never_wastes_voxels(axes, seed):
    size, crop = axes
    start = random_start(size, crop, np.random.default_rng(seed))
    for a, s, c in zip(start, size, crop, strict=True):
        assert (a >= 0 and a + c <= s) if c <= s else (a <= 0 and a + c >= s)


def test_random_starts_reach_every_place():
    rng = np.random.default_rng(0)
    seen = {random_start((5, 2), (3, 4), rng) for _ in range(200)}
    assert seen == {(a, b) for a in (0, 1, 2) for b in (-2, -1, 0)}


@given(axes=axes, seed=st.integers(0, 2**32))
def test_overlap_and_padding_rebuild_the_crop(axes, seed):
    """Reading the part inside and padding it equals cutting from an endlessly padded volume."""
    size, crop = axes
    rng = np.random.default_rng(seed)
    whole = rng.integers(1, 100, (2, *size)).astype(np.float32)
    start = tuple(int(rng.integers(-c - 2, s + 2)) for s, c in zip(size, crop, strict=True))
    inner, extent, pads = overlap(size, start, crop)
    cut = tuple(slice(a, a + n) for a, n in zip(inner, extent, strict=True))
    got = pad_crop(whole[(slice(None), *cut)], crop, pads, np.array([-1.0, -2.0]))
    room = [(0, 0), *[(c + 4, c + 4) for c in crop]]
    padded = np.stack([np.pad(whole, room, constant_values=v)[i] for i, v in ((0, -1), (1, -2))])
    wide = tuple(slice(a + c + 4, a + 2 * c + 4) for a, c in zip(start, crop, strict=True))
    np.testing.assert_array_equal(got, padded[(slice(None), *wide)])


@given(seed=st.integers(0, 2**32))
def test_body_share_is_exact_where_cells_are_whole(seed):
    rng = np.random.default_rng(seed)
    cells = rng.random((3, 2, 3)) < 0.5
    body = cells.repeat(32, 0).repeat(32, 1).repeat(32, 2)[:80, :64, :70]
    crop = (40, 33, 20)
    start = random_start(body.shape, crop, rng)
    cut = tuple(slice(a, a + c) for a, c in zip(start, crop, strict=True))
    assert body_share(record_of(body), start, crop) == pytest.approx(body[cut].mean(), abs=1e-9)


def test_body_share_counts_padding_as_air():
    record = record_of(np.ones((10, 10), dtype=bool))
    assert body_share(record, (-5, 0), (20, 10)) == pytest.approx(0.5)


def test_foreground_crops_hold_body():
    body = np.zeros((128, 128, 64), dtype=bool)
    body[96:, 96:] = True
    record, rng = record_of(body), np.random.default_rng(0)
    starts = [foreground_start(record, (32, 32, 32), rng, 0.2, tries=60) for _ in range(30)]
    shares = [body[a : a + 32, b : b + 32, c : c + 32].mean() for a, b, c in starts]
    assert min(shares) >= 0.2
    assert len(set(starts)) > 10


def test_a_case_without_body_still_gives_a_crop():
    record = record_of(np.zeros((40, 40), dtype=bool))
    start = foreground_start(record, (16, 16), np.random.default_rng(0), 0.3)
    assert all(0 <= a <= 24 for a in start)


@given(axes=axes, seed=st.integers(0, 2**32), jitter=st.floats(0, 0.5))
def test_a_class_crop_holds_a_voxel_of_the_class(axes, seed, jitter):
    size, crop = axes
    rng = np.random.default_rng(seed)
    voxel = np.array([[int(rng.integers(s)) for s in size]])
    record = Record("a", size, np.ones((1,) * len(size)), {3: voxel})
    start = class_start(record, crop, (), rng, jitter)
    for a, c, s, v in zip(start, crop, size, voxel[0], strict=True):
        assert a <= v < a + c
        assert min(0, s - c) <= a <= max(0, s - c)


def test_classes_are_drawn_equally_whatever_their_size():
    body = np.ones((64, 64), dtype=bool)
    small, large = np.array([[5, 5]]), np.argwhere(np.ones((30, 30))) + 30
    record = record_of(body, c1=small, c2=large, c3=np.empty((0, 2), dtype=int))
    assert classes_present(record) == (1, 2)
    rng = np.random.default_rng(0)
    starts = [class_start(record, (8, 8), (1, 2, 3), rng) for _ in range(400)]
    share = np.mean([a < 10 and b < 10 for a, b in starts])
    assert 0.42 < share < 0.58


def test_a_class_that_is_absent_is_refused_with_a_remedy():
    record = record_of(np.ones((8, 8), dtype=bool), c1=np.array([[1, 1]]))
    with pytest.raises(DataError, match=r"case a: none of the classes \[7\] .* foreground rule"):
        class_start(record, (4, 4), (7,), np.random.default_rng(0))


def test_balanced_crops_are_centred_on_classes_as_often_as_asked():
    record = record_of(np.ones((200, 200), dtype=bool), c1=np.array([[100, 100]]))
    rule, rng = CropRule("balanced", class_probability=2 / 3, jitter=0.0), np.random.default_rng(1)
    starts = [choose_start(rule, record, (20, 20), rng) for _ in range(600)]
    assert 0.61 < np.mean([s == (90, 90) for s in starts]) < 0.73


def test_balanced_crops_of_an_unlabelled_case_fall_on_the_body():
    rule = CropRule("balanced", class_probability=1.0)
    record = record_of(np.ones((64, 64), dtype=bool))
    assert len(choose_start(rule, record, (20, 20), np.random.default_rng(0))) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "best"}, "random, foreground or balanced"),
        ({"min_fraction": 1.5}, "min_fraction=1.5"),
        ({"jitter": 0.9}, "jitter"),
    ],
)
def test_impossible_rules_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        CropRule(**options)


def test_small_volumes_are_told_from_large_ones():
    assert needs_padding((40, 37, 22), (48, 16, 16))
    assert not needs_padding((40, 37, 22), (40, 16, 16))
