"""From unlabelled volumes to scores and a page, by the functions behind the commands."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from conftest import FINETUNE, ORGANS, SCRATCH
from rich.console import Console
from safetensors.torch import load_file

from spark3d import build
from spark3d.commands.command_line import place_mark
from spark3d.commands.evaluate import evaluate_command
from spark3d.commands.finetune import Finetuned, finetune_command
from spark3d.commands.predict import predict_command
from spark3d.commands.report import report_command
from spark3d.config import FinetuneRecipe, PretrainRecipe, load_recipe
from spark3d.data.store import Store
from spark3d.engine.logging import read_metrics
from spark3d.models.backbones import build_backbone
from spark3d.weights.exchange import file_sha256, load_encoder, load_into
from spark3d.weights.segmenters import load_model

QUIET = Console(quiet=True)
VALIDATION = ("case2", "case3")


@dataclass(frozen=True)
class Scored:
    """The two arms of a comparison and the page about them."""

    runs: dict[str, Path]
    predictions: dict[str, Path]
    scores: dict[str, Path]
    page: Path


@pytest.fixture(scope="module")
def scored(
    store: Path,
    volumes: Path,
    pretrained: Path,
    tuned: Finetuned,
    tmp_path_factory: pytest.TempPathFactory,
) -> Scored:
    """Predictions and scores from the encoder and from scratch, with a report."""
    work = tmp_path_factory.mktemp("scored")
    scratch = finetune_command(store, work / "scratch", None, None, (*FINETUNE, *SCRATCH))
    runs = {"scratch": scratch.model.parent, "pre-trained": tuned.model.parent}
    predictions, scores = {}, {}
    for arm, run in runs.items():
        predictions[arm] = predict_command(
            run, volumes, work / f"{arm}-predictions", overlap=0.0, section="validation",
            console=QUIET,
        )  # fmt: skip
        scores[arm] = work / f"{arm}-scores"
        evaluate_command(predictions[arm], volumes, scores[arm], arm, partial=True, console=QUIET)
    named = [f"pretrain={pretrained}", *(f"{arm}={run}" for arm, run in runs.items())]
    named += [f"{arm}={folder}" for arm, folder in scores.items()]
    return Scored(runs, predictions, scores, report_command(named, work / "report.html"))


def test_the_encoder_has_a_passport(store: Path, pretrained: Path) -> None:
    state, passport = load_encoder(pretrained / "encoder.safetensors")
    cases = {r.id: r for r in Store.open(store).cases}
    assert passport.backbone == "monai/segresnet"
    assert (passport.ndim, passport.in_channels, passport.axes) == (3, 1, "RAS")
    assert passport.spacing_mm == (7.0, 8.0, 10.0)
    assert (passport.intensity["low"], passport.intensity["high"]) == (-175.0, 250.0)
    assert (passport.objective, passport.steps) == ("spark", 10)
    seen = {cases[name].content_hash for name in ("case0", "case1", "extra0", "extra1", "extra2")}
    assert set(passport.content_hashes) == seen  # and none of the validation cases
    assert passport.sha256 == file_sha256(pretrained / "encoder.safetensors")
    assert passport.recipe["mask"]["cell_size"] == 8

    net = build_backbone(passport.backbone, 3, 1, **passport.options)
    assert set(state) == set(net.encoder_keys)
    report = load_into(net.network, state, passport=passport, backbone="monai/segresnet")
    assert report.coverage == 1
    assert not report.missing
    assert not report.unused
    assert all(torch.isfinite(value).all() for value in state.values())


def test_a_run_folder_tells_what_ran(store: Path, pretrained: Path) -> None:
    record = json.loads((pretrained / "run.json").read_text())
    assert record["kind"] == "pretrain"
    assert record["source"] == place_mark(store.resolve(), record["source"])
    assert str(store.parent) not in json.dumps(record)
    assert {"spark3d", "torch", "monai", "python"} <= record["versions"].keys()
    assert record["seconds"] > 0
    recipe = load_recipe(PretrainRecipe, pretrained / "recipe.yaml")
    assert recipe.data.crop == 16
    assert recipe.data.spacing_mm == (7.0, 8.0, 10.0)
    assert recipe.data.window != "auto"
    lines = read_metrics(pretrained / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 11))
    assert {"loss", "lr", "grad_norm", "seconds", "voxels", "skipped"} <= lines[0].keys()
    panels = sorted(file.name for file in (pretrained / "panels").iterdir())
    assert panels == ["step_000001.png", "step_000010.png"]
    kept = sorted(file.name for file in (pretrained / "checkpoints").glob("*.pt"))
    assert kept == ["step_00000008.pt", "step_00000010.pt"]


def test_the_model_starts_from_the_encoder_and_says_so(
    store: Path, pretrained: Path, scored: Scored
) -> None:
    state, card = load_model(scored.runs["pre-trained"])
    _, scratch = load_model(scored.runs["scratch"])
    _, passport = load_encoder(pretrained / "encoder.safetensors")
    assert card.labels == {str(n): organ for n, organ in enumerate(ORGANS, start=1)}
    assert card.out_channels == 4
    assert tuple(card.crop) == (16, 16, 16)
    assert tuple(card.spacing_mm) == (7.0, 8.0, 10.0)
    assert card.window == passport.intensity == scratch.window
    assert (card.encoder, scratch.encoder) == (passport.sha256, "")
    assert tuple(card.pretrained_on) == passport.content_hashes
    by_id = {r.id: r.content_hash for r in Store.open(store).cases}
    assert set(card.trained_on) == {by_id["case0"], by_id["case1"]}
    loaded = build.load_segmenter(scored.runs["pre-trained"])
    assert loaded.network.state_dict().keys() == state.keys()
    recipe = load_recipe(FinetuneRecipe, scored.runs["pre-trained"] / "recipe.yaml")
    assert recipe.model.backbone == passport.backbone


def test_loading_is_reported(
    store: Path, pretrained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    short = ("optim.steps=1", "optim.warmup=0", "split.labels=1")
    with caplog.at_level("INFO"):
        finetune_command(store, tmp_path, pretrained, None, (*FINETUNE, *short))
    count = len(load_file(pretrained / "encoder.safetensors"))
    said = f"encoder weights: {count} matched, 0 reshaped, 0 missing, 0 unused (100.0% of the"
    assert said in caplog.text
    assert "data.spacing_mm=(7.0, 8.0, 10.0): as the encoder was pre-trained" in caplog.text
    assert "1 training and 2 validation cases" in caplog.text


def test_both_arms_see_the_same_crops_and_differ_by_their_start_alone(scored: Scored) -> None:
    recipes = [
        load_recipe(FinetuneRecipe, run / "recipe.yaml").model_dump()
        for run in scored.runs.values()
    ]
    assert recipes[0] == recipes[1]
    losses = [read_metrics(run / "metrics.jsonl")[0]["loss"] for run in scored.runs.values()]
    assert losses[0] != losses[1]


def test_validation_is_logged_and_returned(tuned: Finetuned) -> None:
    lines = [
        line for line in read_metrics(tuned.model.parent / "metrics.jsonl") if line["kind"] == "val"
    ]
    assert [line["step"] for line in lines] == [8]
    assert tuple(tuned.validation) == VALIDATION
    livers = [row[1] for row in tuned.validation.values()]
    assert lines[0]["dice liver"] == pytest.approx(np.mean(livers))
    assert all(0 <= dice <= 1 for dice in livers)


def test_label_maps_lie_on_the_source_grid(volumes: Path, scored: Scored) -> None:
    for folder in scored.predictions.values():
        assert sorted(file.name for file in folder.glob("*.nii.gz")) == [
            f"{case}.nii.gz" for case in VALIDATION
        ]
        for case in VALIDATION:
            predicted = nibabel.load(folder / f"{case}.nii.gz")
            source = nibabel.load(volumes / "imagesTr" / f"{case}.nii.gz")
            assert predicted.shape == source.shape
            np.testing.assert_allclose(predicted.affine, source.affine, atol=1e-4)
            values = np.asarray(predicted.dataobj)
            assert values.dtype.kind in "iu"
            assert set(np.unique(values)) <= set(range(4))
    record = json.loads((scored.predictions["scratch"] / "predict.json").read_text())
    assert set(record["cases"]) == set(VALIDATION)


def test_scores_are_per_case_and_organ(volumes: Path, scored: Scored) -> None:
    found = json.loads((scored.scores["pre-trained"] / "evaluation.json").read_text())
    assert found["name"] == "pre-trained"
    assert [case["id"] for case in found["cases"]] == list(VALIDATION)
    case = found["cases"][0]
    assert set(case["organs"]) == set(ORGANS)
    assert set(case["organs"]["liver"]) == {"dice", "nsd", "hd95_mm", "asd_mm", "volume_error"}
    reference = np.asarray(nibabel.load(volumes / "labelsTr" / "case2.nii.gz").dataobj) == 1
    file = scored.predictions["pre-trained"] / "case2.nii.gz"
    predicted = np.asarray(nibabel.load(file).dataobj) == 1
    dice = 2 * (reference & predicted).sum() / (reference.sum() + predicted.sum())
    assert case["organs"]["liver"]["dice"] == pytest.approx(dice)
    assert (scored.scores["pre-trained"] / "evaluation.csv").is_file()
    assert list((scored.scores["pre-trained"] / "overlays").glob("case*.png"))


def test_the_page_is_self_contained_and_names_all_that_ran(scored: Scored) -> None:
    page = scored.page.read_text(encoding="utf-8")
    for word in ("scratch", "pre-trained", "pretrain", *ORGANS):
        assert word in page
    assert "data:image/png;base64," in page
    links = re.findall(r"""(?:src|href)\s*=\s*["']([^"'#][^"']*)["']""", page)
    assert all(link.startswith("data:") for link in links), links
