"""Label efficiency: fair pairs, resumable jobs, shares that add up, tables without overclaims."""

import csv
import json
from functools import partial
from pathlib import Path

import pytest
import torch
from rich.console import Console

from spark3d import build_finetuning
from spark3d.commands.label_efficiency import (
    Outcome,
    label_counts,
    label_efficiency_command,
    parse_shard,
    plan_jobs,
)
from spark3d.commands.label_jobs import Job
from spark3d.commands.label_jobs import Study as JobsOf
from spark3d.commands.label_starts import read_starts
from spark3d.commands.report import report_command
from spark3d.commands.splitting import SplitCases
from spark3d.config import FinetuneRecipe, load_recipe
from spark3d.errors import ConfigError, DataError
from spark3d.weights.exchange import load_encoder

TINY = (
    "compute.accelerator=cpu",
    "compute.threads=1",
    "compute.checkpoint_every=2",
    "log.tensorboard=false",
    "data.crop=16",
    "optim.batch=2",
    "optim.steps=2",
    "optim.warmup=1",
)


def study(data: Path, out: Path, pretrained: Path, **options) -> Outcome:
    given = {"labels": [1, "all"], "subsets": 2, "overrides": TINY, **options}
    return label_efficiency_command(
        data, out, [f"pre={pretrained}"], console=Console(quiet=True), **given
    )


