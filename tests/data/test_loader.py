"""Sample n is a function of (seed, n) alone, whatever workers, restarts, ranks and other seeds."""

import contextlib
import multiprocessing
import os
import random
import resource
import signal
import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_store import box_label, damage, make_store

from spark3d.data.augment import Augment, SegmentationAugment
from spark3d.data.crops import CropRule
from spark3d.data.intensity import Window
from spark3d.data.loader import VolumeCrops, batches
from spark3d.data.store import Store
from spark3d.data.stream import _bury
from spark3d.errors import ConfigError, DataError, EnvironmentProblem

WIDE = Window("unit", 0, 32000, 32000)


@pytest.fixture(scope="session")
def store(tmp_path_factory) -> Store:
    return make_store(tmp_path_factory.mktemp("store"))


def crops(store: Store, seed: int = 7, **options) -> VolumeCrops:
    options = {
        "rule": CropRule("balanced"),
        "augment": SegmentationAugment(),
        "labelled": True,
    } | options
    return VolumeCrops(store, [c.id for c in store.cases], (16, 16, 16), WIDE, seed, **options)


def same(a: list, b: list) -> bool:
    return len(a) == len(b) and all(
        x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)
        for x, y in zip(a, b, strict=True)
    )


def test_samples_have_the_promised_form(store):
    sample = crops(store)[3]
    assert sample["crop"].shape == (1, 16, 16, 16)
    assert sample["crop"].dtype == torch.float32
    assert sample["label"].shape == (16, 16, 16)
    assert sample["label"].dtype == torch.int64
    assert sample["number"] == 3
    assert "label" not in crops(store, labelled=False)[3]


def test_slices_are_those_of_the_volumes(store):
    """A crop of two axes is an axial slice of the store, labels and all."""
    ids = [c.id for c in store.cases]
    still = VolumeCrops(store, ids, (16, 16), WIDE, 7, CropRule("balanced"), None, labelled=True)
    moved = VolumeCrops(
        store, ids, (16, 16), WIDE, 7, CropRule("balanced"), SegmentationAugment(), labelled=True
    )
    found = set()
    for number in range(12):
        plain, turned = still[number], moved[number]
        assert plain["crop"].shape == turned["crop"].shape == (1, 16, 16)
        assert plain["label"].shape == turned["label"].shape == (16, 16)
        found |= set(plain["label"].unique().tolist())
        case = ids[plain["case"]]
        volume = torch.from_numpy(WIDE.apply(store.read(case)))[0]
        places = volume.unfold(0, 16, 1).unfold(1, 16, 1)  # (x, y, z, 16, 16)
        same_voxels = (places == plain["crop"][0]).all(-1).all(-1).nonzero()
        assert len(same_voxels) == 1
        x, y, z = same_voxels[0].tolist()
        label = store.read_label(case)[x : x + 16, y : y + 16, z]
        assert np.array_equal(label, plain["label"].numpy())
    assert max(found) > 0
    with pytest.raises(ConfigError, match="number of axes"):
        VolumeCrops(store, ids, (16,), WIDE, 7)


def test_every_epoch_visits_each_case_once_in_a_new_order(store):
    dataset = crops(store)
    epochs = [[dataset.entry(5 * e + i) for i in range(5)] for e in range(6)]
    assert all(sorted(order) == list(range(5)) for order in epochs)
    assert len({tuple(order) for order in epochs}) > 3


