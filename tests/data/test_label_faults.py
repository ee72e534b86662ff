"""Faults between files: grids, classes, lists of cases, leaks between sets."""

import numpy as np
import pytest
from nifti_files import DEFAULT

from spark3d.data.checks import (
    check_apart,
    check_cases,
    check_label_names,
    check_label_values,
    check_same_grid,
)
from spark3d.data.geometry import SourceGrid, crop_affine
from spark3d.data.sources import CaseSource
from spark3d.errors import DataError

GRID = SourceGrid((20, 18, 12), DEFAULT)


def refuses(code):
    return pytest.raises(DataError, match=f"^{code}: [^\n]*; expected [^\n]*; [^\n]+$")


def test_grids_that_agree_to_a_micrometre_pass():
    check_same_grid(GRID, SourceGrid(GRID.size, crop_affine(DEFAULT, (1e-4, 0, 0))), "case_1")


@pytest.mark.parametrize(
    ("other", "code"),
    [
        (SourceGrid((20, 18, 11), DEFAULT), "E-LABEL-SIZE"),
        (SourceGrid((18, 20, 12), DEFAULT), "E-LABEL-SIZE"),
        (SourceGrid(GRID.size, crop_affine(DEFAULT, (0, 0, 1))), "E-LABEL-AFFINE"),
        (SourceGrid(GRID.size, DEFAULT @ np.diag([-1.0, 1, 1, 1])), "E-LABEL-AFFINE"),
    ],
)
def test_a_label_on_another_grid_is_refused(other, code):
    with refuses(code) as caught:
        check_same_grid(GRID, other, "case_1")
    assert "case_1" in str(caught.value)


def test_classes_outside_the_declared_are_refused_and_named():
    label = np.array([0, 1, 2, 9, 11])
    assert check_label_values(label, "c") == (1, 2, 9, 11)
    with refuses("E-LABEL-RANGE") as caught:
        check_label_values(label, "c", known=(0, 1, 2))
    assert "9, 11" in str(caught.value)


def test_a_label_without_foreground_is_refused():
    with refuses("E-LABEL-EMPTY"):
        check_label_values(np.zeros(5, np.uint8), "c")


def test_declared_labels_with_a_gap_are_refused():
    check_label_names({"background": 0, "liver": 1, "tumour": 2}, "dataset.json")
    with refuses("E-LABEL-GAP"):
        check_label_names({"background": 0, "liver": 1, "tumour": 3}, "dataset.json")


def touch(folder, *names):
    for name in names:
        (folder / name).write_bytes(b"")
    return [folder / name for name in names]


def test_an_empty_list_is_refused(tmp_path):
    with refuses("E-NO-CASES"):
        check_cases([], tmp_path)


def test_two_cases_of_one_id_are_refused(tmp_path):
    one, two = touch(tmp_path, "a.nii", "b.nii")
    with refuses("E-DUPLICATE-ID"):
        check_cases([CaseSource("a", one), CaseSource("a", two)], tmp_path)


def test_a_label_that_is_the_image_is_refused(tmp_path):
    (one,) = touch(tmp_path, "a.nii")
    with refuses("E-LABEL-IS-IMAGE"):
        check_cases([CaseSource("a", one, label=one)], tmp_path)


def test_all_missing_files_are_listed_at_once(tmp_path):
    (one,) = touch(tmp_path, "a.nii")
    gone = [tmp_path / "x.nii", tmp_path / "y.nii"]
    cases = [CaseSource("a", one, gone[0]), CaseSource("b", gone[1])]
    with refuses("E-MISSING-FILE") as caught:
        check_cases(cases, tmp_path)
    assert "2 listed files" in str(caught.value)
    assert all(str(path) in str(caught.value) for path in gone)


@pytest.mark.parametrize("what", ["patient", "voxels"])
def test_a_key_on_both_sides_is_a_leak(what):
    check_apart({"a": "1"}, {"b": "2"}, ("training", "validation"), what)
    with refuses(f"E-LEAK-{what.upper()}") as caught:
        check_apart({"a": "1", "c": "3"}, {"b": "1"}, ("training", "validation"), what)
    assert "a = b" in str(caught.value)
