"""Records tell the command without any path; a path can be compared, not read."""

import sys
from pathlib import Path

import pytest

import spark3d
from spark3d.commands.command_line import place_mark, recorded_command, without_paths
from spark3d.config import FinetuneRecipe, load_recipe


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["pretrain", "spark_segresnet_3d", "optim.steps=9", "--data", "doe", "--out", "a/b"],
         "pretrain spark_segresnet_3d optim.steps=9 --data DATA --out OUT"),
        (["predict", "--data=/scans/doe", "--section", "test", "--flip", "0"],
         "predict --data=DATA --section test --flip 0"),
        (["label-efficiency", "--encoder", "mine=/x/doe", "--labels", "4,8"],
         "label-efficiency --encoder mine=ENCODER --labels 4,8"),
        (["label-efficiency", "--encoder", "/x/doe=1"], "label-efficiency --encoder ENCODER"),
        (["finetune", "model.backbone=monai/segresnet", "split.name=/x/doe.json"],
         "finetune model.backbone=monai/segresnet split.name=PATH"),
        (["finetune", "split.name=btcv-80-20", "~/doe.yaml"],
         "finetune split.name=btcv-80-20 PATH"),
        (["pretrain", "--dims", "3", "--allow-overlap"], "pretrain --dims 3 --allow-overlap"),
    ],
)  # fmt: skip
def test_paths_become_the_names_of_their_options(words: list[str], told: str) -> None:
    assert " ".join(recorded_command(words)) == f"spark3d {told}"


@pytest.mark.parametrize(
    ("started", "told"),
    [
        ("/usr/bin/spark3d", "spark3d --data DATA"),
        (str(Path(spark3d.__file__).parent / "cli.py"), "spark3d --data DATA"),
        ("/jane/doe/study.py", "python study.py --data DATA"),
        ("/jane/doe/Doe Jane.py", "python PATH --data DATA"),
    ],
)
def test_a_script_that_calls_a_command_is_told_as_one(
    started: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [started, "--data", "/jane/doe"])
    assert " ".join(recorded_command()) == told


def test_files_that_are_there_are_paths_whatever_they_look_like(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "jane").mkdir()
    (tmp_path / "jane" / "doe.yaml").write_text("")
    (tmp_path / "doe.json").write_text("{}")
    words = ["finetune", "jane/doe.yaml", "split.name=doe.json", "no/such"]
    assert recorded_command(words) == ["spark3d", "finetune", "PATH", "split.name=PATH", "no/such"]


def test_a_path_is_compared_by_a_salted_mark() -> None:
    one, other = Path("/scans/doe"), Path("/scans/roe")
    mark = place_mark(one)
    assert "doe" not in mark
    assert place_mark(one, mark) == mark
    assert place_mark(other, mark) != mark
    assert place_mark(one) != mark, "another salt"
    assert place_mark(one, "/scans/doe") == "/scans/doe", "as older runs noted it"
    assert place_mark(other, "/scans/doe") != "/scans/doe"


@pytest.mark.parametrize(
    ("given", "kept"),
    [("/scans/doe/mine.json", "mine.json"), ("/x/doe, jane.json", "PATH"), ("btcv-80-20",) * 2],
)
def test_recipes_in_records_hold_names_of_files_at_most(given: str, kept: str) -> None:
    asked = load_recipe(FinetuneRecipe, None, ["split.use=named", f"split.name={given}"])
    assert without_paths(asked).split.name == kept
