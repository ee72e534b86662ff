"""Prediction and scores that cannot be: one line, the exit code, nothing half-written."""

import json
import os
import shutil
import signal
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import Fails, snapshot, succeeds

from spark3d.evaluation import windows

DATA, STOPPED = 3, 75


@pytest.fixture
def predicted(volumes: Path, tmp_path: Path) -> Path:
    """Perfect predictions of the two validation cases."""
    folder = tmp_path / "predicted"
    folder.mkdir()
    for name in ("case2", "case3"):
        shutil.copy(volumes / "labelsTr" / f"{name}.nii.gz", folder)
    return folder


def evaluate(volumes: Path, predicted: Path, out: Path) -> list[str | Path]:
    return ["evaluate", "--predictions", predicted, "--references", volumes, "--out", out]


def test_predictions_and_references_that_do_not_pair(
    volumes: Path, predicted: Path, fails: Fails, out: Path
) -> None:
    (predicted / "case3.nii.gz").rename(predicted / "other.nii.gz")
    line = fails(DATA, *evaluate(volumes, predicted, out))
    assert "1 predictions in" in line
    assert "other" in line
    (predicted / "other.nii.gz").unlink()
    line = fails(DATA, *evaluate(volumes, predicted, out))
    assert "have no prediction" in line
    assert "case3" in line
    assert not out.exists()


@pytest.mark.parametrize("fault", ["label", "grid"])
def test_label_maps_that_cannot_be_compared(
    volumes: Path, predicted: Path, fails: Fails, out: Path, fault: str
) -> None:
    file = predicted / "case3.nii.gz"
    image = nib.load(file)
    labels = np.asarray(image.dataobj).copy()
    if fault == "label":
        labels[0, 0, 0] = 9
    else:
        labels = labels[:-1]
    nib.save(nib.Nifti1Image(labels, image.affine), file)
    line = fails(DATA, *evaluate(volumes, predicted, out))
    assert ("the labels 9 in the prediction" if fault == "label" else "E-EVAL-GRID: case3") in line
    assert not (out / "evaluation.json").exists()


def test_a_stopped_prediction_is_resumable_and_leaves_whole_maps_only(
    finetuned: Path, volumes: Path, fails: Fails, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["predict", "--model", finetuned, "--data", volumes, "--out", out]
    words += ["--section", "validation", "--device", "cpu"]
    real, seen = windows.mean_over_flips, []

    def interrupted(*given):
        seen.append(1)
        if (out / "case2.nii.gz").is_file():
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*given)

    with monkeypatch.context() as patch:
        patch.setattr(windows, "mean_over_flips", interrupted)
        line = fails(STOPPED, *words)
    assert "stopped with 1 of 2 cases done; the same command goes on" in line
    assert sorted(f.name for f in out.iterdir()) == ["case2.nii.gz", "predict.json"]
    before = snapshot(out)["case2.nii.gz"]
    first = len(seen)
    assert first > 1
    succeeds(*words)
    assert snapshot(out)["case2.nii.gz"] == before
    assert sorted(json.loads((out / "predict.json").read_text())["cases"]) == ["case2", "case3"]


def test_a_volume_smaller_than_the_window_is_padded_and_told(
    finetuned: Path, volumes: Path, tmp_path: Path, out: Path, caplog: pytest.LogCaptureFixture
) -> None:
    image = nib.load(volumes / "imagesTr" / "case2.nii.gz")
    part = np.asarray(image.dataobj)[10:30, 10:30, 10:15]
    nib.save(nib.Nifti1Image(part, image.affine), tmp_path / "thin.nii.gz")
    words = ["predict", "--model", finetuned, "--data", tmp_path / "thin.nii.gz"]
    succeeds(*words, "--device", "cpu", "--out", out)
    (told,) = [m for m in caplog.messages if "thin" in m]
    assert "fewer than the window 16x16x16 along an axis; padded" in told
    assert nib.load(out / "thin.nii.gz").shape == part.shape
