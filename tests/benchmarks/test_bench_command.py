"""`spark3d bench core`: what it measures, writes and takes up again."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from spark3d.benchmarks import meter
from spark3d.benchmarks.cases import Case, Job, curve_cases, jobs, main_cases
from spark3d.benchmarks.profile import group_of, profile_run
from spark3d.commands.bench import bench_core_command, in_a_process
from spark3d.errors import ConfigError, DataError, EnvironmentProblem
from spark3d.sparse.mask import CellMask, visible_count


def invented(job: Job, threads: int) -> dict[str, Any]:
    """Answers of the right form, at once."""
    names = job.case.contestants
    values: dict[str, Any] = {
        "peak": {"before": 1 << 20, "peak": 3 << 20},
        "saved": {n: {"activations": 2 << 20, "tables": 1 << 20} for n in names},
        "time": {
            "spread": {n: {"median": 4.0, "low": 3.0, "high": 5.0} for n in names},
            "ratios": {
                f"{n}/{names[-1]}": {"median": 2.5, "low": 2, "high": 3} for n in names[:-1]
            },
            "load": [0.5, 1.5],
        },
        "profile": {"phases": {"encoder": 0.5}, "operations": {"index tables": 0.25}},
    }
    return {"result": values[job.measure], "machine": {"threads": threads, "cpu": "test"}}


def test_table_and_json_of_a_whole_run(tmp_path: Path) -> None:
    out, console = tmp_path / "bench.json", Console(record=True, width=200)
    bench_core_command(out, quick=True, runner=invented, console=console)
    text = console.export_text()
    assert "p+official" in text
    assert "2.50 (2.00-3.00)" in text
    assert "2 + 1" in text
    document = json.loads(out.read_text())
    assert set(document["results"]) == {case.name for case in main_cases(quick=True)}
    keys = {"time", "saved", "peak: e0", "peak: e1", "peak: p"}
    assert set(document["results"][main_cases(quick=True)[0].name]) == keys


def test_curve_compares_with_the_visible_share_of_the_grid(tmp_path: Path) -> None:
    console = Console(record=True, width=200)
    bench_core_command(
        tmp_path / "curve.json", ["time", "saved"], curve=True, runner=invented, console=console
    )
    rows = [
        line for line in console.export_text().splitlines() if "96^3" in line and "0.75" in line
    ]
    assert len(rows) == 2
    assert all("7/27" in row and f"{27 / 7:.2f}" in row for row in rows)


def test_the_curve_is_drawn_and_printed_as_markdown(tmp_path: Path) -> None:
    out, console, figure = tmp_path / "c.json", Console(record=True, width=90), tmp_path / "c.svg"
    bench_core_command(
        out, ["time", "saved"], curve=True, figure=figure, markdown=True, runner=invented,
        console=console,
    )  # fmt: skip
    lines = [line for line in console.export_text().splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(curve_cases())
    assert {line.count("|") for line in lines} == {11}
    assert "| convnext_tiny | 160^3 | 0.9 |" in lines[-1]
    drawn = figure.read_text()
    for word in ("resnet50: time", "convnext_tiny: saved memory", "160³", "ideal"):
        assert word in drawn
    with pytest.raises(ConfigError, match=r"together with --curve"):
        bench_core_command(out, figure=figure, runner=invented)
    with pytest.raises(ConfigError, match=r"a file \.svg or \.png"):
        bench_core_command(out, ["time"], curve=True, figure=tmp_path / "c.pdf", runner=invented)


def test_profiles_of_a_case_stand_side_by_side(tmp_path: Path) -> None:
    console = Console(record=True, width=200)
    bench_core_command(
        tmp_path / "p.json", ["profile"], quick=True, markdown=True, runner=invented,
        console=console,
    )  # fmt: skip
    text = console.export_text()
    assert "| contestant |" not in text
    assert text.count("|  | e0 | e1 | p |") == 4
    assert "| index tables | 250.0 | 250.0 | 250.0 |" in text


@pytest.mark.parametrize("task", ["encoder", "step"])
def test_a_profile_adds_up(task: Any) -> None:
    name = "p" if task == "encoder" else "p+light"
    case = Case("quick_convnext", task, 64, 0.6, 1, (name,))
    found = profile_run(Job("profile", case, name, 0.0, (1, 1)))
    names = ("encoder", "densify", "decoder and loss", "top backward", "encoder backward")
    wanted = (*names, "optimiser") if task == "step" else ("encoder", "encoder backward")
    assert tuple(found["phases"]) == wanted
    assert all(seconds > 0 for seconds in found["phases"].values())
    spent = found["operations"]
    for group in ("index tables", "convolutions", "gathering", "norms"):
        assert spent[group] > 0
    assert (spent["optimiser"] > 0) == (task == "step")


def test_what_happens_while_tables_are_built_is_theirs() -> None:
    tables = SimpleNamespace(name="index tables", cpu_parent=None)
    assert group_of(SimpleNamespace(name="aten::sort", cpu_parent=tables)) == "index tables"
    for name, group in (
        ("aten::mkldnn_convolution", "convolutions"),
        ("aten::addmm", "matrix products"),
        ("aten::native_batch_norm", "norms"),
        ("aten::_embedding_bag", "gathering"),
        ("aten::gelu_backward", "activations"),
        ("aten::whatever", "other operations"),
    ):
        assert group_of(SimpleNamespace(name=name, cpu_parent=None)) == group


def test_a_second_call_measures_only_what_is_missing(tmp_path: Path) -> None:
    out, calls = tmp_path / "bench.json", []

    def count(job: Job, threads: int) -> dict[str, Any]:
        calls.append(job)
        return invented(job, threads)

    quiet = Console(quiet=True)
    bench_core_command(out, ["saved"], quick=True, runner=count, console=quiet)
    first = len(calls)
    bench_core_command(out, ["saved", "time"], quick=True, runner=count, console=quiet)
    assert first == len(main_cases(quick=True))
    assert [job.measure for job in calls[first:]] == ["time"] * first
    bench_core_command(out, ["peak"], quick=True, minutes=0.0, runner=count, console=quiet)
    assert len(calls) == 2 * first


def test_mistakes_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    with pytest.raises(ConfigError, match="choose from time, saved, peak"):
        bench_core_command(out, ["speed"], quick=True, runner=invented)
    out.write_text("{}")
    with pytest.raises(DataError, match="holds no results"):
        bench_core_command(out, quick=True, runner=invented)
    out.write_text(json.dumps({"machine": {"threads": 7}, "results": {}}))
    with pytest.raises(DataError, match="threads 7, now 2"):
        bench_core_command(out, quick=True, runner=invented)


def test_one_measurement_in_a_process_of_its_own() -> None:
    case = Case("quick_convnext", "encoder", 64, 0.6, 1, ("e0", "p"))
    answer = in_a_process(Job("time", case, seconds=0.0, rounds=(1, 2)), threads=1)
    assert answer["machine"]["wait_policy"] == "PASSIVE"
    assert answer["machine"]["threads"] == 1
    result = answer["result"]
    assert [len(taken) for taken in result["seconds"].values()] == [1, 1]
    ratio = result["seconds"]["e0"][0] / result["seconds"]["p"][0]
    assert result["ratios"]["e0/p"]["median"] == pytest.approx(ratio)
    assert result["agreement"]["e0"] < 1e-3


def test_a_failing_measurement_says_which(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job("saved", Case("resnet50", "encoder", 64, 0.6, 1, ("p",)))
    monkeypatch.setattr(sys, "executable", worker(tmp_path, "echo no room >&2; exit 1"))
    with pytest.raises(EnvironmentProblem, match=r"resnet50 .* \(saved\) failed: no room"):
        in_a_process(job, threads=1)


def test_a_process_killed_for_memory_is_a_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", worker(tmp_path, "kill -9 $$"))
    out, console = tmp_path / "bench.json", Console(record=True, width=250)
    bench_core_command(out, ["time"], quick=True, console=console)
    assert console.export_text().count("killed, most likely for lack of memory") == sum(
        len(case.contestants) for case in main_cases(quick=True)
    )


def worker(folder: Path, script: str) -> str:
    """A program that does `script` whatever it is asked."""
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_jobs_survive_json_and_the_noisy_measure_comes_last() -> None:
    todo = jobs(main_cases(), ["time", "peak", "saved"], 10.0, (2, 3))
    assert [Job.from_dict(json.loads(json.dumps(job.as_dict()))) for job in todo] == list(todo)
    assert [job.measure for job in todo] == sorted(
        (j.measure for j in todo), key=("saved", "peak", "time").index
    )
    names = [case.name for case in (*main_cases(), *main_cases(quick=True), *curve_cases())]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("case", [*main_cases(), *curve_cases()])
def test_bound_counts_visible_cells_as_masks_do(case: Case) -> None:
    assert case.visible == visible_count(case.cells, case.ratio)


def test_contestants_alternate_and_the_warm_up_does_not_count() -> None:
    order: list[str] = []

    def contestant(name: str) -> meter.Prepare:
        return lambda number: lambda: order.append(f"{name}{number}")

    taken = meter.alternate({n: contestant(n) for n in "ab"}, 1e9, (1, 2))
    assert order == ["a0", "b0", "b1", "a1", "a2", "b2"]
    assert [len(values) for values in taken.values()] == [2, 2]
    meter.alternate({n: contestant(n) for n in "ab"}, 1e9, (1, 1), warm=True)
    assert order[6:] == ["b1", "a1"]
    ratios = meter.paired_ratios({"a": [2.0, 9.0, 4.0], "b": [1.0, 3.0, 4.0]}, "b")
    assert ratios == {"a/b": {"median": 2.0, "low": 1.0, "high": 3.0}}


def test_saved_bytes_counts_each_storage_once_and_no_parameter() -> None:
    mask = CellMask(torch.tensor([[True, False]]), (4,))
    weight = torch.ones(1000, requires_grad=True)
    x = torch.ones(1000)

    def forward() -> torch.Tensor:
        return (weight * x).square() + weight * x[:10].sum() + weight * x

    assert meter.saved_bytes(forward, [weight], mask)["activations"] == 4000 + 4000 + 4
    assert meter.peak_memory() > 10**7
