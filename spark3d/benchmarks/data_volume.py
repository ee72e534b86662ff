"""The volume that readers are compared on, in every format: a CT tiled to a usual size, with noise.

Mirrored copies of a real CT fill the size; Gaussian noise keeps the copies from being alike, which
a compressor would notice. Without a CT a procedural phantom stands in, and the results say so.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from spark3d.data.body import body_cells, intensity_stats
from spark3d.data.files import sync_folder
from spark3d.data.grid import SourceGrid
from spark3d.data.io import read_volume
from spark3d.data.phantom import make_phantom
from spark3d.data.record import CaseRecord
from spark3d.data.writer import PreparedCase, StoreWriter, write_case

SETTINGS = MappingProxyType({"spacing_mm": [1.0, 1.0, 1.0]})
CASE = "volume"
AIR_HU = -500


@dataclass(frozen=True)
class VolumeSpec:
    """What the volume is made of.

    Attributes:
        source: a CT file; None for a phantom.
        size: voxels per axis.
        noise_hu: deviation of the noise.
        chunk: side of the store's chunks.
    """

    source: str | None = None
    size: tuple[int, int, int] = (512, 512, 300)
    noise_hu: float = 10.0
    chunk: int = 64

    def describe(self) -> dict[str, Any]:
        """For the results: no path, but the file's name and content."""
        plain = asdict(self) | {"size": list(self.size), "source": "phantom"}
        if self.source is not None:
            content = hashlib.sha256(Path(self.source).read_bytes()).hexdigest()
            plain["source"] = f"{Path(self.source).name} sha256:{content[:12]}"
        return plain


def make_volume(spec: VolumeSpec) -> NDArray[np.int16]:
    """The voxels `(*size)`, the same each time."""
    if spec.source is None:
        part = make_phantom(0).hu
    else:
        part = np.rint(read_volume(Path(spec.source)).array[0]).astype(np.int16)
    part = part[tuple(slice(0, n) for n in spec.size)]
    pads = [(0, whole - n) for n, whole in zip(part.shape, spec.size, strict=True)]
    tiled = np.pad(part, pads, mode="symmetric")
    rng = np.random.default_rng(0)
    for plane in tiled:  # plane by plane, else the noise alone takes a gigabyte
        noisy = plane + rng.normal(0, spec.noise_hu, plane.shape)
        plane[...] = np.clip(np.rint(noisy), -1024, 3071)
    return tiled


def prepared(voxels: NDArray[np.int16]) -> PreparedCase:
    """The volume as `prepare` would hand it to the store."""
    body = voxels > AIR_HU
    grid = SourceGrid(voxels.shape, np.eye(4))
    record = CaseRecord(
        id=CASE,
        group=CASE,
        section="unlabelled",
        modality="CT",
        channels=1,
        size=voxels.shape,
        spacing_mm=(1.0, 1.0, 1.0),
        affine=np.eye(4),
        source=grid,
        scale=(1.0,),
        shift=(0.0,),
        content_hash="made for a benchmark",
        intensity=intensity_stats(voxels[None], body),
        labels=None,
        sidecar_hash="",
    )
    return PreparedCase(record, voxels[None], None, body_cells(body), {})


@dataclass(frozen=True)
class Volumes:
    """Where the volume lies, in each format; `store` is a folder."""

    folder: Path

    @property
    def gz(self) -> Path:
        return self.folder / "volume.nii.gz"

    @property
    def nii(self) -> Path:
        return self.folder / "volume.nii"

    @property
    def npy(self) -> Path:
        return self.folder / "volume.npy"

    @property
    def store(self) -> Path:
        return self.folder / "store"

    def bytes(self) -> dict[str, int]:
        """Size on disk by format."""
        sizes = {path.suffix: path.stat().st_size for path in (self.gz, self.nii, self.npy)}
        files = (path for path in self.store.rglob("*") if path.is_file())
        return sizes | {"store": sum(path.stat().st_size for path in files)}


def writers(
    volume: NDArray[np.int16], case: PreparedCase, spec: VolumeSpec
) -> Mapping[str, Callable[[Volumes], None]]:
    """By format, what writes the volume; only the store's flushes to the disk and reads back."""
    image = nib.Nifti1Image(volume, np.eye(4))

    def write_store(where: Volumes) -> None:
        with StoreWriter(where.store, dict(SETTINGS)) as writer:
            write_case(where.store, case, {}, spec.chunk)
            writer.finish([CASE])

    return {
        ".gz": lambda where: nib.save(image, where.gz),
        ".nii": lambda where: nib.save(image, where.nii),
        ".npy": lambda where: np.save(where.npy, volume),
        "store": write_store,
    }


def ensure_volumes(folder: Path, spec: VolumeSpec) -> Volumes:
    """The volume in every format, made unless it is there."""
    volumes, mark = Volumes(folder), folder / "volume.json"
    if mark.is_file() and json.loads(mark.read_text()) == spec.describe():
        return volumes
    folder.mkdir(parents=True, exist_ok=True)
    mark.unlink(missing_ok=True)
    shutil.rmtree(volumes.store, ignore_errors=True)
    voxels = make_volume(spec)
    for write in writers(voxels, prepared(voxels), spec).values():
        write(volumes)
    os.sync()
    mark.write_text(json.dumps(spec.describe()))
    sync_folder(folder)
    return volumes
