"""A probe says how the encoder does, and leaves the pre-training as it is, bit for bit."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import PRETRAIN, Fails
from test_resume import assert_same_pretraining

from spark3d.commands import probing
from spark3d.commands.pretrain import pretrain_command
from spark3d.commands.report import report_command
from spark3d.data.store import Store
from spark3d.engine.logging import read_metrics

LOOKS = ("probe.every=4", "probe.steps=5", "probe.crops=2", "probe.cases=1")


def looks(run: Path) -> list[dict]:
    return [line for line in read_metrics(run / "metrics.jsonl") if line["kind"] == "probe"]


def test_a_probe_changes_nothing_and_is_in_the_report(
    store: Path, pretrained: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    pretrain_command(store, run, None, (*PRETRAIN, *LOOKS, f"probe.data={store}"))
    assert_same_pretraining(run, pretrained)
    assert [line["step"] for line in looks(run)] == [4, 8, 10]
    for line in looks(run):
        assert 0 <= line["dice"] <= 1
        assert 0 <= line["dice liver"] <= 1
        assert all(1 <= line[f"rank {stage}"] <= 32 for stage in range(3))
        assert all(line[f"std {stage}"] > 0 for stage in range(3))
    text = report_command([str(run)], tmp_path / "report.html").read_text()
    assert "Dice of a linear probe" in text
    assert "effective rank of the stages" in text


def test_figures_need_no_labels(store: Path, pretrained: Path, tmp_path: Path) -> None:
    pretrain_command(store, tmp_path / "run", None, (*PRETRAIN, "probe.every=10"))
    assert_same_pretraining(tmp_path / "run", pretrained)
    (line,) = looks(tmp_path / "run")
    assert "dice" not in line
    assert line["rank 2"] >= 1


def test_probe_data_that_cannot_be_read_are_refused(
    store: Path, volumes: Path, out: Path, fails: Fails
) -> None:
    words = ("pretrain", *PRETRAIN, *LOOKS, f"probe.data={volumes}", "--data", store, "--out", out)
    assert "must be a prepared store of labelled volumes" in fails(2, *words)
    words = ("pretrain", *PRETRAIN, f"probe.data={store}", "--data", store, "--out", out)
    assert "is never looked at with probe.every=0; set probe.every" in fails(2, *words)
    assert not out.exists()


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        ({"channels": 2}, 2, "has volumes of [2] channels, the run those of 1"),
        ({"labels": (0,)}, 3, "has labels without any class"),
        ({"labels": None}, 3, "has 0 labelled cases"),
    ],
)
def test_a_probe_store_of_other_volumes_is_refused_before_the_run(
    store: Path, out: Path, fails: Fails, monkeypatch: pytest.MonkeyPatch,
    change: dict, code: int, said: str,
) -> None:  # fmt: skip
    opened = Store.open

    def other(folder: Path) -> Store:
        there: Any = opened(folder)
        there.cases = tuple(replace(record, **change) for record in there.cases)
        return there

    monkeypatch.setattr(probing, "Store", SimpleNamespace(open=other))
    words = ("pretrain", *PRETRAIN, *LOOKS, f"probe.data={store}", "--data", store, "--out", out)
    assert said in fails(code, *words)
    assert not out.exists()
