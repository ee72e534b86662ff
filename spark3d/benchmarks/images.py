"""What is measured of pre-training on photographs: one function for each measurement.

python -m spark3d.benchmarks.images 'JSON of an ImagesJob'

runs one of them, in a process of its own, and prints one line of JSON.
"""

import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from PIL import Image

from spark3d.benchmarks import meter
from spark3d.benchmarks.training import SKIPPED_STEPS, measure_pretraining
from spark3d.data.images2d import ImageCrops, scan_images
from spark3d.data.stream import batches

SIZE = (375, 500)  # rows and columns, as most of ImageNet
SMALL = (
    "model.backbone=timm/resnet10t",
    "model.options={channels: [8, 16, 24, 32]}",
    "objective.decoder_width=16",
)


@dataclass(frozen=True)
class ImagesJob:
    """One measurement.

    Attributes:
        measure: name in `MEASURES`.
        folder: of images.
        workers: decoding threads of a scan (at least one), or processes that make samples.
        crop: pixels per axis of a crop.
        batch: images a step.
        steps: counted.
        small: a tiny network, to see that everything runs.
    """

    measure: str
    folder: str
    workers: int
    crop: int = 224
    batch: int = 64
    steps: int = 20
    small: bool = False

    @property
    def key(self) -> str:
        """Where its result is kept."""
        return f"{self.measure}: {self.workers} workers"


def make_photographs(folder: Path, count: int) -> None:
    """JPEG files of noise at many scales, whose size is that of photographs; kept if there."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        path = folder / f"{number:04d}.jpg"
        if path.is_file():
            continue
        rng = np.random.default_rng(number)
        picture = np.zeros((*SIZE, 3))
        for side in (4, 16, 64, 256):
            coarse = Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))
            picture += np.asarray(coarse.resize((SIZE[1], SIZE[0]), Image.Resampling.BICUBIC))
        picture = 255 * (picture - picture.min()) / np.ptp(picture)
        temporary = path.with_suffix(".tmp")
        Image.fromarray(picture.astype(np.uint8)).save(temporary, "JPEG", quality=90)
        temporary.replace(path)


def scan(job: ImagesJob) -> dict[str, Any]:
    """Images a second that a run's first scan reads, decodes and hashes; share of the hashing."""
    begin = time.perf_counter()
    found = scan_images(job.folder, 1.0, max(1, job.workers))
    took = time.perf_counter() - begin
    contents = [(found.folder / name).read_bytes() for name in found.files]
    begin = time.perf_counter()
    for content in contents:
        hashlib.sha256(content).hexdigest()
    hashing = (time.perf_counter() - begin) / max(1, job.workers)
    return {"images_per_s": len(found.files) / took, "hash_share": hashing / took}


def load(job: ImagesJob) -> dict[str, Any]:
    """Images a second that come out of the loader where nothing trains."""
    crops = ImageCrops(scan_images(job.folder, 1.0), (job.crop, job.crop), seed=0)
    stream = batches(crops, job.batch, 0, job.steps + SKIPPED_STEPS, job.workers)
    for _ in range(SKIPPED_STEPS):
        next(stream)
    begin = time.perf_counter()
    count = sum(len(batch["crop"]) for batch in stream)
    return {"images_per_s": count / (time.perf_counter() - begin)}


def step(job: ImagesJob) -> dict[str, Any]:
    """Images a second of a real pre-training, and the share of its time that waits for data."""
    words = [
        "spark_images_2d", *(SMALL if job.small else ()), f"images.crop={job.crop}",
        f"optim.batch={job.batch}", "images.max_bad=1", f"compute.workers={job.workers}",
        "--dims", "2", "--data", job.folder,
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as out:
        pace = measure_pretraining(words, job.steps, Path(out) / "run")
    return {"images_per_s": job.batch / pace.step, "idle": pace.idle, "device": pace.device}


MEASURES: Mapping[str, Callable[[ImagesJob], dict[str, Any]]] = MappingProxyType(
    {"scan": scan, "load": load, "step": step}
)


def main() -> None:
    """Run the job given on the command line."""
    job, before = ImagesJob(**json.loads(sys.argv[1])), os.getloadavg()[0]
    if job.measure != "step":
        torch.set_num_threads(1)
    result = MEASURES[job.measure](job) | {"load": [before, os.getloadavg()[0]]}
    machine = meter.machine(torch.get_num_threads())
    sys.stdout.write(json.dumps({"result": result, "machine": machine}) + "\n")


def as_text(job: ImagesJob) -> str:
    """What `main` reads."""
    return json.dumps(asdict(job))


if __name__ == "__main__":
    main()
