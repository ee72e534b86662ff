"""The evaluate command: pairs by case id, refuses what cannot be compared, writes what it found."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from known_scans import ball, odd_affine, write_nifti
from PIL import Image
from rich.console import Console

from spark3d.commands import evaluate as evaluating
from spark3d.commands.evaluate import evaluate_command, ranks
from spark3d.commands.evaluate_pairs import find_pairs
from spark3d.commands.predict import predict_command
from spark3d.commands.predict_ledger import FILE as LEDGER
from spark3d.commands.report import report_command
from spark3d.errors import ConfigError, DataError
from spark3d.evaluation.results import CaseScores, Evaluation, load_evaluation


@pytest.fixture
def predictions(scans, tmp_path) -> Path:
    """Predictions worse from case to case: the references, moved by 0, 1 and 2 voxels."""
    folder = tmp_path / "predictions"
    for n in range(3):
        moved = np.roll(ball(n)[1], n, axis=0)
        write_nifti(folder / f"case{n}.nii.gz", moved, odd_affine())
    return folder


def silent() -> Console:
    return Console(quiet=True)


def test_scores_tables_and_pictures_are_written(scans, predictions, tmp_path):
    out = tmp_path / "scores"
    result = evaluate_command(predictions, scans, out, console=silent())
    back = load_evaluation(out)
    assert back.labels == {1: "label 1", 2: "label 2"}
    assert back.means("dice") == result.means("dice")
    assert result.cases[0].organs["label 1"]["dice"] == 1.0
    assert back.ranked() == ["case2", "case1", "case0"]
    assert back.settings["overlays"] == {"best": "case0", "median": "case1", "worst": "case2"}
    assert sorted(f.name for f in (out / "overlays").iterdir()) == [
        f"case{n}.{kind}" for n in range(3) for kind in ("json", "png")
    ]
    with Image.open(out / "overlays" / "case0.png") as picture:
        assert picture.width > 500
    assert (out / "evaluation.csv").read_text().count("\n") == 7


def test_distances_are_in_mm_along_the_moved_axis_of_the_file(scans, predictions, tmp_path):
    """Case 2 is moved by two voxels of 1 mm: no surface voxel is further away than 2 mm."""
    result = evaluate_command(predictions, scans, tmp_path / "s", console=silent())
    for scores in result.cases[2].organs.values():
        assert 1.0 <= scores["hd95_mm"] <= 2.0
        assert scores["nsd"] == 1.0
        assert scores["volume_error"] == 0.0
    tight = evaluate_command(predictions, scans, tmp_path / "t", tolerance_mm=0.5, console=silent())
    assert tight.cases[2].organs["label 1"]["nsd"] < 0.9


def test_predictions_of_the_command_carry_labels_and_images(scans, segmenter, tmp_path):
    segmenter()
    predict_command(Path("m"), scans, tmp_path / "p")
    result = evaluate_command(tmp_path / "p", scans / "labelsTr", tmp_path / "s", console=silent())
    assert list(result.labels.values()) == ["ball", "body"]
    assert min(result.means("dice").values()) > 0.93
    picture = np.asarray(Image.open(tmp_path / "s" / "overlays" / "case0.png").convert("RGB"))
    assert len(np.unique(picture)) > 50


def test_a_second_evaluation_replaces_the_first_one_and_nothing_else(scans, predictions, tmp_path):
    out = tmp_path / "scores"
    evaluate_command(predictions, scans, out, console=silent())
    evaluate_command(predictions, scans, out, name="again", console=silent())
    assert load_evaluation(out).name == "again"
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="something else"):
        evaluate_command(predictions, scans, other, console=silent())


def test_cases_without_a_partner_are_all_listed(scans, predictions, tmp_path):
    (predictions / "case0.nii.gz").rename(predictions / "caseX.nii.gz")
    (predictions / "case1.nii.gz").rename(predictions / "caseY.nii.gz")
    with pytest.raises(DataError, match=r"2 predictions .* no reference .*caseX, caseY"):
        evaluate_command(predictions, scans, tmp_path / "s", console=silent())
    for name in ("caseX", "caseY"):
        (predictions / f"{name}.nii.gz").unlink()
    with pytest.raises(DataError, match=r"2 references .* no prediction .*case0, case1"):
        evaluate_command(predictions, scans / "labelsTr", tmp_path / "s", console=silent())
    result = evaluate_command(
        predictions, scans / "labelsTr", tmp_path / "s", partial=True, console=silent()
    )
    assert [c.id for c in result.cases] == ["case2"]
    assert result.settings["unpredicted"] == ["case0", "case1"]


def test_two_grids_are_refused_by_case(scans, predictions, tmp_path):
    affine = odd_affine()
    affine[0, 3] += 0.5
    write_nifti(predictions / "case1.nii.gz", ball(1)[1], affine)
    with pytest.raises(DataError, match="E-EVAL-GRID: case1"):
        evaluate_command(predictions, scans, tmp_path / "s", console=silent())
    assert not (tmp_path / "s" / "evaluation.json").exists()


def test_labels_that_were_not_declared_are_refused(scans, predictions, tmp_path):
    labels = ball(2)[1]
    labels[0, 0, 0] = 7
    write_nifti(predictions / "case2.nii.gz", labels, odd_affine())
    with pytest.raises(DataError, match="case2: found the labels 7 in the prediction"):
        evaluate_command(predictions, scans, tmp_path / "s", console=silent())
    with pytest.raises(DataError, match="case0: found the labels 2 in the reference"):
        evaluate_command(predictions, scans, tmp_path / "s", labels={1: "x"}, console=silent())


def test_folders_that_hold_nothing_are_told(scans, predictions, tmp_path):
    with pytest.raises(DataError, match="no such folder of predictions"):
        evaluate_command(tmp_path / "no", scans, tmp_path / "s", console=silent())
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no NIfTI file in the folder of references"):
        evaluate_command(predictions, tmp_path / "empty", tmp_path / "s", console=silent())
    with pytest.raises(ConfigError, match="tolerance_mm"):
        evaluate_command(predictions, scans, tmp_path / "s", tolerance_mm=0, console=silent())


def test_only_the_sections_with_predictions_must_be_complete(tmp_path, predictions):
    """A dataset's training labels are not missed when its validation cases were predicted."""
    root = tmp_path / "task"
    entries = {"training": [], "validation": []}
    for n in range(3):
        image, labels = ball(n)
        write_nifti(root / "imagesTr" / f"case{n}.nii.gz", image, odd_affine())
        write_nifti(root / "labelsTr" / f"case{n}.nii.gz", labels, odd_affine())
        pair = {"image": f"./imagesTr/case{n}.nii.gz", "label": f"./labelsTr/case{n}.nii.gz"}
        entries["training" if n == 0 else "validation"].append(pair)
    labels = {"0": "background", "1": "ball", "2": "body"}
    (root / "dataset.json").write_text(
        json.dumps({"modality": {"0": "CT"}, "labels": labels, **entries})
    )
    (predictions / "case0.nii.gz").unlink()
    result = evaluate_command(predictions, root, tmp_path / "s", console=silent())
    assert [c.id for c in result.cases] == ["case1", "case2"]
    assert list(result.labels.values()) == ["ball", "body"]