@pytest.fixture(scope="module")
def finished(store: Path, pretrained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study on the store, with one count and two subsets: four jobs."""
    out = tmp_path_factory.mktemp("study") / "study"
    study(store, out, pretrained, labels=[1])
    return out


def lines(out: Path) -> list[dict]:
    return [json.loads(text) for text in (out / "results.jsonl").read_text().splitlines()]


def test_a_pair_differs_in_its_start_alone(finished: Path) -> None:
    found = {(line["arm"], line["subset"]): line for line in lines(finished)}
    assert set(found) == {(arm, s) for arm in ("scratch", "pre") for s in (0, 1)}
    for subset in (0, 1):
        one, other = (found[arm, subset]["identity"] for arm in ("scratch", "pre"))
        assert one.pop("encoder") is None
        assert len(other.pop("encoder")) == 64
        assert one == other
        recipes = [
            (finished / "jobs" / f"{arm}-n1-s{subset}" / "run" / "recipe.yaml").read_text()
            for arm in ("scratch", "pre")
        ]
        assert recipes[0] == recipes[1]
    assert found["pre", 0]["identity"]["train"] != found["pre", 1]["identity"]["train"]


def test_what_is_not_pre_trained_starts_from_the_same_numbers(
    finished: Path, pretrained: Path
) -> None:
    recipe = load_recipe(FinetuneRecipe, finished / "recipe.yaml")
    weights = load_encoder(pretrained / "encoder.safetensors")
    crops, nets = torch.rand(8, 1, 16, 16, 16), []
    for start in (None, weights):
        torch.manual_seed(5)
        nets.append(build_finetuning.segmenter(recipe, 4, start, lambda: crops))
    scratch, pre = (net.network for net in nets)
    report = nets[1].report
    assert report is not None
    assert report.untouched
    for key in report.untouched:
        torch.testing.assert_close(scratch.state_dict()[key], pre.state_dict()[key], rtol=0, atol=0)


def test_a_second_call_runs_nothing_and_keeps_every_number(
    finished: Path, store: Path, pretrained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (finished / "results.jsonl").read_bytes()
    monkeypatch.setattr("spark3d.commands.label_efficiency.run_job", lambda *_: 1 / 0)
    done = study(store, finished, pretrained, labels=[1])
    assert (done.done, done.jobs) == (4, 4)
    assert (finished / "results.jsonl").read_bytes() == before


def test_tables_curve_and_page_tell_the_paired_difference(finished: Path) -> None:
    with (finished / "label_efficiency.csv").open() as file:
        rows = [r for r in csv.DictReader(file) if r["metric"] == "dice"]
    total = {r["arm"]: r for r in rows if r["organ"] == "mean of organs"}
    means = {}
    for arm in ("scratch", "pre"):
        values = []
        for line in lines(finished):
            if line["arm"] == arm:
                cases = [
                    [s["dice"] for s in c["organs"].values() if s["dice"] is not None]
                    for c in line["cases"]
                ]
                values.append(sum(sum(c) / len(c) for c in cases) / len(cases))
        means[arm] = sum(values) / len(values)
        assert float(total[arm]["mean"]) == pytest.approx(means[arm], rel=1e-4)
    gain = means["pre"] - means["scratch"]
    assert float(total["pre"]["difference"]) == pytest.approx(gain, abs=1e-6)
    assert total["pre"]["pairs"] == "2"
    text = (finished / "label_efficiency.md").read_text()
    assert "Only 2 pairs" in text
    assert "under-trained" in text
    assert f"{gain:+.3f}" in text
    assert (finished / "curve.png").read_bytes()[:4] == b"\x89PNG"
    assert "<svg" in (finished / "curve.svg").read_text()
    page = (finished / "report.html").read_text()
    assert "Label efficiency" in page
    assert "pre minus scratch" in page


def test_volumes_are_prepared_once_and_scored_on_their_own_grid(
    volumes: Path, pretrained: Path, tmp_path: Path
) -> None:
    out = tmp_path / "study"
    study(volumes, out, pretrained, labels=["all"], subsets=1)
    found = lines(out)
    assert [line["labels"] for line in found] == [2, 2]
    assert {line["identity"]["grid"] for line in found} == {"original"}
    predicted = out / "jobs" / "scratch-n2-s0" / "predictions"
    assert sorted(f.name for f in predicted.glob("*.nii.gz")) == ["case2.nii.gz", "case3.nii.gz"]
    assert not (out / "jobs" / "scratch-n2-s0" / "run" / "checkpoints").exists()
    report_command([f"small={out}"], tmp_path / "page.html")
    assert "small: mean Dice over labels" in (tmp_path / "page.html").read_text()


def test_shares_add_up_and_the_last_one_writes_all(
    store: Path, pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = []

    def pretend(of, job):
        ran.append(job.key)
        of.folder(job).mkdir(parents=True)
        line = {"key": job.key, "arm": job.arm, "labels": job.labels, "subset": job.subset}
        scores = dict.fromkeys(("dice", "nsd", "hd95_mm", "asd_mm", "volume_error"), 0.5)
        cases = [{"id": "a", "organs": dict.fromkeys(of.labels.values(), scores)}]
        result = {**line, "identity": of.identity(job), "cases": cases}
        (of.folder(job) / "result.json").write_text(json.dumps(result))

    monkeypatch.setattr("spark3d.commands.label_efficiency.run_job", pretend)
    out = tmp_path / "study"
    first = study(store, out, pretrained, shard="1/3")
    assert 0 < first.done < first.jobs == 8
    assert "Not finished: 3 of 8 jobs" in (out / "label_efficiency.md").read_text()
    study(store, out, pretrained, shard="2/3")
    assert study(store, out, pretrained, shard="3/3").done == 8
    assert len(ran) == len(set(ran)) == 8
    assert "Not finished" not in (out / "label_efficiency.md").read_text()


def test_pre_training_seeds_of_one_name_take_turns(pretrained: Path, store: Path) -> None:
    starts = read_starts([f"a={pretrained}", f"a={pretrained}", f"b={pretrained}"], scratch=True)
    assert [(s.arm, len(s.encoders)) for s in starts] == [("scratch", 0), ("a", 2), ("b", 1)]
    from spark3d.data.store import Store

    records = Store.open(store).cases
    parts = SplitCases(tuple(r for r in records if r.section == "training"), ())
    recipe = FinetuneRecipe(seed=7)
    jobs = plan_jobs(starts, [1, 2], 2, recipe, parts)
    assert len(jobs) == len({j.key for j in jobs}) == 12
    assert {j.seed for j in jobs if j.subset == 1} == {8}
    for job in jobs:
        small = next(j for j in jobs if j.subset == job.subset and j.labels == 1)
        assert job.train[:1] == small.train


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"labels": [40]}, r"--labels 40: the split has 2 training cases; .* 1 to 2"),
        ({"labels": [0]}, "choose counts from 1 to 2"),
        ({"labels": []}, "choose counts"),
        ({"overrides": (*TINY, "split.labels=1")}, "use --labels"),
        ({"jobs": 0}, "1 or more"),
        ({"shard": "4/3"}, "i/n"),
        ({"rates": ["pr=0.1"]}, "--lr pr=0.1: write NAME=RATE .* scratch, pre"),
        ({"rates": ["pre=fast"]}, "a rate above 0"),
        ({"rates": ["pre=-1"]}, "a rate above 0"),
        ({"overrides": (*TINY, "model.backbone=monai/dynunet")}, "encoder is monai/segresnet"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(
    store: Path, pretrained: Path, out: Path, options, word
) -> None:
    with pytest.raises(ConfigError, match=word) as caught:
        study(store, out, pretrained, **options)
    assert "\n" not in str(caught.value)
    assert not out.exists()


def test_another_study_does_not_mix_in(
    finished: Path, store: Path, pretrained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"another study: optim\.lr"):
        study(store, finished, pretrained, labels=[1], overrides=(*TINY, "optim.lr=0.1"))
    with pytest.raises(ConfigError, match="job with another tolerance_mm"):
        study(store, finished, pretrained, labels=[1], tolerance_mm=3.0)
    with monkeypatch.context() as corrected:
        corrected.setattr("spark3d.data.store.Store.voxel_hash", lambda *_: "corrected")
        with pytest.raises(
            ConfigError, match="another state of its voxels or labels; choose a new folder"
        ):
            study(store, finished, pretrained, labels=[1])


def test_the_tolerance_is_that_of_the_recipe_unless_given(
    store: Path, pretrained: Path, tmp_path: Path
) -> None:
    changes = (*TINY, "score.tolerance_mm=3.5")
    options = {"labels": [1], "subsets": 1, "scratch": False, "overrides": changes}
    study(store, tmp_path / "a", pretrained, **options)
    assert lines(tmp_path / "a")[0]["identity"]["tolerance_mm"] == 3.5
    for wrong in (0.0, -1.0):
        with pytest.raises(ConfigError, match="must be above 0"):
            study(store, tmp_path / "b", pretrained, tolerance_mm=wrong, **options)
    assert not (tmp_path / "b").exists()


def test_starts_can_have_learning_rates_of_their_own(
    finished: Path, store: Path, pretrained: Path, tmp_path: Path
) -> None:
    out = tmp_path / "study"
    study(store, out, pretrained, labels=[1], subsets=1, rates=["pre=0.02"])
    usual = load_recipe(FinetuneRecipe, finished / "recipe.yaml").optim.lr
    rates = {
        arm: load_recipe(
            FinetuneRecipe, out / "jobs" / f"{arm}-n1-s0" / "run" / "recipe.yaml"
        ).optim.lr
        for arm in ("scratch", "pre")
    }
    assert rates == {"scratch": usual, "pre": 0.02}
    found = {line["arm"]: line for line in lines(out)}
    before = {line["arm"]: line for line in lines(finished) if line["subset"] == 0}
    assert found["scratch"]["cases"] == before["scratch"]["cases"]
    assert "Learning rates of their own: pre 0.02." in (out / "label_efficiency.md").read_text()
    page = (out / "report.html").read_text()
    assert "the start and its learning rate differ" in page
    assert "pre 0.02" in page
    with pytest.raises(ConfigError, match="job with another lr"):
        study(store, out, pretrained, labels=[1], subsets=1)


def test_results_scored_with_windows_of_air_are_not_mixed_in(
    store: Path, pretrained: Path, tmp_path: Path
) -> None:
    out, options = tmp_path / "study", {"labels": [1], "subsets": 1}
    study(store, out, pretrained, **options)
    usual = (out / "results.jsonl").read_text()
    file = out / "jobs" / "pre-n1-s0" / "result.json"
    line = json.loads(file.read_text())
    assert line["identity"].pop("skip_empty") is True  # older results do not have the key
    file.write_text(json.dumps(line))
    with pytest.raises(ConfigError, match=r"another skip_empty; .* remove result\.json") as caught:
        study(store, out, pretrained, **options)
    assert "\n" not in str(caught.value)

    trained = (file.parent / "run" / "model.safetensors").stat().st_mtime_ns
    file.unlink()
    assert study(store, out, pretrained, **options).done == 2
    assert (file.parent / "run" / "model.safetensors").stat().st_mtime_ns == trained

    def without_times(text: str) -> list[dict]:
        return [{**json.loads(one), "seconds": None} for one in text.splitlines()]

    assert without_times((out / "results.jsonl").read_text()) == without_times(usual)


def test_predictions_that_an_earlier_attempt_left_with_other_settings_are_made_again(
    volumes: Path, pretrained: Path, tmp_path: Path
) -> None:
    out, options = tmp_path / "study", {"labels": [1], "subsets": 1, "scratch": False}
    study(volumes, out, pretrained, **options)
    usual = lines(out)[0]["cases"]
    folder = out / "jobs" / "pre-n1-s0"
    (folder / "result.json").unlink()
    ledger = folder / "predictions" / "predict.json"
    record = json.loads(ledger.read_text())
    record["settings"]["skip_empty"] = False
    ledger.write_text(json.dumps(record))
    study(volumes, out, pretrained, **options)
    assert json.loads(ledger.read_text())["settings"]["skip_empty"] is True
    assert lines(out)[0]["cases"] == usual


def test_results_of_small_volumes_padded_as_before_are_not_mixed_in(tmp_path: Path) -> None:
    job = Job("scratch", None, None, 1, 0, 0, ("a",), 0)
    make = partial(
        JobsOf, tmp_path, tmp_path, None, tmp_path / "recipe.yaml", "digest", ("b",),
        {"a": "1", "b": "2"}, {1: "liver"}, 2.0, 0.5,
    )  # fmt: skip
    small, large = (make(skip_empty=False, padded=p, allow_overlap=False) for p in (True, False))
    identity = {k: v for k, v in large.identity(job).items() if k != "padding"}
    large.folder(job).mkdir(parents=True)
    (large.folder(job) / "result.json").write_text(json.dumps({"identity": identity}))
    assert large.is_done(job)
    with pytest.raises(ConfigError, match=r"another padding; .* remove result\.json"):
        small.is_done(job)


def test_results_without_rates_and_hashes_of_the_data_still_count(
    finished: Path, store: Path, pretrained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in finished.glob("jobs/*/result.json"):
        line = json.loads(file.read_text())
        del line["identity"]["lr"], line["identity"]["data"]
        file.write_text(json.dumps(line))
    monkeypatch.setattr("spark3d.commands.label_efficiency.run_job", lambda *_: 1 / 0)
    assert study(store, finished, pretrained, labels=[1]).done == 4


def test_a_start_alone_gives_a_curve_without_comparisons(store: Path, tmp_path: Path) -> None:
    out = tmp_path / "study"
    label_efficiency_command(
        store, out, [], [1, 2], subsets=1, overrides=TINY, console=Console(quiet=True)
    )
    assert [(line["arm"], line["labels"]) for line in lines(out)] == [
        ("scratch", 1),
        ("scratch", 2),
    ]
    text = (out / "label_efficiency.md").read_text()
    assert "minus" not in text
    assert "pairs" not in text
    page = (out / "report.html").read_text()
    assert "In a pair" not in page
    assert "no pair is finished" not in page
    assert "scratch: mean Dice" in page


def test_shares_of_volumes_need_them_prepared(volumes: Path, pretrained: Path, out: Path) -> None:
    with pytest.raises(ConfigError, match="first run spark3d prepare"):
        study(volumes, out, pretrained, shard="1/2")
    assert not out.exists()


def test_there_must_be_something_to_start_from(pretrained: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing to start from"):
        read_starts([], scratch=False)
    with pytest.raises(ConfigError, match="the name 'scratch'"):
        read_starts([f"scratch={pretrained}"], scratch=True)
    with pytest.raises(DataError, match=r"encoder\.safetensors not found"):
        read_starts([f"a={tmp_path}"], scratch=True)


def test_small_parts() -> None:
    assert label_counts([8, "all", 4, 8], 20) == [4, 8, 20]
    assert parse_shard("2/8") == (2, 8)
    assert parse_shard(None) is None


def test_the_command_line_runs_it(store: Path, finished: Path, pretrained: Path, fails) -> None:
    said = fails(
        2, "label-efficiency", *TINY, "--data", store, "--encoder", f"pre={pretrained}",
        "--labels", "1,40", "--out", finished,
    )  # fmt: skip
    assert "--labels 40: the split has 2 training cases" in said


@pytest.mark.slow
def test_two_jobs_at_once_give_what_one_after_the_other_gives(
    store: Path, pretrained: Path, finished: Path, tmp_path: Path
) -> None:
    out = tmp_path / "study"
    study(store, out, pretrained, labels=[1], jobs=2)
    kept = ("key", "identity", "cases")
    both = [{line["key"]: [line[k] for k in kept] for line in lines(of)} for of in (out, finished)]
    assert both[0] == both[1]
    assert "fine-tuning" in (out / "jobs" / "pre-n1-s0" / "log.txt").read_text()
