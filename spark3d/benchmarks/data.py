"""What is measured of reading and writing a volume: one function for each measurement.

python -m spark3d.benchmarks.data 'JSON of a DataJob'

runs one of them, in a process of its own, and prints one line of JSON.
"""

import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import blosc2
import nibabel
import numpy as np
import torch

from spark3d.benchmarks import meter
from spark3d.benchmarks.data_readers import Reader, Start, UncheckedStore, readers, store_reader
from spark3d.benchmarks.data_volume import (
    Volumes,
    VolumeSpec,
    ensure_volumes,
    make_volume,
    prepared,
    writers,
)
from spark3d.benchmarks.page_cache import bytes_from_disk, evict
from spark3d.benchmarks.training import measure_pretraining
from spark3d.data.store import Store
from spark3d.errors import EnvironmentProblem

STORE = "store"
HELD = 0.01  # share of a file that may stay in memory before a read counts as warm


@dataclass(frozen=True)
class DataJob:
    """One measurement.

    Attributes:
        measure: name in `MEASURES`.
        folder: where the volume lies in every format.
        spec: the volume.
        crop: voxels per axis of a crop.
        seconds: no new round begins after this time.
        rounds: at least and at most so many.
        what: a reader ("memory") or the number of data workers ("step").
        steps: of the training ("step").
    """

    measure: str
    folder: str
    spec: VolumeSpec
    crop: int = 96
    seconds: float = 60.0
    rounds: tuple[int, int] = (3, 30)
    what: str = ""
    steps: int = 20

    @property
    def key(self) -> str:
        """Where its result is kept."""
        return f"{self.measure}: {self.what}" if self.what else self.measure

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "DataJob":
        given = json.loads(text)
        spec = VolumeSpec(**{**given["spec"], "size": tuple(given["spec"]["size"])})
        return cls(**{**given, "spec": spec, "rounds": tuple(given["rounds"])})

    def starts(self, number: int, count: int) -> list[Start]:
        """First voxels of the crops of a round, the same for every reader."""
        rng = np.random.default_rng((1, number))
        room = [n - self.crop + 1 for n in self.spec.size]
        return [tuple(int(rng.integers(n)) for n in room) for _ in range(count)]


def warm(job: DataJob) -> dict[str, Any]:
    """Seconds a crop with all files in memory, round by round."""
    found = readers(ensure_volumes(Path(job.folder), job.spec), job.crop)
    opened = {name: reader.open() for name, reader in found.items()}

    def contestant(name: str) -> meter.Prepare:
        read = opened[name]

        def prepare(number: int) -> Callable[[], None]:
            starts = job.starts(number, found[name].warm_crops)
            return lambda: [read(start) for start in starts].clear()

        return prepare

    taken = meter.alternate({name: contestant(name) for name in found}, job.seconds, job.rounds)
    seconds = {n: [t / found[n].warm_crops for t in times] for n, times in taken.items()}
    return summary(seconds)


def cold(job: DataJob) -> dict[str, Any]:
    """Seconds a crop when no byte of its files is in this machine's memory, opening included."""
    found = readers(ensure_volumes(Path(job.folder), job.spec), job.crop)
    seconds: dict[str, list[float]] = {name: [] for name in found}
    fetched: dict[str, list[float]] = {name: [] for name in found}
    began = time.perf_counter()
    for number in range(job.rounds[1]):
        names = list(found)
        for name in reversed(names) if number % 2 else names:
            crops = 1 if found[name].warm_crops == 1 else 4
            takes = [_one_cold(found[name], start) for start in job.starts(number, crops)]
            if any(take is None for take in takes):
                return {"failed": "the system keeps the files in memory: no cold figure here"}
            times, sizes = zip(*(take for take in takes if take), strict=True)
            seconds[name].append(sum(times) / crops)
            fetched[name].append(sum(sizes) / crops)
        if number + 1 >= job.rounds[0] and time.perf_counter() - began > job.seconds:
            break
    return summary(seconds) | {"disk_bytes": {n: meter.spread(v) for n, v in fetched.items()}}


def _one_cold(reader: Reader, start: Start) -> tuple[float, float] | None:
    """Seconds and bytes from disk of one crop; None if the files could not be evicted."""
    if evict(reader.files) > HELD:
        return None
    before, begin = bytes_from_disk(), time.perf_counter()
    reader.open()(start)
    return time.perf_counter() - begin, bytes_from_disk() - before


