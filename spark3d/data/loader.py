"""Crops of prepared volumes as a numbered stream; `batches` shares it out."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from spark3d.data.augment import Augmentation
from spark3d.data.crops import (
    CropRecord,
    CropRule,
    CropSource,
    choose_start,
    needs_padding,
    overlap,
    pad_crop,
)
from spark3d.data.intensity import Window
from spark3d.data.stream import Numbered, Sample, batches
from spark3d.errors import ConfigError, DataError

__all__ = ["CACHE_BYTES", "VolumeCrops", "batches"]

CACHE_BYTES = 2 * 1024**3


class VolumeCrops(Numbered):
    """Crops of prepared volumes.

    Item `n` is `{"crop": float32 (c, *size), "case": index into ids, "number": n}` and, if
    `labelled`, `"label": int64 (*size)`.

    Args:
        source: A store, or anything with its `record`, `read` and `read_label`.
        ids: Cases to draw from; their order is part of the stream.
        crop_size: Voxels per axis; one axis less than the volumes have takes slices, `(c, *size)`
            without their last axis.
        window: Maps physical intensities to the network's range.
        seed: Of the whole stream.
        rule: Where crops start.
        augment: Applied to every crop; None for crops as they are.
        labelled: Read labels too.
        cache: Keep decoded volumes in memory, read at once and shared by forked workers.
        cache_bytes: Budget of the cache; cases beyond it are read from the source each time.
        crops_per_case: Consecutive samples from one case before the next is visited.

    Attributes:
        padded: Cases smaller than the crop along some axis, which get padded.
        cached: Number of cases held in memory.

    Raises:
        ConfigError: No case, a case twice, or sizes that are neither of volumes nor of slices.
        DataError: Labels are asked for and a case has none.
    """

    def __init__(
        self,
        source: CropSource,
        ids: Sequence[str],
        crop_size: Sequence[int],
        window: Window,
        seed: int,
        rule: CropRule | None = None,
        augment: Augmentation | None = None,
        labelled: bool = False,
        cache: bool = False,
        cache_bytes: int = CACHE_BYTES,
        crops_per_case: int = 1,
    ) -> None:
        super().__init__(len(ids), seed)
        self.crops_per_case = crops_per_case
        if not ids or len(set(ids)) != len(ids):
            raise ConfigError(
                f"a stream of crops needs at least one case and none twice, got {ids}"
            )
        self.source, self.ids = source, tuple(ids)
        self.crop_size = tuple(int(c) for c in crop_size)
        self.window, self.rule = window, rule or CropRule()
        self.augment, self.labelled = augment, labelled
        self.records = tuple(source.record(case) for case in self.ids)
        for record in self.records:
            self._check(record)
        self.thin = (1,) * (len(self.records[0].size) - len(self.crop_size))
        box = (*self.crop_size, *self.thin)
        self.padded = tuple(r.id for r in self.records if needs_padding(r.size, box))
        self._cache: dict[str, tuple[np.ndarray, np.ndarray | None]] = {}
        if cache:
            self._fill_cache(cache_bytes)

    def _check(self, record: CropRecord) -> None:
        if len(record.size) - len(self.crop_size) not in (0, 1):
            raise ConfigError(
                f"crop size {self.crop_size} and case {record.id} of size {tuple(record.size)} "
                "differ in their number of axes"
            )
        if self.labelled and record.labels is None:
            raise DataError(
                f"case {record.id} has no label; prepare it with one, or leave it out of the split"
            )

    @property
    def cached(self) -> int:
        return len(self._cache)

    def entry(self, number: int) -> int:
        return super().entry(number // self.crops_per_case)

    def name(self, number: int) -> str:
        return self.ids[self.entry(number)]

    def __getitem__(self, number: int) -> Sample:
        index = self.entry(number)
        record, rng = self.records[index], self.generator(number)
        box = (*self.crop_size, *self.thin)
        start = choose_start(self.rule, record, box, rng)
        read = self.augment.read_size(self.crop_size) if self.augment else self.crop_size
        size = (*read, *self.thin)
        start = tuple(a - (r - c) // 2 for a, r, c in zip(start, size, box, strict=True))
        crop, label = self._read(record, start, size)
        if self.thin:
            crop, label = crop[..., 0], None if label is None else label[..., 0]
        if self.augment:
            crop, label = self.augment(crop, label, self.crop_size, rng)
        sample: Sample = {"crop": crop.contiguous(), "case": index, "number": number}
        if label is not None:
            sample["label"] = label.long().contiguous()
        return sample

    def _read(
        self, record: CropRecord, start: Sequence[int], size: Sequence[int]
    ) -> tuple[Tensor, Tensor | None]:
        """Read, pad and window; what lies outside of the volume is as dark as the window goes."""
        inner, extent, pads = overlap(record.size, start, size)
        part, label = self._part(record.id, inner, extent)
        dark = self.window.darkest([stats.minimum for stats in record.intensity])
        values = pad_crop(part.astype(np.float32, copy=False), size, pads, dark)
        mean = [stats.mean for stats in record.intensity]
        std = [stats.std for stats in record.intensity]
        crop = torch.from_numpy(self.window.apply(values, mean, std))
        if label is None:
            return crop, None
        return crop, torch.from_numpy(pad_crop(label.astype(np.int32)[None], size, pads, 0)[0])

    def _part(
        self, case: str, start: tuple[int, ...], size: tuple[int, ...]
    ) -> tuple[np.ndarray, np.ndarray | None]:
        if case in self._cache:
            volume, label = self._cache[case]
            cut = tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))
            return volume[(slice(None), *cut)], None if label is None else label[cut]
        values = self.source.read(case, start=start, size=size)
        label = self.source.read_label(case, start=start, size=size) if self.labelled else None
        return values, label

    def _fill_cache(self, budget: int) -> None:
        for case in self.ids:
            volume = _compact(self.source.read(case))
            label = self.source.read_label(case) if self.labelled else None
            budget -= volume.nbytes + (0 if label is None else label.nbytes)
            if budget < 0:
                return
            self._cache[case] = (volume, label)


def _compact(volume: np.ndarray) -> np.ndarray:
    """Hold whole numbers, as CT has, in half the memory."""
    if volume.size and np.abs(volume).max() < 2**15:
        whole = volume.astype(np.int16)
        if np.array_equal(whole, volume):
            return whole
    return volume
