"""Dense prediction of a whole volume by overlapping windows, blended with a Gaussian.

The class map of a large volume (14 classes of 512 x 512 x 300 voxels are 4.4 GB) is never held as a
whole. Windows run in the order of one axis; the rows that no later window can touch are final and
leave the accumulator at once, as labels or as logits. The accumulator is one window thick.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from monai.data.utils import compute_importance_map, dense_patch_slices
from torch import Tensor, nn

from spark3d.errors import ConfigError
from spark3d.evaluation.accumulator import Accumulator
from spark3d.evaluation.flips import mean_over_flips

OnWindow = Callable[[int, int], None]


@dataclass(frozen=True)
class WindowPlan:
    """How a volume is cut into windows and their predictions put together.

    A window of one axis less than the volume reads it slice by slice, along its last axis.

    Args:
        window: voxels per axis, usually the crop size of training.
        overlap: share of a window that its neighbour covers too, in [0, 1).
        batch: windows per forward pass.
        flips: sets of axes to mirror, one extra pass each; the mean of the passes counts.
        swaps: label pairs exchanged by a left-right mirror (`spark3d.evaluation.flips`).
        left_right_axis: the axis from left to right (0 in RAS+ order).
        empty_below: windows whose every voxel is at or below this value are background and not run
            (one is, where all are empty); None runs all. In the intensities the network sees.
        pad_value: intensity around a volume smaller than the window, one or one per channel
            (`spark3d.data.intensity.Window.outside`).
        memory_bytes: bound of the accumulator on the network's device; above it, it lives on the
            CPU. None: half of what is free on the device.
        amp_dtype: autocast to this type in the forward passes; sums stay float32.
    """

    window: tuple[int, ...]
    overlap: float = 0.5
    batch: int = 1
    flips: tuple[tuple[int, ...], ...] = ()
    swaps: tuple[tuple[int, int], ...] = ()
    left_right_axis: int = 0
    empty_below: float | None = None
    pad_value: tuple[float, ...] = (0.0,)
    memory_bytes: int | None = None
    amp_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if not self.window or min(self.window) < 1:
            raise ConfigError(f"window={self.window} needs at least one voxel per axis")
        if not 0 <= self.overlap < 1:
            raise ConfigError(f"overlap={self.overlap} lies outside [0, 1); 0.5 is usual")
        if self.batch < 1:
            raise ConfigError(f"batch={self.batch} windows cannot run; use 1 or more")
        for axes in self.flips:
            if not axes or len(set(axes)) < len(axes) or not set(axes) <= set(range(self.ndim)):
                raise ConfigError(
                    f"flip {axes} must name axes from 0 to {self.ndim - 1}, each once"
                )

    @property
    def ndim(self) -> int:
        """Number of spatial axes."""
        return len(self.window)


def predict_logits(
    network: nn.Module, volume: Tensor, plan: WindowPlan, on_window: OnWindow | None = None
) -> Tensor:
    """Blended logits `(k, *size)`, float32 on the CPU, of one volume `(c, *size)`.

    Where `plan.empty_below` skipped every window, the background has logit 0, the others -20.

    Args:
        network: maps `(b, c, *window)` to `(b, k, *window)`; run in evaluation mode on the device
            of its parameters, and left in the mode it was in.
        on_window: called with (windows done, windows in all) after each batch.
    """
    logits = None
    for where, rows in _finished_rows(network, volume, plan, on_window):
        if logits is None:
            logits = torch.empty((rows.shape[0], *volume.shape[1:]))
        logits[(slice(None), *where)] = rows.to("cpu")
    assert logits is not None  # a volume has at least one row
    return logits


def predict_labels(
    network: nn.Module, volume: Tensor, plan: WindowPlan, on_window: OnWindow | None = None
) -> Tensor:
    """Label map `(*size)` of one volume `(c, *size)`: the class with the largest blended logit.

    On the CPU, uint8 up to 256 classes, int16 above. Arguments as in `predict_logits`; no class map
    is held.
    """
    labels = None
    for where, rows in _finished_rows(network, volume, plan, on_window):
        if labels is None:
            dtype = torch.uint8 if rows.shape[0] <= 256 else torch.int16
            labels = torch.empty(volume.shape[1:], dtype=dtype)
        labels[where] = largest(rows).to("cpu", labels.dtype)
    assert labels is not None  # a volume has at least one row
    return labels


def largest(logits: Tensor) -> Tensor:
    """Class with the largest of the logits `(k, *size)`, the first of equals: int64 `(*size)`.

    What `argmax` gives; faster than it on a CPU, where the classes of a voxel lie far apart.
    """
    return logits.max(0).indices


class BySlice(nn.Module):
    """A network of slices `(b, c, *size)` as one of volumes one voxel thick, `(b, c, *size, 1)`."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.training = network.training

    def forward(self, windows: Tensor) -> Tensor:
        """Logits `(b, k, *size, 1)`."""
        logits = self.network(windows[..., 0])
        return logits[..., None] if isinstance(logits, Tensor) else logits


