"""Splits that do not depend on the order of cases, and plans that say why."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spark3d.data.geometry import SourceGrid
from spark3d.data.plan import CROP_VOXELS, suggest_plan
from spark3d.data.record import CaseRecord, IntensityStats
from spark3d.data.splits import (
    check_disjoint,
    few_labels,
    folds,
    held_out,
    named_split,
    overlapping,
    parse_split,
    split_names,
)
from spark3d.errors import ConfigError, DataError

BTCV = [f"img{n:04d}" for n in [*range(1, 11), *range(21, 41)]]


def record(case_id="a", size=(100, 90, 80), modality="CT", mean=30.0, group="", content="h"):
    stats = IntensityStats(-1000, 1500, mean, 200, -950, 1200)
    return CaseRecord(
        case_id, group or case_id, "training", modality, 1, size, (1.0, 1.0, 1.0), np.eye(4),
        SourceGrid(size, np.eye(4)), (1.0,), (0.0,), content, (stats,), None, "",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("btcv-monai-24-6", (24, 6, 0)),
        ("btcv-synapse-18-12", (18, 0, 12)),
        ("btcv-80-20", (24, 6, 0)),
    ],
)
def test_published_splits_use_each_case_once(name, sizes):
    split = named_split(name)
    assert (len(split.train), len(split.validation), len(split.test)) == sizes
    split.check(BTCV)
    assert sorted([*split.train, *split.validation, *split.test]) == BTCV
    assert len(split.about) > 40


def test_published_splits_are_those_known():
    assert named_split("btcv-monai-24-6").validation == tuple(f"img{n:04d}" for n in range(35, 41))
    numbers = {int(i[3:]) for i in named_split("btcv-synapse-18-12").test}
    assert numbers == {1, 2, 3, 4, 8, 22, 25, 29, 32, 35, 36, 38}
    assert named_split("btcv-synapse-18-12").labels == (1, 2, 3, 4, 6, 7, 8, 11)
    assert set(split_names()) == {"btcv-monai-24-6", "btcv-synapse-18-12", "btcv-80-20"}


def test_a_split_that_does_not_fit_is_refused():
    split = named_split("btcv-monai-24-6")
    with pytest.raises(DataError, match=r"E-SPLIT-ABSENT.*img0040"):
        split.check(BTCV[:-1])
    twice = parse_split("mine", {"train": ["a", "b"], "test": ["b"]})
    with pytest.raises(DataError, match=r"E-SPLIT-TWICE.*\bb\b"):
        twice.check(["a", "b"])
    with pytest.raises(ConfigError, match="btcv-monai-24-6"):
        named_split("btcv")
    with pytest.raises(DataError, match=r"E-SPLIT-FILE: mine: .*'train'"):
        parse_split("mine", json.loads('{"trian": []}'))


groups = st.dictionaries(
    st.text("abcdefgh0123", min_size=1, max_size=6),
    st.sampled_from([f"patient {n}" for n in range(9)]),
    min_size=6,
    max_size=40,
).filter(lambda g: len(set(g.values())) >= 3)


@given(groups=groups, seed=st.integers(0, 9))
def test_folds_keep_patients_together_and_use_each_case_once(groups, seed):
    parts = folds(groups, 3, seed)
    assert sorted(case for part in parts for case in part) == sorted(groups)
    patients = [{groups[case] for case in part} for part in parts]
    assert not (patients[0] & patients[1] | patients[0] & patients[2] | patients[1] & patients[2])
    assert parts == folds(dict(reversed(list(groups.items()))), 3, seed)
    largest = max(sum(g == p for g in groups.values()) for p in set(groups.values()))
    assert max(map(len, parts)) - min(map(len, parts)) <= largest


@given(groups=groups, seed=st.integers(0, 9), share=st.floats(0.05, 0.9))
def test_held_out_cases_are_whole_patients(groups, seed, share):
    kept = held_out(groups, share, seed)
    inside = {groups[case] for case in kept}
    assert kept
    assert kept < set(groups)
    assert kept == {case for case in groups if groups[case] in inside}
    assert kept == held_out(dict(reversed(list(groups.items()))), share, seed)


def test_folds_and_shares_that_leave_nothing_are_refused():
    with pytest.raises(ConfigError, match="2 to 3"):
        folds({"a": "1", "b": "2", "c": "3"}, 4)
    with pytest.raises(ConfigError, match="one side empty"):
        held_out({"a": "1", "b": "1"}, 0.5)


@given(seed=st.integers(0, 99), few=st.integers(1, 20), many=st.integers(1, 20))
def test_smaller_subsets_lie_in_larger_ones(seed, few, many):
    few, many = sorted((few, many))
    subset, larger = few_labels(BTCV, few, seed), few_labels(BTCV[::-1], many, seed)
    assert larger[:few] == subset
    assert len(set(larger)) == many


def test_subsets_differ_between_seeds_and_never_ask_for_more_than_there_is():
    assert len({few_labels(BTCV, 4, seed) for seed in range(8)}) == 8
    with pytest.raises(ConfigError, match="1 to 30"):
        few_labels(BTCV, 31)


def test_planted_leaks_are_found():
    train = [record("a", content="1"), record("b", content="2", group="p")]
    check_disjoint(train, [record("c", content="3")], ("training", "validation"))
    with pytest.raises(DataError, match=r"E-LEAK-VOXELS.*a = c"):
        check_disjoint(train, [record("c", content="1")], ("training", "validation"))
    with pytest.raises(DataError, match=r"E-LEAK-PATIENT.*b = c"):
        check_disjoint(train, [record("c", content="4", group="p")], ("training", "validation"))
    assert overlapping([*train, record("z", content="9")], ["1", "9", "x"]) == ("a", "z")


@given(
    sizes=st.lists(st.tuples(*[st.integers(5, 500)] * 3), min_size=1, max_size=6),
    cell=st.tuples(*[st.sampled_from([8, 16, 32])] * 3),
)
def test_crops_are_whole_cells_and_within_bounds(sizes, cell):
    plan = suggest_plan([record(str(n), size) for n, size in enumerate(sizes)], (1, 1, 1), cell)
    assert all(n % c == 0 and n >= 2 * c for n, c in zip(plan.crop, cell, strict=True))
    median = np.median(np.array(sizes), axis=0)
    assert all(n <= max(m, 2 * c) for n, m, c in zip(plan.crop, median, cell, strict=True))
    assert np.prod(plan.crop) <= max(CROP_VOXELS, 8 * np.prod(cell))
    assert 1 <= plan.batch <= min(16, len(sizes))


def test_large_volumes_get_the_usual_crop_and_batch():
    records = [record(str(n), (300, 260, 220)) for n in range(9)]
    plan = suggest_plan(records, (1.5, 1.5, 2.0), (32, 32, 32))
    assert plan.crop == (96, 96, 96)
    assert plan.batch == 2
    assert (plan.window.low, plan.window.high) == (-175, 250)
    assert plan.spacing_mm == (1.5, 1.5, 2.0)
    assert set(plan.reasons) == {"modality", "spacing", "window", "crop", "batch"}


def test_windows_follow_the_modality_and_the_lungs():
    lungs = suggest_plan([record(mean=-600)], (1, 1, 1), (16, 16, 16))
    assert (lungs.window.low, lungs.window.high) == (-1000, 400)
    brain = suggest_plan([record(modality="MR")] * 2 + [record()], (1, 1, 1), (16, 16, 16))
    assert (brain.modality, brain.window.mode) == ("MR", "zscore")
    assert brain.window.needs_statistics
    assert "2 of 3" in brain.reasons["modality"]


def test_a_plan_for_nothing_is_refused():
    with pytest.raises(DataError, match="E-NO-CASES"):
        suggest_plan([], (1, 1, 1), (16, 16, 16))
