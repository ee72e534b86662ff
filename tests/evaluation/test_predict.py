"""The predict command: label maps in place on every file's own grid, restartable, never half."""

import gzip
import json
import os
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from known_scans import ball, odd_affine, write_nifti

from spark3d.commands.predict import predict_command
from spark3d.data.case import prepare_case
from spark3d.data.intensity import Window
from spark3d.errors import ConfigError, DataError, EnvironmentProblem
from spark3d.evaluation.metrics import dice_per_label

MODEL = Path("model.safetensors")


def read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    image = nib.load(path)
    return np.asarray(image.dataobj), image.affine


@pytest.mark.parametrize("class_map_gib", [4.0, 0.0])
def test_label_maps_lie_where_the_organs_are_in_the_axes_of_the_file(
    scans, segmenter, tmp_path, class_map_gib
):
    segmenter()
    out = predict_command(MODEL, scans, tmp_path / "out", max_class_map_gib=class_map_gib)
    assert sorted(f.name for f in out.glob("*.nii.gz")) == [f"case{n}.nii.gz" for n in range(3)]
    for n in range(3):
        labels, affine = read(out / f"case{n}.nii.gz")
        np.testing.assert_allclose(affine, odd_affine(), atol=1e-4)
        truth = ball(n)[1]
        dice = dice_per_label(labels, truth, [1, 2])
        assert min(dice.values()) > 0.93, dice
        for label in (1, 2):
            middles = [np.argwhere(m == label).mean(0) for m in (labels, truth)]
            np.testing.assert_allclose(*middles, atol=0.25)
    record = json.loads((out / "predict.json").read_text())
    assert record["labels"] == {"1": "ball", "2": "body"}
    moved = {entry["moved"] for entry in record["cases"].values()}
    assert moved == ({"probabilities"} if class_map_gib else {"labels"})


def test_a_second_call_redoes_only_what_is_absent_or_damaged(scans, segmenter, tmp_path):
    segmenter()
    out = predict_command(MODEL, scans, tmp_path / "out")
    whole = {f.name: f.read_bytes() for f in out.glob("*.nii.gz")}
    network = segmenter()
    predict_command(MODEL, scans, out)
    assert network.windows == 0
    (out / "case0.nii.gz").unlink()
    (out / "case1.nii.gz").write_bytes(whole["case1.nii.gz"][:-20])
    predict_command(MODEL, scans, out)
    assert network.windows > 0
    assert {f.name: f.read_bytes() for f in out.glob("*.nii.gz")} == whole


def test_an_image_that_changed_is_segmented_again(scans, segmenter, tmp_path):
    segmenter()
    out = predict_command(MODEL, scans, tmp_path / "out")
    before = {f.name: f.read_bytes() for f in out.glob("*.nii.gz")}
    image, truth = ball(7)
    file = write_nifti(scans / "imagesTr" / "case1_0000.nii.gz", image, odd_affine())
    os.utime(scans / "imagesTr" / "case0_0000.nii.gz")  # touched, not changed
    network = segmenter()
    predict_command(MODEL, scans, out)
    assert network.windows > 0
    changed = [name for name, old in before.items() if (out / name).read_bytes() != old]
    assert changed == ["case1.nii.gz"]
    assert min(dice_per_label(read(out / "case1.nii.gz")[0], truth, [1, 2]).values()) > 0.93
    text = (out / "predict.json").read_text()
    assert file.name not in text
    assert str(tmp_path) not in json.dumps(json.loads(text)["cases"])


def test_no_label_map_of_another_image_is_left(scans, segmenter, tmp_path):
    segmenter()
    out = predict_command(MODEL, scans, tmp_path / "out")
    file = scans / "imagesTr" / "case1_0000.nii.gz"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(DataError, match="1 of 3 volumes"):
        predict_command(MODEL, scans, out)
    assert sorted(f.name for f in out.glob("*.nii.gz")) == ["case0.nii.gz", "case2.nii.gz"]
    assert sorted(json.loads((out / "predict.json").read_text())["cases"]) == ["case0", "case2"]