def test_cases_of_training_are_refused_unless_allowed(scans, segmenter, tmp_path):
    segmenter()
    record = json.loads((predict_command(Path("m"), scans, tmp_path / "p") / LEDGER).read_text())
    assert not any(entry["trained_on"] for entry in record["cases"].values())
    of_case1 = record["cases"]["case1"]["content_hash"]
    segmenter(trained_on=(of_case1,), sha256="1" * 64)
    out = predict_command(Path("m"), scans, tmp_path / "q")
    with pytest.raises(DataError, match=r"1 of 3 predicted .* case1; .*--held-out") as caught:
        evaluate_command(out, scans, tmp_path / "s", console=silent())
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "s").exists()
    allowed = evaluate_command(out, scans, tmp_path / "s", console=silent(), allow_overlap=True)
    assert "case1" in allowed.settings["overlap"]["allowed"][0]
    page = report_command([tmp_path / "s"], tmp_path / "r.html").read_text("utf-8")
    assert "Scores are not those of unseen cases" in page


def test_of_held_out_cases_all_must_be_there_and_no_others(scans, segmenter, tmp_path):
    segmenter()
    run = tmp_path / "run"
    run.mkdir()
    held_out = {"kind": "finetune", "inputs": {"validation": ["case0", "case2"]}}
    (run / "run.json").write_text(json.dumps(held_out))
    out = predict_command(run, scans, tmp_path / "p", held_out=True)
    result = evaluate_command(out, scans, tmp_path / "s", console=silent())
    assert [c.id for c in result.cases] == ["case0", "case2"]
    (out / "case2.nii.gz").unlink()
    with pytest.raises(DataError, match=r"1 references .* have no prediction .*case2"):
        evaluate_command(out, scans, tmp_path / "s", console=silent())


