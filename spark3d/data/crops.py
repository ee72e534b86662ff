"""Where a crop starts: pure functions of a case's record and a generator, and the read that pads.

A start may be negative or run past the end where the volume is smaller than the crop (or where
a crop is read with a margin); `read_crop` pads what lies outside.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from spark3d.errors import ConfigError, DataError

CELL = 32
"""Side, in voxels, of the cells for which a record keeps its share of body."""


class ChannelStatistics(Protocol):
    """What a window needs to know of a channel of a case, in physical intensities."""

    @property
    def minimum(self) -> float: ...
    @property
    def mean(self) -> float: ...
    @property
    def std(self) -> float: ...


class CropRecord(Protocol):
    """What a crop needs to know of a prepared case.

    Attributes:
        id: Name of the case.
        size: Voxels per axis.
        labels: Classes present; None if the case has no label.
        body: Share of body voxels in every cell of 32 voxels a side, in [0, 1].
        class_coordinates: For each class that is present, voxels of it, shape `(n, ndim)`.
        intensity: Statistics of every channel.
    """

    @property
    def id(self) -> str: ...
    @property
    def size(self) -> tuple[int, ...]: ...
    @property
    def labels(self) -> tuple[int, ...] | None: ...
    @property
    def body(self) -> NDArray[np.floating]: ...
    @property
    def class_coordinates(self) -> Mapping[int, NDArray[np.integer]]: ...
    @property
    def intensity(self) -> Sequence[ChannelStatistics]: ...


class CropSource(Protocol):
    """What a crop needs of a store: its boxes are `[start, start + size)` inside the volume."""

    def record(self, case_id: str, /) -> CropRecord: ...
    def read(
        self, case_id: str, /, start: Sequence[int] | None = None, size: Sequence[int] | None = None
    ) -> NDArray[np.floating]: ...
    def read_label(
        self, case_id: str, /, start: Sequence[int] | None = None, size: Sequence[int] | None = None
    ) -> NDArray[np.generic]: ...


@dataclass(frozen=True)
class CropRule:
    """How crops are placed.

    Attributes:
        kind: "random": anywhere. "foreground": on the body. "balanced": with `class_probability`
            around a voxel of a class drawn uniformly among those present, else on the body.
        min_fraction: Share of body a crop should hold ("foreground" and "balanced").
        class_probability: Used by "balanced" only.
        classes: Classes to centre on; empty means every class the case has.
        jitter: Largest distance between drawn voxel and crop centre, as a share of the crop.
    """

    kind: Literal["random", "foreground", "balanced"] = "foreground"
    min_fraction: float = 0.3
    class_probability: float = 2 / 3
    classes: tuple[int, ...] = ()
    jitter: float = 0.25

    def __post_init__(self) -> None:
        if self.kind not in ("random", "foreground", "balanced"):
            raise ConfigError(
                f"crop rule {self.kind!r} is unknown; take random, foreground or balanced"
            )
        for name in ("min_fraction", "class_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"crop rule: {name}={getattr(self, name)} is not in [0, 1]")
        if not 0 <= self.jitter <= 0.5:
            raise ConfigError(f"crop rule: jitter={self.jitter} is not in [0, 0.5]")


def start_range(size: Sequence[int], crop: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest start that wastes no voxel: `[0, size-crop]`, or `[size-crop, 0]`."""
    room = np.asarray(size, dtype=np.int64) - np.asarray(crop, dtype=np.int64)
    return np.minimum(room, 0), np.maximum(room, 0)


def random_start(
    size: Sequence[int], crop: Sequence[int], rng: np.random.Generator
) -> tuple[int, ...]:
    """Draw a start uniformly; a volume smaller than the crop lands at a random place inside it."""
    low, high = start_range(size, crop)
    return _ints(rng.integers(low, high, endpoint=True))


def body_share(record: CropRecord, start: Sequence[int], crop: Sequence[int]) -> float:
    """Estimate the share of a crop that is body, from the record's cells (exact on whole cells)."""
    share = np.asarray(record.body, dtype=np.float64)
    for axis, cells in reversed(list(enumerate(share.shape))):
        edges = np.minimum(np.arange(cells + 1) * CELL, record.size[axis])
        inside = np.minimum(edges[1:], start[axis] + crop[axis]) - np.maximum(
            edges[:-1], start[axis]
        )
        share = share @ (np.maximum(inside, 0) / crop[axis])
    return float(share)