def test_an_image_that_changes_while_it_is_read_gets_no_label_map(
    scans, segmenter, tmp_path, monkeypatch
):
    segmenter()

    def late(case, spec):
        prepared = prepare_case(case, spec)
        if case.id == "case1":
            os.utime(case.image, ns=(1, 1))
        return prepared

    monkeypatch.setattr("spark3d.commands.predict.prepare_case", late)
    with pytest.raises(DataError, match="E-CHANGED: case1"):
        predict_command(MODEL, scans, tmp_path / "out")
    names = sorted(f.name for f in (tmp_path / "out").glob("*.nii.gz"))
    assert names == ["case0.nii.gz", "case2.nii.gz"]


def test_a_folder_of_before_goes_on(scans, segmenter, tmp_path):
    segmenter()
    out = predict_command(MODEL, scans, tmp_path / "out")
    whole = {f.name: f.read_bytes() for f in out.glob("*.nii.gz")}
    record = json.loads((out / "predict.json").read_text())
    del record["settings"]["modality"]
    for entry in record["cases"].values():
        del entry["files"]
    (out / "predict.json").write_text(json.dumps(record))
    network = segmenter()
    predict_command(MODEL, scans, out)
    assert network.windows > 0
    assert {f.name: f.read_bytes() for f in out.glob("*.nii.gz")} == whole


def test_a_case_that_fails_is_named_and_the_others_are_done(scans, segmenter, tmp_path):
    segmenter()
    file = scans / "imagesTr" / "case1_0000.nii.gz"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(DataError, match=r"1 of 3 volumes .*case1_0000\.nii\.gz") as caught:
        predict_command(MODEL, scans, tmp_path / "out")
    assert "\n" not in str(caught.value)
    found = sorted(f.name for f in (tmp_path / "out").iterdir())
    assert found == ["case0.nii.gz", "case2.nii.gz", "predict.json"]


def test_one_file_or_one_section_can_be_predicted(scans, segmenter, tmp_path):
    segmenter()
    out = predict_command(MODEL, scans / "imagesTr" / "case2_0000.nii.gz", tmp_path / "one")
    assert [f.name for f in out.glob("*.nii.gz")] == ["case2_0000.nii.gz"]
    with pytest.raises(DataError, match="no section 'moon'"):
        predict_command(MODEL, scans, tmp_path / "two", section="moon")
    assert not (tmp_path / "two").exists()


def test_the_held_out_cases_of_the_run_can_be_asked_for(scans, segmenter, tmp_path):
    segmenter()
    model = tmp_path / "run" / "model.safetensors"
    with pytest.raises(ConfigError, match=r"no run\.json"):
        predict_command(model, scans, tmp_path / "out", held_out=True)
    model.parent.mkdir()
    record = {"kind": "finetune", "inputs": {"validation": ["case2", "case0"]}}
    (model.parent / "run.json").write_text(json.dumps(record))
    for given in (model, model.parent):
        out = predict_command(given, scans, tmp_path / f"of-{given.name}", held_out=True)
        assert sorted(f.name for f in out.glob("*.nii.gz")) == ["case0.nii.gz", "case2.nii.gz"]
        ledger = json.loads((out / "predict.json").read_text())
        assert ledger["held_out"] == ["case2", "case0"]
    record["inputs"]["validation"] = ["case7"]
    (model.parent / "run.json").write_text(json.dumps(record))
    with pytest.raises(DataError, match=r"no volume of 1 cases .*case7"):
        predict_command(model, scans, tmp_path / "absent", held_out=True)
    record["inputs"]["test"] = ["case1"]
    (model.parent / "run.json").write_text(json.dumps(record))
    out = predict_command(model, scans, tmp_path / "test", held_out=True)
    assert [f.name for f in out.glob("*.nii.gz")] == ["case1.nii.gz"]
    record["inputs"] = {"validation": []}
    (model.parent / "run.json").write_text(json.dumps(record))
    with pytest.raises(ConfigError, match="held no labelled case out"):
        predict_command(model, scans, tmp_path / "none", held_out=True)


def test_label_maps_inside_the_folder_of_volumes_are_not_volumes(scans, segmenter, tmp_path):
    segmenter()
    folder = scans / "imagesTr"
    out = predict_command(MODEL, folder, folder / "predictions")
    names = sorted(f.name for f in out.glob("*.nii.gz"))
    assert names == [f"case{n}_0000.nii.gz" for n in range(3)]
    predict_command(MODEL, folder, out)
    assert sorted(f.name for f in out.glob("*.nii.gz")) == names
    predict_command(MODEL, folder, folder / "again")
    assert sorted(f.name for f in (folder / "again").glob("*.nii.gz")) == names
    shutil.copytree(out, tmp_path / "alone" / "out")
    with pytest.raises(DataError, match="no volume but 3 files"):
        predict_command(MODEL, tmp_path / "alone", tmp_path / "new")