def hash_cost(job: DataJob) -> dict[str, Any]:
    """Share of a warm read of the store that the test of hashes takes."""
    volumes = ensure_volumes(Path(job.folder), job.spec)
    kinds = {"unchecked": UncheckedStore, "checked": Store}
    reads = {name: store_reader(kind.open(volumes.store), job.crop) for name, kind in kinds.items()}

    def contestant(name: str) -> meter.Prepare:
        def prepare(number: int) -> Callable[[], None]:
            starts = job.starts(number, 16)
            return lambda: [reads[name](start) for start in starts].clear()

        return prepare

    rounds = (job.rounds[0], 10 * job.rounds[1])
    taken = meter.alternate({name: contestant(name) for name in reads}, job.seconds, rounds)
    seconds = {name: [t / 16 for t in times] for name, times in taken.items()}
    shares = [1 - a / b for a, b in zip(*(seconds[n] for n in kinds), strict=True)]
    return {"share": meter.spread(shares)} | summary(seconds)


def write(job: DataJob) -> dict[str, Any]:
    """Seconds to write the volume in each format, and its bytes."""
    volumes = ensure_volumes(Path(job.folder), job.spec)
    voxels = make_volume(job.spec)
    known = writers(voxels, prepared(voxels), job.spec)

    def contestant(name: str) -> meter.Prepare:
        def prepare(_: int) -> Callable[[], None]:
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir()
            return lambda: known[name](Volumes(scratch))

        return prepare

    with tempfile.TemporaryDirectory(dir=job.folder) as outer:
        scratch = Path(outer) / "w"
        contestants = {name: contestant(name) for name in known}
        seconds = meter.alternate(contestants, job.seconds, (job.rounds[0], min(9, job.rounds[1])))
    return summary(seconds) | {"bytes": volumes.bytes(), "raw": voxels.nbytes}


def memory(job: DataJob) -> dict[str, Any]:
    """By how much reading 50 crops (or 3 whole files) makes this process grow at its peak."""
    reader = readers(ensure_volumes(Path(job.folder), job.spec), job.crop)[job.what]
    crops = 3 if reader.warm_crops == 1 else 50
    before = _forget_peak()
    read = reader.open()
    for start in job.starts(0, crops):
        read(start)
    return {"grew": meter.peak_memory() - before}


def _forget_peak() -> int:
    """Set the peak of this process back to what it holds now, in bytes."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        raise EnvironmentProblem(
            f"peak memory cannot be set back here ({error.strerror}): leave out 'memory'"
        ) from None
    return meter.peak_memory()


def step(job: DataJob) -> dict[str, Any]:
    """Share of a real pre-training that waits for data, with `what` data workers."""
    volumes = ensure_volumes(Path(job.folder), job.spec)
    words = [
        "spark_segresnet_3d", f"data.crop={job.crop}", "optim.batch=2",
        f"compute.workers={job.what}", "data.window={mode: unit, low: -175, high: 250}",
        "--data", str(volumes.store),
    ]  # fmt: skip
    with tempfile.TemporaryDirectory(dir=job.folder) as out:
        pace = measure_pretraining(words, job.steps, Path(out) / "run")
    return {"idle": pace.idle, "step": pace.step, "device": pace.device}


def summary(seconds: Mapping[str, list[float]]) -> dict[str, Any]:
    """Spread by contestant, and each one's ratio to every other, taken within a round."""
    ratios: dict[str, Any] = {}
    for last in seconds:
        ratios |= meter.paired_ratios(seconds, last)
    return {"spread": {n: meter.spread(v) for n, v in seconds.items()}, "ratios": ratios}


MEASURES: Mapping[str, Callable[[DataJob], dict[str, Any]]] = MappingProxyType(
    {"write": write, "warm": warm, "cold": cold, "hash": hash_cost, "memory": memory, "step": step}
)


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    return meter.machine(1) | {"blosc2": blosc2.__version__, "nibabel": nibabel.__version__}


def main() -> None:
    """Run the job given on the command line with one thread."""
    torch.set_num_threads(1)
    job, load = DataJob.from_json(sys.argv[1]), os.getloadavg()[0]
    result = MEASURES[job.measure](job) | {"load": [load, os.getloadavg()[0]]}
    sys.stdout.write(json.dumps({"result": result, "machine": machine()}) + "\n")


if __name__ == "__main__":
    main()
