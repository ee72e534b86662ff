"""Measuring what a file of results lacks."""

import json
from pathlib import Path
from typing import Any

import pytest

from spark3d.commands.bench_results import Measurement, complete, load
from spark3d.errors import DataError


def answer(value: int) -> dict[str, Any]:
    return {"result": value, "machine": {"cpu": "test"}}


def test_each_result_is_in_the_file_before_the_next_begins(tmp_path: Path) -> None:
    out, seen = tmp_path / "deep" / "bench.json", []

    def second() -> dict[str, Any]:
        seen.append(json.loads(out.read_text())["results"])
        return answer(2)

    document = load(out, "machine", {})
    complete(out, document, [Measurement("a", lambda: answer(1)), Measurement("b", second, "case")])
    assert seen == [{"a": 1, "case": {}}]
    assert json.loads(out.read_text())["results"] == {"a": 1, "case": {"b": 2}}
    assert load(out, "machine", {})["machine"] == {"cpu": "test"}


def test_what_is_known_is_not_measured_again_and_a_failure_keeps_the_rest(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"

    def fail() -> dict[str, Any]:
        raise RuntimeError("no luck")

    first = [Measurement("a", lambda: answer(1), "x"), Measurement("b", fail, "x")]
    with pytest.raises(RuntimeError, match="no luck"):
        complete(out, load(out, "machine", {}), first)
    again = [Measurement("a", fail, "x"), Measurement("b", lambda: answer(2), "x")]
    complete(out, load(out, "machine", {}), again)
    assert json.loads(out.read_text())["results"] == {"x": {"a": 1, "b": 2}}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"cpu": "slow"}, "cpu fast, now slow"),
        ({"cores": 2}, "cores 64, now 2"),
        ({"torch": "2.1"}, "torch 2.0, now 2.1"),
    ],
)
def test_results_of_two_machines_do_not_get_into_one_file(
    tmp_path: Path, change: dict, said: str
) -> None:
    out, here = tmp_path / "bench.json", {"cpu": "fast", "cores": 64, "torch": "2.0"}
    first = Measurement("a", lambda: {"result": 1, "machine": here})
    complete(out, load(out, "machine", {}), [first])
    before = out.read_bytes()
    second = Measurement("b", lambda: {"result": 2, "machine": {**here, **change}})
    with pytest.raises(DataError, match=rf"is of another machine \({said}\): choose another file"):
        complete(out, load(out, "machine", {}), [first, second])
    assert out.read_bytes() == before


def test_time_that_is_up_names_what_comes_next(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bench.json"
    wanted = [
        Measurement("a", lambda: answer(1), "x"),
        Measurement("b", lambda: answer(2), "x", until=0.0),
        Measurement("c", lambda: answer(3), "x"),
    ]
    with caplog.at_level("WARNING"):
        complete(out, load(out, "machine", {}), wanted)
    assert json.loads(out.read_text())["results"] == {"x": {"a": 1}}
    assert "goes on with x: b" in caplog.text
    assert "measuring" in capsys.readouterr().err
