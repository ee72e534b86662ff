"""The commit record of one case of a store, and how JSON files are sealed against change."""

import io
import json
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from spark3d.data.chunks import REPAIR
from spark3d.data.grid import Affine, Size, SourceGrid
from spark3d.errors import DataError

FORMAT = 1
STRICT_ID = re.compile(r"[A-Za-z0-9._-]{1,120}")
BODY_CELL = 32
SUFFIXES = MappingProxyType({"image": ".b2nd", "label": ".seg.b2nd"})


def case_path(folder: Path, case_id: str, suffix: str) -> Path:
    """Where a file of a case lives; 256 sub-folders keep each of them small."""
    if not STRICT_ID.fullmatch(case_id) or case_id.startswith("."):
        raise ValueError(f"{case_id!r} is no case id: use letters, digits, '.', '_' and '-' only")
    return folder / "cases" / xxhash.xxh3_64_hexdigest(case_id.encode())[:2] / f"{case_id}{suffix}"


@dataclass(frozen=True)
class IntensityStats:
    """Of one channel over the body: extremes, mean, deviation, 0.5 and 99.5 percentiles."""

    minimum: float
    maximum: float
    mean: float
    std: float
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class CaseRecord:
    """What is known of a prepared case without reading its voxels.

    Attributes:
        id: name of the case, safe as a file name.
        group: cases of one patient share it.
        section: part of the source it came from: training, validation, test or unlabelled.
        modality: "CT" (Hounsfield units) or "MR" (any other scale).
        channels: intensity channels.
        size: voxels per axis as stored (RAS+).
        spacing_mm: mm per voxel, same order.
        affine: stored voxel -> RAS mm; it places the stored box in the patient.
        source: grid of the source file, to put predictions back.
        scale: of each channel: physical intensity = stored integer * scale + shift.
        shift: see `scale`.
        content_hash: of the source's voxels in RAS+ order, whatever its header, name or
            compression.
        intensity: statistics per channel.
        labels: classes present, ascending; None without a label.
        sidecar: file with body shares and class coordinates.
        sidecar_hash: of that file.
        filled: voxels of the source that were NaN and were given another value.
        patient: keyed hash of the patient where the source tells one; see `data/privacy.py`.
    """

    id: str
    group: str
    section: str
    modality: str
    channels: int
    size: Size
    spacing_mm: tuple[float, ...]
    affine: Affine
    source: SourceGrid
    scale: tuple[float, ...]
    shift: tuple[float, ...]
    content_hash: str
    intensity: tuple[IntensityStats, ...]
    labels: tuple[int, ...] | None
    sidecar_hash: str
    filled: int = 0
    patient: str = ""
    sidecar: Path | None = field(default=None, repr=False)

    @property
    def has_label(self) -> bool:
        """Whether a label map is stored."""
        return self.labels is not None

    @property
    def minimum(self) -> tuple[float, ...]:
        """Lowest intensity of the body, per channel."""
        return tuple(stats.minimum for stats in self.intensity)

    @property
    def mean(self) -> tuple[float, ...]:
        """Mean intensity over the body, per channel."""
        return tuple(stats.mean for stats in self.intensity)

    @property
    def std(self) -> tuple[float, ...]:
        """Standard deviation of intensity over the body, per channel."""
        return tuple(stats.std for stats in self.intensity)

    @cached_property
    def _extras(self) -> dict[str, NDArray[np.generic]]:
        if self.sidecar is None:
            raise ValueError(f"the record of case {self.id} was not opened from a store")
        try:
            data = self.sidecar.read_bytes()
        except OSError as error:
            raise damaged(self.id, f"coordinates cannot be read ({error.strerror})") from None
        if xxhash.xxh3_128_hexdigest(data) != self.sidecar_hash:
            raise damaged(self.id, "coordinates were altered")
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}

    @property
    def body(self) -> NDArray[np.float32]:
        """Share of body voxels in each cell of 32^3 voxels, in [0, 1]; read at first use."""
        return self._extras["body"].astype(np.float32) / np.float32(255)

    @property
    def class_coordinates(self) -> dict[int, NDArray[np.int32]]:
        """For each class up to 10 000 of its voxels, `(n, 3)`; read from disk at first use."""
        return self._coordinates

    @cached_property
    def _coordinates(self) -> dict[int, NDArray[np.int32]]:
        named = ((k, v) for k, v in self._extras.items() if k.startswith("class_"))
        return {int(k.removeprefix("class_")): v.astype(np.int32) for k, v in named}

    def physical(self, stored: NDArray[np.generic]) -> NDArray[np.float32]:
        """Physical intensities `(c, *size)` of stored integers; float32 is worked on in place."""
        result = stored.astype(np.float32, copy=False)
        for n, (scale, shift) in enumerate(zip(self.scale, self.shift, strict=True)):
            if scale != 1:
                result[n] *= np.float32(scale)
            if shift != 0:
                result[n] += np.float32(shift)
        return result

    def to_json(self) -> dict[str, Any]:
        """Plain values; the sidecar's place is left out."""
        return {
            "id": self.id,
            "group": self.group,
            "section": self.section,
            "modality": self.modality,
            "channels": self.channels,
            "size": list(self.size),
            "spacing_mm": list(self.spacing_mm),
            "affine": self.affine.tolist(),
            "source": self.source.to_json(),
            "scale": list(self.scale),
            "shift": list(self.shift),
            "content_hash": self.content_hash,
            "intensity": [stats.__dict__ for stats in self.intensity],
            "labels": None if self.labels is None else list(self.labels),
            "sidecar_hash": self.sidecar_hash,
            "filled": self.filled,
            **({"patient": self.patient} if self.patient else {}),
        }

    @classmethod
    def from_json(cls, data: dict[str, Any], sidecar: Path | None = None) -> "CaseRecord":
        """Undo `to_json`."""
        return cls(
            **{
                **data,
                "size": tuple(data["size"]),
                "scale": _of_channels(data["scale"], data["channels"]),
                "shift": _of_channels(data["shift"], data["channels"]),
                "spacing_mm": tuple(data["spacing_mm"]),
                "affine": np.asarray(data["affine"], np.float64),
                "source": SourceGrid.from_json(data["source"]),
                "intensity": tuple(IntensityStats(**stats) for stats in data["intensity"]),
                "labels": None if data["labels"] is None else tuple(data["labels"]),
            },
            sidecar=sidecar,
        )


