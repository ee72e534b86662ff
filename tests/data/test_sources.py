"""The layouts people download, quirks included, become the right lists of cases."""

import contextlib
import json
import os
import re
import warnings

import numpy as np
import pytest
from datasets import decathlon
from hypothesis import example, given
from hypothesis import strategies as st
from nifti_files import write_nifti

from spark3d.data.sources import CaseSource, find, find_cases
from spark3d.errors import ConfigError, DataError


def touch(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def test_a_decathlon_task_with_its_quirks(tmp_path):
    found = find(decathlon(tmp_path / "t"))
    assert found.layout == "decathlon"
    assert found.modality == "CT"
    assert found.labels == {"background": 0, "liver": 1, "spleen": 2}
    sections = {c.id: c.section for c in found.cases}
    assert sections == {
        "pt_0": "training", "pt_1": "training", "pt_2": "training", "pt_3": "validation",
        "un_0": "unlabelled", "un_1": "unlabelled",
    }  # fmt: skip
    first = found.cases[0]
    assert first.label == tmp_path / "t" / "labelsTr" / "pt_0.nii.gz"
    assert not found.fourth_axis


def test_several_modalities_lie_on_the_fourth_axis(tmp_path):
    root = decathlon(tmp_path / "t")
    data = json.loads((root / "dataset.json").read_text())
    data["modality"] = {"0": "FLAIR", "1": "T1w"}
    (root / "dataset.json").write_text(json.dumps(data))
    assert find(root).fourth_axis
    assert find(root).modality == "MR"


@pytest.mark.parametrize("prefix", ["RawData", "Abdomen/RawData", "."])
def test_the_btcv_archive(tmp_path, prefix):
    root = tmp_path / prefix
    for n in (1, 21, 40):
        touch(root, f"Training/img/img{n:04d}.nii.gz", f"Training/label/label{n:04d}.nii.gz")
    touch(root, "Testing/img/img0061.nii.gz", "Training/img/.DS_Store")
    found = find(tmp_path)
    assert found.layout == "btcv"
    assert found.labels is not None
    assert len(found.labels) == 14
    assert [(c.id, c.section) for c in found.cases] == [
        ("img0001", "training"), ("img0021", "training"), ("img0040", "training"),
        ("img0061", "test"),
    ]  # fmt: skip
    assert found.cases[1].label == root / "Training/label/label0021.nii.gz"
    assert found.cases[3].label is None


def test_one_part_of_the_btcv_archive(tmp_path):
    touch(tmp_path, "img/img0001.nii.gz", "label/label0001.nii.gz")
    (case,) = find_cases(tmp_path)
    assert case.label == tmp_path / "label/label0001.nii.gz"


@pytest.mark.parametrize("prefix", [".", "Training", "RawData/Testing"])
@pytest.mark.parametrize(
    ("image", "label"), [("a", "a"), ("img_liver1", "label_liver1"), ("img12", "img12")]
)
def test_img_and_label_of_another_data_set_are_pairs_and_no_btcv(tmp_path, prefix, image, label):
    """No CT, no organs of BTCV: an MR would be rounded, and its labels refused or misnamed."""
    root = tmp_path / prefix
    touch(root, f"img/{image}.nii.gz", f"label/{label}.nii.gz")
    touch(root, "img/img0001.nii.gz", "label/label0001.nii.gz")
    found = find(tmp_path)
    assert (found.layout, found.modality, found.labels) == ("pairs", "auto", None)
    labels = {c.id: c.label for c in found.cases}
    assert labels[image] == root / f"label/{label}.nii.gz"
    assert labels["img0001"] == root / "label/label0001.nii.gz"


def test_a_pair_without_its_label_is_reported(tmp_path):
    touch(tmp_path, "img/a.nii", "img/b.nii", "label/a.nii")
    with pytest.raises(DataError, match=r"E-MISSING-FILE.*label/b\.nii;"):
        find_cases(tmp_path)


def test_an_nnunet_dataset_with_two_channels(tmp_path):
    touch(
        tmp_path,
        "imagesTr/case_7_0000.nii.gz", "imagesTr/case_7_0001.nii.gz", "labelsTr/case_7.nii.gz",
        "imagesTs/case_9_0000.nii.gz", "imagesTs/case_9_0001.nii.gz",
    )  # fmt: skip
    description = {
        "channel_names": {"0": "T1", "1": "T2"}, "labels": {"background": 0, "tumour": 1},
        "numTraining": 1, "file_ending": ".nii.gz",
    }  # fmt: skip
    (tmp_path / "dataset.json").write_text(json.dumps(description))
    found = find(tmp_path)
    assert found.layout == "nnunet"
    assert found.modality == "MR"
    assert found.labels == {"background": 0, "tumour": 1}
    seven, nine = found.cases
    assert [p.name for p in seven.images] == ["case_7_0000.nii.gz", "case_7_0001.nii.gz"]
    assert (seven.section, nine.section) == ("training", "test")


def test_cases_without_a_channel_are_named_by_what_may_be_shown(tmp_path):
    touch(tmp_path, "imagesTr/DOE JANE_0001.nii.gz", "imagesTr/case_7_0001.nii.gz")
    channels = {"channel_names": {"0": "CT", "1": "PET"}}
    (tmp_path / "dataset.json").write_text(json.dumps(channels))
    with pytest.raises(DataError, match=r"^E-CHANNELS: .*channels 0000, 0001: \*, case_7; "):
        find(tmp_path)


def test_images_and_labels_without_a_description(tmp_path):
    touch(tmp_path, "imagesTr/a.nii.gz", "imagesTr/b.nii.gz", "labelsTr/a.nii.gz")
    touch(tmp_path, "labelsTr/b.nii.gz")
    assert [c.label.name for c in find_cases(tmp_path)] == ["a.nii.gz", "b.nii.gz"]


def test_a_label_that_is_missing_is_reported(tmp_path):
    touch(tmp_path, "imagesTr/a.nii.gz", "imagesTr/b.nii.gz", "labelsTr/a.nii.gz")
    with pytest.raises(DataError, match=r"E-MISSING-FILE.*b\.nii\.gz"):
        find_cases(tmp_path)


def test_any_folder_is_searched_recursively_and_label_maps_are_listed(tmp_path):
    touch(
        tmp_path,
        "x/ct.nii.gz", "y z/ct.nii", "top.nii.gz", "notes.txt", "._top.nii.gz", ".cache/a.nii",
        "x/segmentations/liver.nii.gz", "labels/ct.nii.gz", "top_seg.nii.gz", "y z/ct-mask.nii",
    )  # fmt: skip
    found = find(tmp_path)
    hashed, *plain = (c.id for c in found.cases)
    assert plain == ["top", "x__ct"]
    assert hashed.startswith("case-"), "a name with a blank may be a patient's"
    assert found.renamed == 1
    assert all(c.section == "unlabelled" and c.group == c.id for c in found.cases)
    assert len(found.passed_over) == 4


@pytest.mark.parametrize(
    ("image", "label"),
    [
        ("case_00000/imaging.nii.gz", "case_00000/segmentation.nii.gz"),  # KiTS
        ("volume-0.nii", "segmentation-0.nii"),  # LiTS
        ("img0001.nii.gz", "label0001.nii.gz"),
        ("p1/ct.nii.gz", "p1/label.nii.gz"),
        ("p1/ct.nii.gz", "p1/Mask.nii.gz"),
        ("p1/ct.nii.gz", "p1/seg.nii.gz"),
        ("p1/ct.nii.gz", "p1/ct_mask_2.nii.gz"),
        ("sub-01_T1w.nii.gz", "sub-01_dseg.nii.gz"),  # BIDS
        ("masked_ct.nii.gz", "masks.nii.gz"),
        ("patient001_frame01.nii.gz", "patient001_frame01_gt.nii.gz"),  # ACDC
        ("Patient_01/Patient_01.nii.gz", "Patient_01/GT.nii.gz"),  # SegTHOR
        ("case_00000/imaging.nii.gz", "case_00000/kidney_instance-1_annotation-1.nii.gz"),
        ("case_00000/imaging.nii.gz", "case_00000/instances/kidney_1.nii.gz"),  # KiTS
        ("ct/a.nii.gz", "gt/a.nii.gz"),
        ("ct/a.nii.gz", "ground_truth/a.nii.gz"),
        ("ct/a.nii.gz", "ct/a-GroundTruth.nii.gz"),
        ("instance-1/lgt.nii.gz", "annotations/lgt.nii.gz"),
        ("segment1.nii.gz", "ct.segs.nii.gz"),
        ("unlabel.nii.gz", "un_label.nii.gz"),
    ],
)
def test_label_maps_of_plain_folders_are_known_by_their_names(tmp_path, image, label):
    touch(tmp_path, image, label)
    found = find(tmp_path)
    assert [c.image for c in found.cases] == [tmp_path / image]
    assert found.passed_over == (tmp_path / label,)


def test_a_folder_of_nothing_but_label_maps_says_so(tmp_path):
    touch(tmp_path, "label0001.nii", "label0002.nii")
    with pytest.raises(DataError, match=r"E-NO-CASES: .* but 2 files named as label maps"):
        find_cases(tmp_path)


def test_the_patient_is_found_in_the_id(tmp_path):
    touch(tmp_path, "p1_a.nii", "p1_b.nii", "p2_a.nii", "other.nii")
    groups = {c.id: c.group for c in find_cases(tmp_path, r"^(p\d+)_")}
    assert groups == {"p1_a": "p1", "p1_b": "p1", "p2_a": "p2", "other": "other"}
    cases = find_cases(tmp_path, r"^(p\d+)?")
    assert {c.id: c.group for c in cases} == groups
    assert {c.id for c in cases if not c.has_patient} == {"other"}


@pytest.mark.parametrize("pattern", [r"^p\d+", "(?:p)", "^"])
def test_a_pattern_without_a_group_is_refused(tmp_path, pattern):
    touch(tmp_path, "p1_a.nii")
    with pytest.raises(ConfigError, match=r"--group-pattern .* has no group: put the part"):
        find_cases(tmp_path, pattern)


@given(pattern=st.text("()[]{}?*+|^p1_9,\\", max_size=8))
@example(pattern="(")
@example(pattern="(a){99999999999}")
def test_any_pattern_is_taken_or_refused_in_one_line(tmp_path_factory, pattern):
    folder = tmp_path_factory.mktemp("patterns")
    touch(folder, "p1_a.nii")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what a set may mean some day
        try:
            groups = re.compile(pattern).groups
        except (re.error, OverflowError):
            groups = 0
        refused = pytest.raises(ConfigError, match="--group-pattern")
        with refused if pattern and not groups else contextlib.nullcontext():
            find_cases(folder, pattern)


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (lambda r: None, "E-NO-FOLDER"),
        (lambda r: touch(r, "readme.txt"), "E-NO-CASES"),
        (lambda r: touch(r, "a.nii", "a.nii.gz"), "E-DUPLICATE-ID"),
        (lambda r: describe(r, "not json"), "E-DATASET-JSON"),
        (lambda r: describe(r, "[1]"), "E-DATASET-JSON"),
        (lambda r: describe(r, '{"training": [{"label": "x"}]}'), "E-DATASET-JSON"),
        (lambda r: describe(r, '{"training": ["../../etc/a.nii"]}'), "E-DATASET-JSON"),
        (lambda r: describe(r, '{"training": ["/etc/a.nii"]}'), "E-DATASET-JSON"),
        (lambda r: describe(r, '{"labels": {"0": "bg", "2": "x"}}'), "E-LABEL-GAP"),
        (lambda r: describe(r, '{"labels": {"0": "bg"}, "training": []}'), "E-NO-CASES"),
        (lambda r: describe(r, '{"labels": {"a": "x"}, "training": []}'), "E-DATASET-JSON"),
        (lambda r: describe(r, '{"training": ["a.nii"]}'), "E-MISSING-FILE"),
    ],
)
def test_folders_that_are_no_data_set_are_refused(tmp_path, make, code):
    root = tmp_path / "d"
    make(root)
    with pytest.raises(DataError, match=f"^{code}: [^\n]*; expected [^\n]*; "):
        find_cases(root)