def test_the_modality_is_that_of_training_unless_told(scans, segmenter, tmp_path, monkeypatch):
    seen = []

    def note(case, spec):
        seen.append(spec.modality)
        return prepare_case(case, spec)

    monkeypatch.setattr("spark3d.commands.predict.prepare_case", note)
    file = scans / "imagesTr" / "case0_0000.nii.gz"
    for n, (card, told) in enumerate([("auto", None), ("CT", None), ("CT", "MR")]):
        segmenter(modality=card)
        predict_command(MODEL, file, tmp_path / str(n), modality=told)
    assert seen == ["auto", "CT", "MR"]


def test_another_model_or_setting_does_not_mix_in(scans, segmenter, tmp_path):
    segmenter()
    out = predict_command(MODEL, scans, tmp_path / "out")
    with pytest.raises(ConfigError, match="other settings"):
        predict_command(MODEL, scans, out, overlap=0.25)
    segmenter(sha256="1" * 64)
    with pytest.raises(ConfigError, match="other model_sha256"):
        predict_command(MODEL, scans, out)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="something else"):
        predict_command(MODEL, scans, tmp_path / "mine")


def test_flips_exchange_the_labels_of_left_and_right(scans, segmenter, tmp_path):
    network = segmenter()
    predict_command(MODEL, scans, tmp_path / "plain")
    plain = network.windows
    network = segmenter()
    predict_command(MODEL, scans, tmp_path / "flipped", flips=(1, 2))
    assert network.windows == 4 * plain
    for n in range(3):
        same = [read(tmp_path / kind / f"case{n}.nii.gz")[0] for kind in ("plain", "flipped")]
        np.testing.assert_array_equal(*same)
    segmenter(swap=((1, 2),))
    predict_command(MODEL, scans, tmp_path / "mirrored", flips=(0,))
    labels = read(tmp_path / "mirrored" / "case0.nii.gz")[0]
    assert 0 < (labels == 1).sum() != (ball(0)[1] == 1).sum()  # body and ball are averaged


def test_which_labels_a_mirror_exchanges_is_told(scans, segmenter, tmp_path, caplog):
    caplog.set_level("INFO")
    file = scans / "imagesTr" / "case0_0000.nii.gz"
    segmenter(labels={1: "eye_l", 2: "eye_r"})
    predict_command(MODEL, file, tmp_path / "sides", flips=(0,))
    assert "exchange eye_l and eye_r" in caplog.text
    assert "exchange no labels" not in caplog.text
    segmenter()
    predict_command(MODEL, file, tmp_path / "plain", flips=(1,))
    assert "exchange no labels" not in caplog.text
    predict_command(MODEL, file, tmp_path / "none", flips=(0,))
    assert "exchange no labels" in caplog.text


def test_empty_windows_are_left_out_where_the_window_tells_air(scans, segmenter, tmp_path):
    network = segmenter(crop=(8, 8, 8))
    predict_command(MODEL, scans, tmp_path / "all", skip_empty=False)
    every = network.windows
    network = segmenter(crop=(8, 8, 8))
    predict_command(MODEL, scans, tmp_path / "some")
    assert network.windows < every
    for n in range(3):
        maps = [read(tmp_path / kind / f"case{n}.nii.gz")[0] for kind in ("all", "some")]
        np.testing.assert_array_equal(*maps)
    network = segmenter(crop=(8, 8, 8), window=Window("zscore", mean=0.0, std=1.0))
    predict_command(MODEL, scans, tmp_path / "scored")
    assert network.windows == every


def test_a_network_that_finds_organs_in_nothing_is_not_asked(scans, segmenter, tmp_path):
    """As instance norms do: what they make of a constant window is up to their biases."""
    ball_everywhere = torch.tensor([0.0, 5.0, 0.0]).view(1, 3, 1, 1, 1)

    def invent(_: torch.nn.Module, args: tuple[torch.Tensor], logits: torch.Tensor) -> torch.Tensor:
        holds = args[0].amax((1, 2, 3, 4), keepdim=True) > 0
        return torch.where(holds, logits, ball_everywhere)

    segmenter(crop=(8, 8, 8)).register_forward_hook(invent)
    usual = predict_command(MODEL, scans, tmp_path / "usual")
    asked = predict_command(MODEL, scans, tmp_path / "asked", skip_empty=False)
    balls = [(read(out / "case0.nii.gz")[0] == 1).sum() for out in (usual, asked)]
    assert 0 < 2 * balls[0] < balls[1]