def contradict(path: Path) -> None:
    """Give a file a qform that says something else than its sform."""
    image = nib.load(path)
    array, affine = np.asarray(image.dataobj), image.affine
    other = affine.copy()
    other[:3, 3] += 5
    changed = nib.Nifti1Image(array, affine)
    changed.header.set_xyzt_units("mm")
    changed.set_sform(affine, code=1)
    changed.set_qform(other, code=1)
    nib.save(changed, path)


def test_headers_are_trusted_as_the_prediction_did(scans, segmenter, tmp_path):
    for file in (*(scans / "imagesTr").iterdir(), *(scans / "labelsTr").iterdir()):
        contradict(file)
    segmenter()
    out = predict_command(Path("m"), scans, tmp_path / "p", geometry="sform")
    result = evaluate_command(out, scans, tmp_path / "s", console=silent())
    assert min(result.means("dice").values()) > 0.93
    picture = np.asarray(Image.open(tmp_path / "s" / "overlays" / "case0.png").convert("RGB"))
    assert len(np.unique(picture)) > 50
    (out / LEDGER).unlink()
    with pytest.raises(DataError, match="E-GEOMETRY"):
        evaluate_command(out, scans, tmp_path / "t", console=silent())
    told = evaluate_command(out, scans, tmp_path / "t", console=silent(), geometry="sform")
    assert told.means("dice") == result.means("dice")


def test_an_image_that_cannot_be_read_costs_its_picture_alone(scans, predictions, tmp_path, caplog):
    file = scans / "imagesTr" / "case0_0000.nii.gz"
    file.write_bytes(file.read_bytes()[:200])
    result = evaluate_command(
        predictions, scans / "labelsTr", tmp_path / "s", images=scans, console=silent()
    )
    assert len(result.cases) == 3
    assert "case0: its overlay has no image" in caplog.text
    assert (tmp_path / "s" / "overlays" / "case0.png").is_file()


def test_hidden_files_are_no_label_maps(scans, predictions, tmp_path):
    for folder in (predictions, scans / "labelsTr"):
        (folder / "._case0.nii.gz").write_bytes(b"of macOS")
    result = evaluate_command(predictions, scans / "labelsTr", tmp_path / "s", console=silent())
    assert len(result.cases) == 3


def test_one_case_is_the_best_and_nothing_else():
    scores = {"x": {"dice": 0.5}}
    assert ranks(Evaluation("a", {1: "x"}, (CaseScores("one", scores),))) == {"best": "one"}
    assert ranks(Evaluation("a", {1: "x"}, ())) == {}


