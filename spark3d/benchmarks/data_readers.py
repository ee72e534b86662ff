"""The ways to read a random crop that are compared, each as people use it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from monai.transforms.compose import Compose
from monai.transforms.croppad.dictionary import RandSpatialCropd
from monai.transforms.io.dictionary import LoadImaged
from monai.transforms.utility.dictionary import EnsureChannelFirstd

from spark3d.benchmarks.data_volume import CASE, Volumes
from spark3d.data.chunks import ChunkedFile
from spark3d.data.store import Store

Start = tuple[int, ...]
Read = Callable[[Start], object]


@dataclass(frozen=True)
class Reader:
    """One way to read.

    Attributes:
        files: what it reads.
        open: gives a function from a crop's first voxel to the crop; called anew for a cold read.
        warm_crops: how many are timed together when warm: many where one takes milliseconds.
    """

    files: tuple[Path, ...]
    open: Callable[[], Read]
    warm_crops: int = 1


def readers(volumes: Volumes, crop: int) -> dict[str, Reader]:
    """By name; the first is what others are divided by."""
    side = (crop, crop, crop)
    stored = tuple(p for p in volumes.store.rglob("cases/*/*") if p.is_file())
    store = Store.open(volumes.store)  # the index is read once a run, not once a crop

    def whole() -> Read:
        def read(start: Start) -> object:
            array = np.asarray(nib.load(volumes.gz).dataobj)  # type: ignore[attr-defined]
            return array[_box(start, side)].astype(np.float32)

        return read

    def monai() -> Read:
        pipeline = Compose(
            [
                LoadImaged("image", reader="NibabelReader"),
                EnsureChannelFirstd("image"),
                RandSpatialCropd("image", side, random_size=False),
            ]
        )
        pipeline.set_random_state(0)
        return lambda _: pipeline({"image": str(volumes.gz)})

    def sliced() -> Read:
        proxy = nib.load(volumes.nii).dataobj  # type: ignore[attr-defined]
        return lambda start: np.asarray(proxy[_box(start, side)]).astype(np.float32)

    def mapped() -> Read:
        array = np.load(volumes.npy, mmap_mode="r")
        return lambda start: array[_box(start, side)].astype(np.float32)

    return {
        "nibabel .nii.gz": Reader((volumes.gz,), whole),
        "MONAI LoadImaged": Reader((volumes.gz,), monai),
        "nibabel .nii slice": Reader((volumes.nii,), sliced, 4),
        "mapped .npy": Reader((volumes.npy,), mapped, 16),
        "store": Reader(stored, lambda: store_reader(store, crop), 16),
    }


def store_reader(store: Store, crop: int) -> Read:
    """Crops of the store through a copy of it that has no file open yet."""
    fresh = type(store)(store.folder, store.settings, store.cases, store.seals)
    return lambda start: fresh.read(CASE, start, (crop,) * len(start))


class UncheckedFile(ChunkedFile):
    """Reads as `ChunkedFile` does but for the hash: to learn what the hash costs."""

    def _test(self, number: int, piece: memoryview) -> None:
        pass


class UncheckedStore(Store):
    """A store of unchecked files."""

    def _open_file(self, case_id: str, part: str) -> ChunkedFile:
        file = super()._open_file(case_id, part)
        file.__class__ = UncheckedFile  # the same file, read in the same way
        return file


def _box(start: Start, side: Start) -> tuple[slice, ...]:
    return tuple(slice(a, a + n) for a, n in zip(start, side, strict=True))