def foreground_start(
    record: CropRecord,
    crop: Sequence[int],
    rng: np.random.Generator,
    min_fraction: float = 0.3,
    tries: int = 12,
) -> tuple[int, ...]:
    """Draw starts until one holds `min_fraction` of body; after `tries`, take the fullest one.

    Uniform over the starts that qualify, so the border of the body is not under-sampled.
    """
    best, best_share = (), -1.0
    for _ in range(tries):
        start = random_start(record.size, crop, rng)
        share = body_share(record, start, crop)
        if share >= min_fraction:
            return start
        if share > best_share:
            best, best_share = start, share
    return best


def classes_present(record: CropRecord, classes: Sequence[int] = ()) -> tuple[int, ...]:
    """List, in order, the classes (of `classes`, or all) the case has; background is none."""
    known = record.class_coordinates
    return tuple(c for c in (classes or sorted(known)) if c and c in known and len(known[c]))


def class_start(
    record: CropRecord,
    crop: Sequence[int],
    classes: Sequence[int],
    rng: np.random.Generator,
    jitter: float = 0.25,
) -> tuple[int, ...]:
    """Draw a class uniformly among those present, a voxel of it, and a crop about that voxel.

    The crop is pushed back into the volume, so it always holds the voxel.

    Raises:
        DataError: The case has none of the classes.
    """
    present = classes_present(record, classes)
    if not present:
        raise DataError(
            f"case {record.id}: none of the classes {list(classes) or 'asked for'} is present; "
            "crop it with the foreground rule, or give it a label"
        )
    coordinates = record.class_coordinates[present[rng.integers(len(present))]]
    voxel = np.asarray(coordinates[rng.integers(len(coordinates))], dtype=np.int64)
    reach = (np.asarray(crop) * jitter).astype(np.int64)
    offset = rng.integers(-reach, reach, endpoint=True)
    start = np.clip(voxel - np.asarray(crop) // 2 + offset, voxel - np.asarray(crop) + 1, voxel)
    low, high = start_range(record.size, crop)
    return _ints(np.clip(start, low, high))


def choose_start(
    rule: CropRule, record: CropRecord, crop: Sequence[int], rng: np.random.Generator
) -> tuple[int, ...]:
    """Draw a start by the rule; a case without any class falls to the foreground half of it."""
    if rule.kind == "random":
        return random_start(record.size, crop, rng)
    centred = rule.kind == "balanced" and rng.random() < rule.class_probability
    if centred and classes_present(record, rule.classes):
        return class_start(record, crop, rule.classes, rng, rule.jitter)
    return foreground_start(record, crop, rng, rule.min_fraction)


def needs_padding(size: Sequence[int], crop: Sequence[int]) -> bool:
    """Tell whether a volume is smaller than the crop along some axis."""
    return any(s < c for s, c in zip(size, crop, strict=True))


def overlap(
    size: Sequence[int], start: Sequence[int], crop: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[tuple[int, int], ...]]:
    """Split a crop into the part inside the volume and the padding around it.

    Returns:
        Start and size of the part inside (size 0 where nothing overlaps), and the voxels to pad
        before and after, per axis.
    """
    low = np.clip(start, 0, size)
    high = np.clip(np.add(start, crop), 0, size)
    pads = [
        (int(a - s), int(s + c - b)) if b > a else (0, int(c))
        for s, c, a, b in zip(start, crop, low, high, strict=True)
    ]
    return _ints(low), _ints(high - low), tuple(pads)


def pad_crop(
    part: NDArray[np.generic],
    crop: Sequence[int],
    pads: Sequence[tuple[int, int]],
    pad: float | NDArray[np.generic],
) -> np.ndarray:
    """Set the part inside the volume, `(c, *extent)`, into a crop filled with `pad`."""
    if not any(a or b for a, b in pads):
        return part
    values = np.broadcast_to(np.asarray(pad, dtype=part.dtype), (part.shape[0],))
    out = np.empty((part.shape[0], *crop), dtype=part.dtype)
    out[:] = values.reshape(-1, *(1,) * len(crop))
    inside = tuple(
        slice(before, before + n) for (before, _), n in zip(pads, part.shape[1:], strict=True)
    )
    out[(slice(None), *inside)] = part
    return out


def _ints(values: np.ndarray) -> tuple[int, ...]:
    return tuple(int(v) for v in values)
