"""`spark3d bench data`: what it measures, writes, takes up again and shows."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from spark3d.benchmarks import data as measures
from spark3d.benchmarks.data import MEASURES, DataJob
from spark3d.benchmarks.data_readers import UncheckedStore, readers
from spark3d.benchmarks.data_volume import CASE, Volumes, VolumeSpec, ensure_volumes, make_volume
from spark3d.benchmarks.page_cache import bytes_from_disk, evict, resident
from spark3d.commands.bench_data import bench_data_command
from spark3d.commands.bench_data_tables import FORMATS
from spark3d.data.store import Store
from spark3d.errors import ConfigError, DataError

pytestmark = pytest.mark.filterwarnings("ignore:NvImgCodecPydicomReader")  # of any LoadImaged
SPEC = VolumeSpec(size=(40, 36, 34))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bench") / "v"
    ensure_volumes(path, SPEC)
    return path


def job(folder: Path, measure: str, what: str = "") -> DataJob:
    return DataJob(measure, str(folder), SPEC, 16, 0.0, (1, 2), what, 2)


def invented(job: DataJob) -> dict[str, Any]:
    """Answers of the right form, at once: the store takes 1 s, any other 300 s."""
    one = {"median": 2.0, "low": 1.0, "high": 3.0}

    def timed(names: list[str]) -> dict[str, Any]:
        rounds = {n: [1.0 if n == "store" else 300.0] for n in names}
        return measures.summary(rounds)

    values: dict[str, Any] = {
        "warm": timed(list(FORMATS)),
        "cold": timed(list(FORMATS)) | {"disk_bytes": dict.fromkeys(FORMATS, one)},
        "write": timed([".gz", ".nii", ".npy", "store"])
        | {"raw": 100, "bytes": {".gz": 58, ".nii": 100, ".npy": 100, "store": 55}},
        "hash": {"share": {"median": 0.061, "low": 0.05, "high": 0.07}},
        "memory": {"grew": 20_000_000},
        "step": {"idle": 0.002, "step": 1.5, "device": "cpu"},
    }
    return {"result": values[job.measure] | {"load": [0.1, 0.2]}, "machine": {"cpu": "test"}}


def run(out: Path, **options: Any) -> tuple[dict[str, Any], str]:
    console = Console(record=True, width=220)
    options = {"runner": invented, "quick": True} | options
    return bench_data_command(out, console=console, **options), console.export_text()


def test_tables_hold_every_figure_and_goal(tmp_path: Path) -> None:
    document, text = run(tmp_path / "b.json")
    assert json.loads((tmp_path / "b.json").read_text()) == document
    assert set(document["results"]) >= {"write", "warm", "cold", "hash", "memory: store", "step: 2"}
    for said in ("300 (300-300)", "0.55", "6.1 %", "0.00333", "0.2 % of 1.50 s on cpu", "20"):
        assert said in text, said
    _, page = run(tmp_path / "b.json", markdown=True)
    assert "| store | 1 | 300 (300-300) | 1 | 300 (300-300) |" in page


def test_a_second_call_measures_only_what_is_missing(tmp_path: Path) -> None:
    seen: list[str] = []

    def count(job: DataJob) -> dict[str, Any]:
        seen.append(job.key)
        return invented(job)

    run(tmp_path / "b.json", measures=["hash"], runner=count)
    run(tmp_path / "b.json", measures=["hash", "step"], runner=count)
    assert seen == ["hash", "step: 0", "step: 2"]


def test_mistakes_are_refused_and_a_phantom_is_said_aloud(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SPARK3D_DATA", raising=False)
    with pytest.raises(ConfigError, match="choose from write, warm"):
        run(tmp_path / "b.json", measures=["speed"])
    with pytest.raises(ConfigError, match="no such file"):
        run(tmp_path / "b.json", file=tmp_path / "none.nii")
    _, text = run(tmp_path / "b.json", measures=["hash"])
    assert "a phantom stands in" in text
    with pytest.raises(DataError, match=r"measured otherwise \(chunk"):
        run(tmp_path / "b.json", chunk=32)
    (tmp_path / "b.json").write_text("{}")
    with pytest.raises(DataError, match="holds no results"):
        run(tmp_path / "b.json")


def test_all_readers_give_the_same_crop(folder: Path) -> None:
    found = readers(Volumes(folder), 16)
    assert list(found) == list(FORMATS)
    start = (3, 9, 17)
    expected = make_volume(SPEC)[tuple(slice(a, a + 16) for a in start)]
    for name, reader in found.items():
        if name != "MONAI LoadImaged":  # which draws its own places
            np.testing.assert_array_equal(np.squeeze(reader.open()(start)), expected)
    crop = found["MONAI LoadImaged"].open()(start)["image"]  # type: ignore[index]
    assert tuple(crop.shape) == (1, 16, 16, 16)


def test_the_unchecked_store_differs_in_the_hash_only(folder: Path) -> None:
    store, unchecked = (kind.open(folder / "store") for kind in (Store, UncheckedStore))
    np.testing.assert_array_equal(store.read(CASE), unchecked.read(CASE))
    for one in (store, unchecked):
        one._open(CASE, "image")._hashes[0] ^= 1
    with pytest.raises(DataError, match="chunk 0 was altered"):
        store.read(CASE)
    unchecked.read(CASE)


@pytest.mark.parametrize(
    ("measure", "what"), [("warm", ""), ("hash", ""), ("write", ""), ("memory", "store")]
)
def test_measurements(folder: Path, measure: str, what: str) -> None:
    found = MEASURES[measure](job(folder, measure, what))
    if measure == "memory":
        assert 0 <= found["grew"] < 10**9
        return
    assert all(spread["median"] > 0 for spread in found["spread"].values())
    if measure == "write":
        assert found["raw"] == 2 * 40 * 36 * 34 == found["bytes"][".npy"] - 128
    if measure == "hash":
        assert found["share"]["low"] <= found["share"]["median"] < 1
    assert [p.name for p in folder.iterdir() if p.name.startswith("tmp")] == []


def test_cold_reads_are_cold_or_said_not_to_be(folder: Path) -> None:
    found = MEASURES["cold"](job(folder, "cold"))
    if "failed" in found:
        assert "no cold figure" in found["failed"]
    else:
        assert set(found["disk_bytes"]) == set(FORMATS)


def test_pages_in_memory_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(os.urandom(50_000))
    with path.open("rb") as stream:
        assert stream.read()
        assert 50_000 <= resident(stream.fileno()) < 60_000
    assert 0 <= evict([path]) <= 1
    assert bytes_from_disk() >= 0


def test_the_volume_is_made_once_and_again_for_another_spec(folder: Path, tmp_path: Path) -> None:
    before = (folder / "volume.npy").stat().st_mtime_ns
    ensure_volumes(folder, SPEC)
    assert (folder / "volume.npy").stat().st_mtime_ns == before
    ensure_volumes(tmp_path / "v", SPEC)
    other = VolumeSpec(size=(20, 20, 20), chunk=32)
    volumes = ensure_volumes(tmp_path / "v", other)
    assert Store.open(volumes.store).record(CASE).size == (20, 20, 20)


def test_jobs_survive_json(folder: Path) -> None:
    one = job(folder, "memory", "store")
    assert DataJob.from_json(one.to_json()) == one
    assert one.starts(3, 5) == one.starts(3, 5) != one.starts(4, 5)
