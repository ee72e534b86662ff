"""`spark3d bench images`: what it measures, writes, takes up again and shows."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from spark3d.benchmarks.images import MEASURES, SIZE, ImagesJob, make_photographs
from spark3d.commands.bench_images import bench_images_command
from spark3d.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench") / "photographs"
    make_photographs(folder, 4)
    return folder


def invented(job: ImagesJob) -> dict[str, Any]:
    """Answers of the right form, at once."""
    more = {"step": {"idle": 0.25, "device": "cpu"}, "scan": {"hash_share": 0.125}}
    result = {"images_per_s": 10.0 + job.workers, "load": [0.5, 1.5]}
    return {"result": result | more.get(job.measure, {}), "machine": {"cpu": "test", "cores": 2}}


def run(out: Path, data: Path, **options: Any) -> tuple[dict[str, Any], str]:
    console = Console(record=True, width=220)
    options = {"runner": invented, "quick": True} | options
    return bench_images_command(out, data, console=console, **options), console.export_text()


def test_the_photographs_are_photographs_in_size(photographs: Path) -> None:
    files = sorted(photographs.iterdir())
    assert [f.name for f in files] == ["0000.jpg", "0001.jpg", "0002.jpg", "0003.jpg"]
    with Image.open(files[0]) as image:
        assert (image.height, image.width) == SIZE
    assert 50_000 < files[0].stat().st_size < 250_000  # ImageNet's mean is 110 kB
    before = files[0].stat().st_mtime_ns
    make_photographs(photographs, 4)
    assert files[0].stat().st_mtime_ns == before


def test_every_figure_is_written_and_shown(tmp_path: Path, photographs: Path) -> None:
    document, text = run(tmp_path / "b.json", photographs)
    assert json.loads((tmp_path / "b.json").read_text()) == document
    assert set(document["results"]) == {f"{m}: {n} workers" for m in MEASURES for n in (0, 2)}
    for said in ("12.0", "25.0% waits for images (cpu)", "12.5% hashing", "1.5", "2 cores"):
        assert said in text, said


def test_a_second_call_measures_only_what_is_missing(tmp_path: Path, photographs: Path) -> None:
    seen: list[str] = []

    def count(job: ImagesJob) -> dict[str, Any]:
        seen.append(job.key)
        return invented(job)

    run(tmp_path / "b.json", photographs, measures=["load"], workers=[0], runner=count)
    run(tmp_path / "b.json", photographs, measures=["load"], workers=[0, 1], runner=count)
    assert seen == ["load: 0 workers", "load: 1 workers"]


def test_mistakes_are_refused(tmp_path: Path, photographs: Path) -> None:
    out = tmp_path / "b.json"
    with pytest.raises(ConfigError, match="choose from scan, load, step"):
        run(out, photographs, measures=["speed"])
    with pytest.raises(ConfigError, match="0 or more"):
        run(out, photographs, workers=[])
    with pytest.raises(DataError, match="no such folder; give a folder of PNG"):
        run(out, tmp_path / "gone")
    run(out, photographs)
    with pytest.raises(DataError, match=r"otherwise \(batch 4, now 64; crop 64, now 224\)"):
        run(out, photographs, quick=False)
    out.write_text("{}")
    with pytest.raises(DataError, match="holds no results"):
        run(out, photographs)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("measure", ["scan", "load"])
def test_reading_is_measured(measure: str, workers: int, photographs: Path) -> None:
    job = ImagesJob(measure, str(photographs), workers, 32, 2, 2)
    found = MEASURES[measure](job)
    assert found["images_per_s"] > 0
    assert 0 <= found.get("hash_share", 0.0) < 1


@pytest.mark.slow
def test_a_real_step_is_measured(tmp_path: Path, photographs: Path) -> None:
    words = {"measures": ["step"], "workers": [0, 1], "runner": None}
    document, text = run(tmp_path / "b.json", photographs, **words)
    for found in document["results"].values():
        assert found["images_per_s"] > 0
        assert 0 <= found["idle"] <= 1
    assert "waits for images" in text