def _of_channels(value: float | list[float], channels: int) -> tuple[float, ...]:
    """One number per channel; records of before have one for all."""
    return tuple(value) if isinstance(value, list) else (value,) * channels


def encode_extras(body: NDArray[np.uint8], coordinates: dict[int, NDArray[np.int32]]) -> bytes:
    """The sidecar file: `body` share per cell times 255, and voxels per class; no pickle."""
    buffer = io.BytesIO()
    named = {f"class_{value}": points.astype(np.uint16) for value, points in coordinates.items()}
    np.savez_compressed(buffer, allow_pickle=False, body=body, **named)
    return buffer.getvalue()


def sealed(data: dict[str, Any]) -> bytes:
    """JSON with a `seal`: the hash of all the rest."""
    return _canonical({**data, "seal": seal_of(data)})


def seal_of(data: dict[str, Any]) -> str:
    """Hash of the canonical JSON of everything but the seal."""
    return xxhash.xxh3_128_hexdigest(_canonical({k: v for k, v in data.items() if k != "seal"}))


def unsealed(path: Path, what: str, remedy: str = "run prepare again") -> dict[str, Any]:
    """Read sealed JSON.

    Raises:
        DataError: absent, not JSON, or changed since it was sealed.
    """
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError):
        data = None
    if not isinstance(data, dict) or data.get("seal") != seal_of(data):
        raise DataError(f"E-STORE-DAMAGED: {what} ({path.name}) is absent or was altered; {remedy}")
    return data


def read_head(folder: Path) -> dict[str, Any]:
    """What a store says of itself: `format` and `settings`.

    Raises:
        DataError: absent or altered.
    """
    remedy = "restore it from a copy, or prepare into a new folder"
    return unsealed(folder / "store.json", "the description of the store", remedy)


def read_record(folder: Path, case_id: str) -> dict[str, Any]:
    """The whole record file of a committed case.

    Raises:
        DataError: absent or altered.
    """
    return unsealed(case_path(folder, case_id, ".json"), f"the record of case {case_id}")


def _canonical(data: dict[str, Any]) -> bytes:
    return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def damaged(case: str, found: str) -> DataError:
    return DataError(
        f"E-STORE-DAMAGED: case {case}: its {found}; expected what was prepared; {REPAIR}"
    )
