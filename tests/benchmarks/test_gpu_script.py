"""`benchmarks/gpu.py`: runs for real on the CPU, goes on where it stopped; its checks on a GPU."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from spark3d.benchmarks import device_checks, device_speed
from spark3d.benchmarks.core import Contestant
from spark3d.benchmarks.device import Setup
from spark3d.benchmarks.device_tables import markdown
from spark3d.sparse import packed
from spark3d.sparse.gather import Table

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"
QUICK = ("--device", "cpu", "--quick", "--networks", "convnext_tiny")
TINY = Setup("quick_convnext", "cpu", "float64", 64, 1, 0.0, (1, 1))


@pytest.fixture
def gpu() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_its_cpu_path_runs_and_writes_both_files(gpu: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    words = (*QUICK, "--out", str(out), "--precisions", "float32")
    assert gpu.main([*words, "--parts", "waiting,accuracy,strategies"]) == 0
    document = json.loads(out.read_text())
    found = document["results"]["quick_convnext float32"]
    assert document["machine"]["device"] == "cpu"
    assert found["waiting"] == {"on": "meta", "holds": True}
    assert found["accuracy"]["holds"]
    kinds = found["strategies"]["convolutions"]
    assert sum(kind["layers"] for kind in kinds) == 8
    assert all(kind["chosen"] in kind["seconds"] for kind in kinds)
    text = out.with_suffix(".md").read_text()
    assert "| quick_convnext float32 | accuracy | yes |" in text
    assert "reference+light" in text


@pytest.mark.slow
def test_every_part_runs_on_the_cpu(gpu: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    assert gpu.main(["--device", "cpu", "--quick", "--out", str(out)]) == 0
    results = json.loads(out.read_text())["results"]
    assert len(results) == 6
    assert results["quick_resnet float64"].keys() == gpu.CHECKS.keys()
    for precision in ("float32", "bfloat16"):
        assert results[f"quick_resnet {precision}"].keys() == gpu.PARTS.keys()


def test_times_and_memory_on_the_cpu() -> None:
    setup = replace(TINY, precision="float32")
    encoders = setup.contestants(("e0", "p"), "encoder")
    runs = {name: c.first_stages(2).prepare for name, c in encoders.items()}
    found = device_speed._times(setup, runs)
    assert found["ratios"]["e0/p"]["median"] > 0
    assert len(encoders["p"].outputs(encoders["p"].mask(0))) == 2
    kept = device_speed.memory(setup)
    assert kept["p+light"]["activations"] < kept["p+official"]["activations"]
    assert kept["p+light"]["peak"] is None
    text = markdown({"machine": {}, "results": {"a": {"memory": kept, "speed": {"step": found}}}})
    assert "| a | p+light |" in text
    assert "| a | step | p |" in text


def test_a_second_call_does_what_is_missing_and_a_failed_check_ends_with_1(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, calls = tmp_path / "gpu.json", []

    def part(setup: Setup) -> dict[str, Any]:
        calls.append(setup)
        return {"on": "x", "holds": setup.precision != "bfloat16"}

    def full(setup: Setup) -> dict[str, Any]:
        raise torch.OutOfMemoryError

    monkeypatch.setitem(gpu.PARTS, "waiting", part)
    monkeypatch.setitem(gpu.PARTS, "memory", full)
    words = (*QUICK, "--out", str(out), "--parts")
    assert gpu.main([*words, "waiting", "--precisions", "float32"]) == 0
    assert gpu.main([*words, "waiting", "--minutes", "-1"]) == 0
    assert len(calls) == 1
    assert gpu.main([*words, "waiting,memory"]) == 1
    assert [s.precision for s in calls] == ["float32", "float64", "bfloat16"]
    text = out.with_suffix(".md").read_text()
    assert "| quick_convnext bfloat16 | waiting | **no** |" in text
    assert text.count("| memory | not known | out of memory") == 2


def test_mistakes_end_in_one_line(
    gpu: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "gpu.json"
    for words, said in (
        (("--crop", "70"), "cells are 32 voxels wide"),
        (("--parts", "speeed"), "choose from waiting, accuracy"),
        (("--networks", ""), "choose from resnet50"),
    ):
        with pytest.raises(SystemExit) as end:
            gpu.main(["--out", str(out), "--device", "cpu", *words])
        assert end.value.code == 2
        assert said in capsys.readouterr().err
    out.write_text(json.dumps({"machine": {"device": "other"}, "results": {}}))
    assert gpu.main([*QUICK, "--out", str(out)]) == 3
    out.write_text("[]")
    assert gpu.main([*QUICK, "--out", str(out)]) == 3
    assert "choose another" in capsys.readouterr().err


def test_the_checks_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """A halo that is a little off, a step that reads a value, a step that draws its result."""
    right = Table.gather
    monkeypatch.setattr(
        Table, "gather", lambda self, rows, fill=0.0: right(self, rows, fill) * 1.001
    )
    assert not device_checks.accuracy(TINY)["holds"]
    monkeypatch.setattr(Table, "gather", right)
    norm = packed.row_norm
    monkeypatch.setattr(
        packed, "row_norm", lambda x, where, f: norm(x, where, f) * float(x.sum() > -1e9)
    )
    found = device_checks.waiting(replace(TINY, network="quick_resnet"))
    assert not found["holds"]
    assert "meta" in found["first"]
    monkeypatch.setattr(packed, "row_norm", norm)
    draw = Contestant.mask
    monkeypatch.setattr(Contestant, "mask", lambda self, seed: draw(self, torch.seed() % 2**31))
    assert not device_checks.determinism(TINY)["holds"]


@pytest.mark.gpu
@pytest.mark.parametrize("network", ["quick_resnet", "quick_convnext"])
@pytest.mark.parametrize("precision", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("check", ["accuracy", "determinism", "waiting"])
def test_on_a_gpu(network: str, precision: str, check: str) -> None:
    found = getattr(device_checks, check)(Setup(network, "cuda", precision, 64, 2))
    assert found["holds"], found


@pytest.mark.gpu
def test_strategies_are_equal_on_a_gpu() -> None:
    """Each convolution of the tiny ConvNeXt by each strategy gives what `choose` gives."""
    setup = Setup("quick_convnext", "cuda", "float64", 64, 2)
    contestant = setup.contestant("p", "encoder")
    mask, expected = contestant.mask(0), None
    for way in (None, "halo", "grid"):
        if way:
            contestant.encoder.strategy = lambda case, way=way: "local" if case.local else way
        contestant.encoder.zero_grad()
        maps: list[Tensor] = list(contestant.outputs(mask))
        torch.autograd.backward(maps, [torch.ones_like(y) for y in maps])
        found = [*maps, *contestant.gradients().values()]
        expected = expected or found
        torch.testing.assert_close(found, expected)