def test_the_prediction_may_have_another_axis_order_than_the_reference(
    scans, predictions, tmp_path
):
    """Axis order is not a difference of grids as long as the voxels are the same ones: refused,
    since sizes then differ; the message says what to do."""
    image = nib.load(predictions / "case0.nii.gz")
    nib.save(nib.as_closest_canonical(image), predictions / "case0.nii.gz")
    with pytest.raises(DataError, match="predict from the image"):
        evaluate_command(predictions, scans, tmp_path / "s", console=silent())


def test_legacy_variants_are_printed_and_written_under_their_own_names(
    scans, predictions, tmp_path
):
    console = Console(record=True, width=120)
    evaluate_command(predictions, scans, tmp_path / "a", legacy=True, console=console)
    text = console.export_text()
    assert "Legacy variants" in text
    assert "with background, original grid" in text
    assert "no predict.json" in text
    head, *rows = (tmp_path / "a" / "legacy.csv").read_text().splitlines()
    assert head.count('"') == 6
    assert [row.split(",")[0] for row in rows] == ["case0", "case1", "case2"]
    (predictions / "predict.json").write_text(json.dumps({"spacing_mm": [2, 2, 2]}))
    evaluate_command(predictions, scans, tmp_path / "b", legacy=True, console=console)
    assert "with background, resampled grid" in console.export_text()


def test_every_organ_can_have_a_tolerance_of_its_own(scans, predictions, tmp_path):
    given = {"": 0.5, "label 1": 3.0}
    found = evaluate_command(
        predictions, scans, tmp_path / "a", tolerance_mm=given, console=silent()
    )
    assert found.cases[2].organs["label 1"]["nsd"] == 1.0
    assert found.cases[2].organs["label 2"]["nsd"] < 0.9
    assert found.settings["tolerance_mm"] == {"label 1": 3.0, "label 2": 0.5}
    for wrong, word in (({"": 1.0, "lung": 2.0}, "names lung"), ({"label 1": 2.0}, "for label 2")):
        with pytest.raises(ConfigError, match=word):
            evaluate_command(
                predictions, scans, tmp_path / "c", tolerance_mm=wrong, console=silent()
            )


def test_volumes_for_pictures_are_named_and_no_path_is_written(
    scans, predictions, tmp_path, monkeypatch
):
    """References of label maps alone have no volumes; `images` tells them, by id."""
    labels = tmp_path / "labels"
    for n in range(3):
        write_nifti(labels / f"case{n}.nii.gz", ball(n)[1], odd_affine())
        write_nifti(tmp_path / "volumes" / f"case{n}.nii.gz", ball(n)[0], odd_affine())
    monkeypatch.setattr("sys.argv", ["spark3d", "evaluate", "--references", str(labels)])
    seen = []
    monkeypatch.setattr(evaluating, "overlay", lambda image, *_: seen.append(image is not None))
    for images in (None, tmp_path / "volumes"):
        evaluate_command(
            predictions, labels, tmp_path / "s", images=images, console=Console(quiet=True)
        )
    assert seen == [False] * 3 + [True] * 3
    written = (tmp_path / "s" / "evaluation.json").read_text()
    assert str(tmp_path) not in written
    assert "evaluate --references REFERENCES" in written


def test_names_of_files_that_may_be_names_of_people_become_hashes(tmp_path):
    for folder in ("predictions", "labels"):
        write_nifti(tmp_path / folder / "Doe, Jane.nii.gz", ball()[1], odd_affine())
    pairs = find_pairs(tmp_path / "predictions", tmp_path / "labels", None, False)
    assert [pair.id.startswith("case-") for pair in pairs.cases] == [True]
    (tmp_path / "labels" / "Doe, Jane.nii.gz").rename(tmp_path / "labels" / "Roe, Jim.nii.gz")
    with pytest.raises(DataError, match="predictions in") as caught:
        find_pairs(tmp_path / "predictions", tmp_path / "labels", None, False)
    assert "Jane" not in str(caught.value)
    assert "Jim" not in str(caught.value)
