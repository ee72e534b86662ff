"""Intensities without a unit as 16-bit integers: each channel by itself, none lost."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nifti_files import ct_like, write_nifti

from spark3d.data.case import quantise
from spark3d.data.prepare import PrepareSpec, prepare
from spark3d.data.record import CaseRecord, sealed
from spark3d.data.sources import CaseSource
from spark3d.data.store import Store, case_path

SPEC = PrepareSpec(spacing_mm=(2.5, 2.0, 3.0))


@given(low=st.floats(-1e5, 1e5), width=st.floats(1e-3, 1e6), seed=st.integers(0, 99))
def test_intensities_without_unit_are_kept_to_a_65000th_of_their_range(low, width, seed):
    """Each channel by itself: beside a wide one, a narrow one would be a constant."""
    one = (low + width * np.random.default_rng(seed).random((5, 5, 5))).astype(np.float32)
    array = np.stack([one, one * np.float32(1e-6), np.full_like(one, low)])
    stored, scales, shifts = quantise(array, "MR", "c")
    assert stored.dtype == np.int16
    for whole, scale, shift, channel in zip(stored, scales, shifts, array, strict=True):
        error = np.abs(whole * scale + shift - channel.astype(np.float64)).max()
        assert error <= np.ptp(channel) / 120_000 + np.abs(channel).max() * 2e-7


def mr_like() -> np.ndarray:
    return ct_like().astype(np.float32) + 1000


def test_a_narrow_channel_beside_a_wide_one_is_kept(tmp_path):
    wide = write_nifti(tmp_path / "a.nii", mr_like())
    narrow = write_nifti(tmp_path / "b.nii", mr_like() * 1e-6)
    cases = [CaseSource("a", wide, more_channels=(narrow,))]
    spec = PrepareSpec(spacing_mm=(2, 1.5, 3))
    prepare(cases, tmp_path / "s", spec)
    store = Store.open(tmp_path / "s")
    record = store.record("a")
    for channel, stats in zip(store.read("a"), record.intensity, strict=True):
        assert len(np.unique(channel)) > 50
        assert channel.max() == pytest.approx(stats.maximum, rel=1e-3)

    file = case_path(tmp_path / "s", "a", ".json")
    old = json.loads(file.read_text())
    old["case"]["scale"], old["case"]["shift"] = record.scale[0], record.shift[0]
    assert CaseRecord.from_json(old["case"]).scale == (record.scale[0],) * 2
    file.write_bytes(sealed({k: v for k, v in old.items() if k != "seal"}))
    assert prepare(cases, tmp_path / "s", spec).written == ["a"]  # one scale had lost the other


def test_a_body_on_a_few_steps_of_extreme_voxels_is_refused(tmp_path):
    array = mr_like()
    cases = [CaseSource("b", write_nifti(tmp_path / "b.nii", array))]
    array[3, 3, 3] = 1e8
    cases.append(CaseSource("a", write_nifti(tmp_path / "a.nii", array)))
    report = prepare(cases, tmp_path / "s", SPEC, max_bad=1)
    assert list(report.failed) == ["a"]
    assert report.failed["a"].startswith("E-EXTREMES: a: found values from ")
    assert "clip the extreme voxels" in report.failed["a"]