def test_a_volume_smaller_than_the_window_is_padded_as_crops_of_training_are(
    scans, segmenter, tmp_path
):
    network = segmenter(crop=(64, 64, 64), window=Window("zscore"))
    seen = []
    network.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    predict_command(MODEL, scans / "imagesTr" / "case0_0000.nii.gz", tmp_path / "out")
    (window,) = seen
    assert float(window[0, 0, 0, 0, 0]) < -1  # 0 would be the mean


@pytest.mark.parametrize(
    ("model", "options", "word"),
    [
        ({"crop": (32, 32)}, {"flips": (2,)}, "flip"),
        ({"window": Window("zscore", mean=0.0, std=1.0)}, {"skip_empty": True}, "unit window"),
        ({}, {"overlap": 1.0}, "overlap"),
        ({}, {"flips": (3,)}, "flip"),
    ],
)
def test_settings_that_make_no_sense_leave_nothing_behind(
    scans, segmenter, tmp_path, model, options, word
):
    segmenter(**model)
    with pytest.raises(ConfigError, match=word):
        predict_command(MODEL, scans, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_device_that_is_not_there_is_a_problem_of_the_environment(scans, segmenter, tmp_path):
    segmenter()
    with pytest.raises(EnvironmentProblem, match="no device 'cuda:9'"):
        predict_command(MODEL, scans, tmp_path / "out", device="cuda:9")


def test_a_folder_without_volumes_or_absent_is_told(segmenter, tmp_path):
    segmenter()
    with pytest.raises(DataError, match="no such folder"):
        predict_command(MODEL, tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="E-NO-CASES"):
        predict_command(MODEL, tmp_path / "empty", tmp_path / "out")


def test_a_file_that_is_no_nifti_is_told(segmenter, tmp_path):
    segmenter()
    file = tmp_path / "scan.nii.gz"
    file.write_bytes(gzip.compress(b"<html>not found</html>" * 40))
    with pytest.raises(DataError, match=r"scan\.nii\.gz"):
        predict_command(MODEL, file, tmp_path / "out")


def test_names_that_are_no_ids_do_not_reach_file_names(segmenter, tmp_path, monkeypatch):
    monkeypatch.setenv("SPARK3D_ID_KEY", "secret")
    segmenter()
    image, _ = ball()
    file = write_nifti(tmp_path / "Jane Doe 1970.nii.gz", image, odd_affine())
    out = predict_command(MODEL, file, tmp_path / "out")
    assert [f.name.startswith("case-") for f in out.glob("*.nii.gz")] == [True]


def test_a_saved_network_is_rebuilt_and_run(scans, tmp_path):
    from spark3d.build import backbone
    from spark3d.models.segmenter import build_segmenter
    from spark3d.weights.segmenters import ModelCard, save_model

    options = {
        "init_filters": 4,
        "blocks_down": [1, 1],
        "blocks_up": [1],
        "norm": ["group", {"num_groups": 2}],
    }
    net = build_segmenter(backbone("monai/segresnet", 3, 1, options, 3), 3)
    card = ModelCard(
        backbone={"name": "monai/segresnet", "ndim": 3, "in_channels": 1, "options": options},
        out_channels=3,
        labels={"1": "ball", "2": "body"},
        spacing_mm=(2.0, 2.0, 2.0),
        window={"mode": "unit", "low": 0.0, "high": 1000.0},
        crop=(16, 16, 16),
    )
    save_model(tmp_path / "model.safetensors", net.state_dict(), card)
    torch.manual_seed(1)
    file = scans / "imagesTr" / "case0_0000.nii.gz"
    out = predict_command(tmp_path, file, tmp_path / "out", device="cpu")
    labels, affine = read(out / "case0_0000.nii.gz")
    assert labels.shape == ball()[0].shape
    assert labels.max() <= 2
    np.testing.assert_allclose(affine, odd_affine(), atol=1e-4)
