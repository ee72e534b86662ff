"""What lies in an evaluation file comes back, and tables say what the numbers say."""

import csv
import io
import json
import math

import pytest
from rich.console import Console

from spark3d.errors import DataError
from spark3d.evaluation.metrics import METRICS
from spark3d.evaluation.results import CaseScores, Evaluation, load_evaluation
from spark3d.evaluation.tables import (
    MEAN_ROW,
    compare,
    csv_table,
    markdown_table,
    rich_table,
    summary_table,
)


def run(name: str, dice: dict[str, tuple[float, float]]) -> Evaluation:
    """Cases with a spleen and a liver whose every score is the number given."""
    cases = tuple(
        CaseScores(
            case,
            {o: dict.fromkeys(METRICS, v) for o, v in zip(("spleen", "liver"), vs, strict=True)},
        )
        for case, vs in dice.items()
    )
    return Evaluation(name, {1: "spleen", 6: "liver"}, cases, {"tolerance_mm": 2.0})


SCRATCH = run("scratch", {"a": (0.5, 0.7), "b": (0.6, math.nan), "c": (0.4, 0.8)})
BETTER = run("pretrained", {"a": (0.6, 0.7), "b": (0.7, math.nan), "c": (0.6, 0.9)})


def test_an_evaluation_comes_back_from_its_file(tmp_path):
    (tmp_path / "evaluation.json").write_text(SCRATCH.to_json())
    back = load_evaluation(tmp_path)
    assert (back.name, back.labels, back.settings) == ("scratch", SCRATCH.labels, SCRATCH.settings)
    assert back.values("spleen", "dice") == {"a": 0.5, "b": 0.6, "c": 0.4}
    assert math.isnan(back.values("liver", "nsd")["b"])
    assert json.loads(SCRATCH.to_json())["cases"][1]["organs"]["liver"]["dice"] is None


def test_one_csv_line_per_case_and_organ():
    rows = list(csv.DictReader(io.StringIO(SCRATCH.to_csv())))
    assert len(rows) == 6
    assert rows[3] == {"case": "b", "organ": "liver", **dict.fromkeys(METRICS, "")}
    assert float(rows[4]["hd95_mm"]) == 0.4


def test_cases_are_ranked_by_their_mean_over_the_organs_they_have():
    assert SCRATCH.means("dice") == pytest.approx({"a": 0.6, "b": 0.6, "c": 0.6})
    assert run("x", {"a": (0.9, 0.5), "b": (0.1, 0.2), "c": (math.nan, 0.4)}).ranked() == [
        "b",
        "c",
        "a",
    ]


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"name": 1, "labels": {}, "cases": [3]}'])
def test_a_file_that_is_no_evaluation_is_refused(tmp_path, text):
    (tmp_path / "evaluation.json").write_text(text)
    with pytest.raises(DataError, match=r"evaluation\.json"):
        load_evaluation(tmp_path)
    with pytest.raises(DataError, match="no such evaluation"):
        load_evaluation(tmp_path / "elsewhere")


def test_the_comparison_pairs_cases():
    table = compare([SCRATCH, BETTER], "dice")
    assert [r.name for r in table.rows] == ["spleen", "liver", MEAN_ROW]
    spleen, liver, mean = table.rows
    assert spleen.cells[0].mean == pytest.approx(0.5)
    assert spleen.differences[0].mean == pytest.approx(0.4 / 3)
    assert (spleen.differences[0].positive, spleen.differences[0].pairs) == (3, 3)
    assert (liver.cells[0].cases, liver.differences[0].pairs) == (2, 2)
    assert mean.differences[0].mean == pytest.approx((0.05 + 0.1 + 0.15) / 3)


def test_only_organs_that_all_runs_have_are_compared():
    other = Evaluation("other", {6: "liver", 1: "stomach"}, SCRATCH.cases)
    assert [r.name for r in compare([SCRATCH, other], "dice").rows] == ["liver", MEAN_ROW]


def test_markdown_terminal_and_csv_hold_the_same_numbers():
    table = compare([SCRATCH, BETTER], "dice")
    lines = markdown_table(table).splitlines()
    assert lines[1] == "|---|---:|---:|---:|"
    assert all(line.count("|") == 5 for line in lines)
    assert lines[2].startswith("| spleen | 0.500 ± 0.100 | 0.633 ± 0.058 | +0.133 [")
    assert lines[2].endswith("3/3 |")
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(rich_table(table))
    console.print(summary_table(SCRATCH))
    text = console.export_text()
    assert "0.633 ± 0.058" in text
    assert "scratch: mean ± SD over 3 cases" in text
    rows = list(csv.DictReader(io.StringIO(csv_table([table]))))
    assert len(rows) == 6
    assert rows[0]["difference"] == ""
    assert float(rows[1]["difference"]) == pytest.approx(0.4 / 3, rel=1e-5)


def test_an_organ_that_is_never_scored_says_so():
    table = compare([run("x", {"a": (0.5, math.nan)})], "hd95_mm")
    lines = markdown_table(table).splitlines()
    assert lines[2] == "| spleen | 0.50 |"
    assert lines[3] == "| liver | n/a |"
