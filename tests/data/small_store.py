"""A small real store for the tests of crops and streams: every voxel names its own place."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from spark3d.data.crops import CELL
from spark3d.data.geometry import SourceGrid
from spark3d.data.record import CaseRecord, IntensityStats
from spark3d.data.store import PreparedCase, Store, StoreWriter, case_path, write_case


def cell_shares(body: np.ndarray) -> np.ndarray:
    """Share of body in every cell of 32 voxels a side, those at the border being smaller."""
    grid = tuple(-(-s // CELL) for s in body.shape)
    shares = np.empty(grid)
    for index in np.ndindex(grid):
        shares[index] = body[tuple(slice(i * CELL, (i + 1) * CELL) for i in index)].mean()
    return shares


def box_label(size: Sequence[int], second: bool) -> np.ndarray:
    """Label 1 is a box near the first corner; label 2, if wanted, one near the last."""
    label = np.zeros(tuple(size), dtype=np.uint8)
    label[tuple(slice(2, 6) for _ in size)] = 1
    if second:
        label[tuple(slice(s - 5, s - 1) for s in size)] = 2
    return label


def make_case(
    name: str, voxels: np.ndarray, label: np.ndarray | None, scale: float = 1.0
) -> PreparedCase:
    """A case whose intensities are `voxels * scale`; all of it is body."""
    size = voxels.shape[1:]
    stats = tuple(
        IntensityStats(float(c.min()), float(c.max()), float(c.mean()), float(c.std()), 0.0, 1.0)
        for c in voxels * scale
    )
    classes = [] if label is None else [int(c) for c in np.unique(label) if c]
    record = CaseRecord(
        id=name,
        group=name,
        section="training",
        modality="CT",
        channels=len(voxels),
        size=size,
        spacing_mm=(1.0, 1.0, 1.0),
        affine=np.eye(4),
        source=SourceGrid(size, np.eye(4)),
        scale=(scale,) * len(voxels),
        shift=(0.0,) * len(voxels),
        content_hash=name,
        intensity=stats,
        labels=None if label is None else tuple(classes),
        sidecar_hash="",
    )
    body = np.full(cell_shares(voxels[0] > 0).shape, 255, dtype=np.uint8)
    places = {c: np.argwhere(label == c).astype(np.int32) for c in classes}
    return PreparedCase(record, voxels.astype(np.int16), label, body, places)


def make_store(
    folder: Path,
    cases: int = 5,
    size: Sequence[int] = (40, 37, 22),
    channels: int = 1,
    labelled: bool = True,
    scale: float = 1.0,
) -> Store:
    """Write and open `case0`, `case1` ...: voxels 1, 2, 3 ... in each; case0 lacks label 2."""
    ids = [f"case{i}" for i in range(cases)]
    with StoreWriter(folder, {"spacing_mm": [1.0, 1.0, 1.0]}) as writer:
        for i, name in enumerate(ids):
            count = channels * int(np.prod(size))
            voxels = (np.arange(1, count + 1) % 32000).reshape(channels, *size)
            label = box_label(size, second=i > 0) if labelled else None
            write_case(folder, make_case(name, voxels, label, scale), {"made": "for a test"})
        writer.finish(ids)
    return Store.open(folder)


def damage(store: Store, name: str) -> None:
    """Flip a bit in the middle of a case's intensities."""
    path = case_path(store.folder, name, ".b2nd")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