def describe(root, text):
    root.mkdir()
    (root / "dataset.json").write_text(text)


def test_a_link_that_leads_to_itself_is_reported(tmp_path):
    os.symlink(tmp_path / "a.nii", tmp_path / "a.nii")
    with pytest.raises(DataError, match="E-MISSING-FILE"):
        find_cases(tmp_path)


def test_a_case_is_its_own_patient_unless_told(tmp_path):
    path = write_nifti(tmp_path / "a.nii", np.zeros((3, 3, 3), np.int16))
    assert CaseSource("a", path).group == "a"
    assert CaseSource("a", path, group="p").group == "p"


@pytest.mark.realdata
def test_real_data_sets_are_found(real_data):
    kinds = {c.section: 0 for c in find_cases(real_data / "openkbp")}
    for case in find_cases(real_data / "openkbp"):
        kinds[case.section] += 1
    assert kinds == {"training": 97, "unlabelled": 124, "validation": 16}
    hippocampus = find(real_data / "msd_hippocampus")
    assert hippocampus.layout == "decathlon"
    assert len(hippocampus.cases) >= 195
    assert hippocampus.modality == "MR"
    assert {c.id for c in find_cases(real_data / "trunk_ct")} == {
        "cardiac_cta", "chest_ct_1p5mm", "example_ct", "example_ct_sm",
    }  # fmt: skip