def test_several_crops_in_a_row_come_from_one_case(store):
    single, several = crops(store), crops(store, crops_per_case=4)
    assert [several.entry(n) for n in range(40)] == [single.entry(n // 4) for n in range(40)]
    starts = [several[n]["crop"] for n in range(4)]
    assert not any(torch.equal(starts[0], other) for other in starts[1:])
    assert several.name(3) == single.name(0)


@given(number=st.integers(0, 10**7), seed=st.integers(0, 2**31))
def test_a_sample_depends_on_seed_and_number_only(store, number, seed):
    first, second = crops(store, seed), crops(store, seed)
    second[number + 1], second[0]
    a, b = first[number], second[number]
    assert torch.equal(a["crop"], b["crop"])
    assert torch.equal(a["label"], b["label"])


def test_other_seeds_give_other_crops(store):
    assert not torch.equal(crops(store, 1)[0]["crop"], crops(store, 2)[0]["crop"])


def test_global_generators_are_neither_read_nor_touched(store):
    def run(seed: int) -> list:
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        random.seed(seed)
        before = (torch.get_rng_state(), np.random.get_state()[1], random.getstate())  # noqa: NPY002
        out = list(batches(crops(store), 4, 0, 3))
        after = (torch.get_rng_state(), np.random.get_state()[1], random.getstate())  # noqa: NPY002
        assert torch.equal(before[0], after[0])
        assert (before[1] == after[1]).all()
        assert before[2] == after[2]
        return out

    assert same(run(0), run(1))


def test_workers_change_nothing(store):
    assert same(
        list(batches(crops(store), 4, 0, 5, workers=0)), list(batches(crops(store), 4, 0, 5, 2))
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_stream_is_the_tail_of_the_first(store, workers):
    whole = list(batches(crops(store), 3, 0, 6))
    assert same(whole[4:], list(batches(crops(store), 3, 4, 6, workers)))
    assert list(batches(crops(store), 3, 6, 6)) == []


def test_ranks_share_the_same_samples_out(store):
    whole = list(batches(crops(store), 4, 0, 4))
    parts = [list(batches(crops(store), 4, 0, 4, rank=r, world=2)) for r in range(2)]
    joined = [{k: torch.cat([a[k], b[k]]) for k in a} for a, b in zip(*parts, strict=True)]
    assert same(whole, joined)


def test_a_batch_that_ranks_cannot_share_is_refused(store):
    with pytest.raises(ConfigError, match="batch of 5 cannot be shared by 2 ranks"):
        batches(crops(store), 5, 0, 4, world=2)


def test_the_cache_changes_speed_only(store):
    plain, cached = crops(store), crops(store, cache=True)
    partly = crops(store, cache=True, cache_bytes=2 * 40 * 37 * 22 * 5)
    assert (plain.cached, cached.cached) == (0, 5)
    assert 0 < partly.cached < 5
    stream = list(batches(plain, 5, 0, 2))
    assert same(stream, list(batches(cached, 5, 0, 2)))
    assert same(stream, list(batches(partly, 5, 0, 2)))


def test_crops_are_cut_where_the_label_is(tmp_path):
    """Values of the volume tell the place, and there the label must agree."""
    size = (30, 31, 32)
    dataset = crops(make_store(tmp_path / "store", 2, size), augment=None)
    for n in range(6):
        sample = dataset[n]
        places = np.unravel_index(sample["crop"][0].round().long().numpy() - 1, size)
        label = box_label(size, second=dataset.name(n) != "case0")
        np.testing.assert_array_equal(sample["label"], label[places])


def test_small_volumes_are_padded_dark_and_counted(tmp_path):
    dataset = crops(make_store(tmp_path / "store", 2, (10, 20, 20)), augment=None)
    assert dataset.padded == ("case0", "case1")
    sample = dataset[0]
    assert sample["crop"].shape == (1, 16, 16, 16)
    assert int((sample["crop"] == 0).sum()) == 6 * 16 * 16
    assert (sample["label"][sample["crop"][0] == 0] == 0).all()


@pytest.mark.parametrize("cache", [False, True])
def test_z_scores_use_the_statistics_of_the_case(tmp_path, cache):
    size = (16, 16, 16)
    store = make_store(tmp_path / "store", 1, size, channels=2, scale=0.25)
    dataset = VolumeCrops(
        store, ["case0"], size, Window("zscore"), 0, CropRule("random"), cache=cache
    )
    crop = dataset[0]["crop"]
    assert crop.shape == (2, *size)
    torch.testing.assert_close(crop.mean((1, 2, 3)), torch.zeros(2), atol=1e-4, rtol=0)
    torch.testing.assert_close(crop.std((1, 2, 3)), torch.ones(2), atol=1e-3, rtol=0)


@pytest.mark.parametrize("low", [None, 100.0])
def test_padding_is_what_the_window_calls_outside(tmp_path, low):
    size = (10, 16, 16)
    store = make_store(tmp_path / "store", 1, size, channels=2, scale=0.25)
    window, record = Window("zscore", low=low), store.record("case0")
    crop = VolumeCrops(store, ["case0"], (16, 16, 16), window, 0, CropRule("random"))[0]["crop"]
    outside = window.outside(record.minimum, record.mean, record.std)
    assert len(outside) == 2
    lowest = record.minimum if low is None else (low, low)
    for channel, value in enumerate(outside):
        expected = (lowest[channel] - record.mean[channel]) / record.std[channel]
        assert value == pytest.approx(expected, rel=1e-5)
        assert value <= crop[channel].min()
        assert int((crop[channel] == value).sum()) >= 6 * 16 * 16


@pytest.mark.parametrize("workers", [0, 2])
def test_damage_is_one_line_from_any_process(tmp_path, workers):
    store = make_store(tmp_path / "store", 3)
    damage(store, "case2")
    with pytest.raises(DataError, match=r"^E-STORE-DAMAGED: case case2: .*again$"):
        list(batches(crops(store), 2, 0, 5, workers))


def test_unlabelled_cases_are_refused_where_labels_are_needed(tmp_path):
    store = make_store(tmp_path / "store", 2, labelled=False)
    assert "label" not in crops(store, labelled=False)[0]
    with pytest.raises(DataError, match="case case0 has no label; prepare it with one"):
        crops(store)


class Deadly(VolumeCrops):
    """Kills the worker that makes sample 9."""

    def __getitem__(self, number):
        if number == 9:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(number)


def test_a_killed_worker_is_named_with_its_signal_and_cases(store):
    dataset = Deadly(store, ["case0", "case1", "case2"], (16, 16, 16), WIDE, 7, augment=Augment())
    handler = signal.getsignal(signal.SIGCHLD)
    with pytest.raises(EnvironmentProblem, match=r"worker \d+ \(SIGKILL, at") as caught:
        list(batches(dataset, 2, 0, 8, workers=1))
    assert f"at case {dataset.name(9)}, sample 9" in str(caught.value)
    assert signal.getsignal(signal.SIGCHLD) == handler


def test_the_exit_code_of_a_worker_that_closed_its_files_before_it_died_is_waited_for():
    """The sentinel of a process is ready as soon as its files are closed, not when it is dead."""

    def die_slowly():
        os.closerange(3, 64)
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGKILL)

    process = multiprocessing.get_context("fork").Process(target=die_slowly)
    process.start()
    assert [p.exitcode for p in _bury({process})] == [-signal.SIGKILL]


@pytest.fixture
def little_shared_memory():
    """Shared memory counts as a file, so that this limit stands for a small /dev/shm."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_no_room_in_shared_memory_is_one_line(store, little_shared_memory):
    with pytest.raises(EnvironmentProblem, match=r"no room in /dev/shm for a batch.*--shm-size"):
        list(batches(crops(store), 4, 0, 2, workers=1))


@pytest.mark.parametrize("ids", [[], ["case0", "case0"]])
def test_no_case_or_a_double_one_is_refused(store, ids):
    with pytest.raises(ConfigError, match="at least one case and none twice"):
        VolumeCrops(store, ids, (16, 16, 16), WIDE, 0)


@pytest.mark.parametrize("crop", [(16,), (16, 16, 16, 16)])
def test_a_crop_of_other_dimension_is_refused(store, crop):
    with pytest.raises(ConfigError, match="number of axes"):
        VolumeCrops(store, ["case0"], crop, WIDE, 0)


def test_stopping_early_leaves_no_worker_behind(store):
    stream = batches(crops(store), 2, 0, 50, workers=2)
    next(stream)
    with contextlib.closing(stream):  # type: ignore[arg-type]
        pass
    assert not multiprocessing.active_children()