def window_slices(
    size: Sequence[int], window: Sequence[int], overlap: float
) -> list[tuple[slice, ...]]:
    """Windows that cover `size` (at least `window` along every axis), the last one flush."""
    step = [
        w if w == s else max(int(w * (1 - overlap)), 1) for s, w in zip(size, window, strict=True)
    ]
    return dense_patch_slices(tuple(size), tuple(window), step)


def _finished_rows(
    network: nn.Module, volume: Tensor, plan: WindowPlan, on_window: OnWindow | None
) -> Iterator[tuple[tuple[slice, ...], Tensor]]:
    """Yield (place in the volume, logits) of groups of rows as soon as they are final."""
    if volume.ndim == plan.ndim + 2:
        network, plan = BySlice(network), replace(plan, window=(*plan.window, 1))
    if volume.ndim != plan.ndim + 1:
        raise ConfigError(
            f"a volume of shape {tuple(volume.shape)} (channels first) does not fit a window of "
            f"{plan.ndim} axes, {plan.window}"
        )
    padded, before = _padded(volume, plan)
    size = padded.shape[1:]
    axis = max(range(plan.ndim), key=lambda a: size[a] / plan.window[a])
    slices = sorted(window_slices(size, plan.window, plan.overlap), key=lambda s: s[axis].start)
    occupied = [s for s in slices if not _is_empty(padded[(slice(None), *s)], plan)]
    sums, weight = None, torch.empty(0)
    for where, logits in _predictions(network, padded, occupied or slices[:1], plan, on_window):
        if sums is None:
            sums = _new_accumulator(logits, size, axis, plan)
            weight = compute_importance_map(
                plan.window, mode="gaussian", device=sums.weight.device, dtype=torch.float32
            )
        yield from _inside(sums.advance(where[axis].start), axis, before, volume)
        sums.add(where, logits, weight)
    assert sums is not None  # at least one window runs
    yield from _inside(sums.advance(size[axis]), axis, before, volume)


def _predictions(
    network: nn.Module,
    padded: Tensor,
    slices: Sequence[tuple[slice, ...]],
    plan: WindowPlan,
    on_window: OnWindow | None,
) -> Iterator[tuple[tuple[slice, ...], Tensor]]:
    device = _device(network)
    for first in range(0, len(slices), plan.batch):
        group = slices[first : first + plan.batch]
        windows = torch.stack([padded[(slice(None), *s)] for s in group]).to(device)
        with (
            _evaluating(network),
            torch.autocast(device.type, plan.amp_dtype, enabled=plan.amp_dtype is not None),
        ):
            logits = mean_over_flips(network, windows, plan.flips, plan.swaps, plan.left_right_axis)
        yield from zip(group, logits, strict=True)
        if on_window is not None:
            on_window(first + len(group), len(slices))


def _inside(
    finished: Iterator[tuple[int, Tensor]], axis: int, before: Sequence[int], volume: Tensor
) -> Iterator[tuple[tuple[slice, ...], Tensor]]:
    """Finished rows of the padded volume -> (place in the volume, logits), the padding cut off."""
    size = volume.shape[1:]
    for first, rows in finished:
        start = max(first - before[axis], 0)
        stop = min(first - before[axis] + rows.shape[axis + 1], size[axis])
        if start >= stop:
            continue
        cut = [slice(b, b + n) for b, n in zip(before, size, strict=True)]
        cut[axis] = slice(start + before[axis] - first, stop + before[axis] - first)
        place = tuple(slice(start, stop) if a == axis else slice(None) for a in range(len(size)))
        yield place, rows[(slice(None), *cut)]


def _padded(volume: Tensor, plan: WindowPlan) -> tuple[Tensor, tuple[int, ...]]:
    """The volume with `pad_value` around it up to the window's size, and the voxels put before."""
    lack = [max(w - n, 0) for w, n in zip(plan.window, volume.shape[1:], strict=True)]
    if not any(lack):
        return volume, (0,) * plan.ndim
    pad = [side for n in reversed(lack) for side in (n // 2, n - n // 2)]
    values = torch.tensor(plan.pad_value, dtype=volume.dtype).expand(len(volume))
    padded = torch.stack(
        [nn.functional.pad(v, pad, value=float(p)) for v, p in zip(volume, values, strict=True)]
    )
    return padded, tuple(n // 2 for n in lack)


def _is_empty(window: Tensor, plan: WindowPlan) -> bool:
    return plan.empty_below is not None and bool((window <= plan.empty_below).all())


def _new_accumulator(
    logits: Tensor, size: Sequence[int], axis: int, plan: WindowPlan
) -> Accumulator:
    classes, thickness = logits.shape[0], plan.window[axis]
    needed = Accumulator.size_in_bytes(classes, size, thickness, axis)
    bound = plan.memory_bytes
    if bound is None and logits.device.type == "cuda":
        bound = torch.cuda.mem_get_info(logits.device)[0] // 2
    fits = bound is None or needed <= bound
    return Accumulator(
        classes, size, thickness, axis, logits.device if fits else torch.device("cpu")
    )


def _device(network: nn.Module) -> torch.device:
    parameter = next(network.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    training = network.training
    network.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        network.train(training)
