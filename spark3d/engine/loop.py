"""One optimiser step, guarded: gradients clipped, losses that are not finite refused."""

import logging
import math
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import cast

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.optim import Optimizer

from spark3d.engine.logging import Stopwatch, Waited, finite_or_none
from spark3d.errors import ConfigError, DataError, EnvironmentProblem

log = logging.getLogger(__name__)
Losses = Callable[[], tuple[Tensor, Mapping[str, Tensor]]]


class NotFinite(DataError):
    """Too many steps in a row gave a loss or gradient that is not a finite number."""


@dataclass(frozen=True)
class StepResult:
    """What one step did, the same on every rank.

    Attributes:
        loss: mean over the ranks of the loss of their shares of the batch.
        grad_norm: of the gradient over all ranks, before clipping.
        parts: as `loss`.
        skipped: nothing was updated, because a loss or the gradient was not finite.
    """

    loss: float
    grad_norm: float
    parts: dict[str, float]
    skipped: bool


def step_values(
    result: StepResult, lr: float, clock: Stopwatch, steps: Waited
) -> dict[str, float | bool | None]:
    """What `metrics.jsonl` tells of a training step; reads both clocks.

    Args:
        result: of the step.
        lr: learning rate.
        clock: seconds since the last line.
        steps: the stream of batches, and the seconds that were spent waiting for them since.
    """
    return {
        "loss": finite_or_none(result.loss),
        **{name: finite_or_none(value) for name, value in result.parts.items()},
        "lr": lr,
        "grad_norm": finite_or_none(result.grad_norm),
        "skipped": result.skipped,
        "seconds": round(clock.lap(), 4),
        "data_seconds": round(steps.lap(), 4),
    }


@dataclass
class BadLossGuard:
    """Counts skipped steps in a row and stops after `limit` of them."""

    limit: int
    in_a_row: int = 0

    def check(self, result: StepResult, step: int, numbers: list[int]) -> None:
        """Take note of one step, and warn of one that was skipped.

        Raises:
            NotFinite: `limit` steps in a row were skipped; names the last one's sample numbers.
        """
        if result.skipped:
            log.warning("step %d skipped: loss %s on samples %s", step, result.loss, numbers)
        self.in_a_row = self.in_a_row + 1 if result.skipped else 0
        if self.in_a_row >= self.limit:
            raise NotFinite(
                f"the loss was not finite in {self.in_a_row} steps in a row, the last at step "
                f"{step} (samples {numbers}); the last good checkpoint is kept: look at those "
                "samples, or start a new run with a lower optim.lr"
            )


def take_step(
    fabric: Fabric,
    optimizer: Optimizer,
    module: nn.Module,
    losses: Losses | Sequence[Losses],
    clip: float,
) -> StepResult:
    """Forward, backward, clip, update.

    Several `losses` are micro-batches of one size: their gradients are averaged before the update.
    Groups that `set_step` froze get none, so they neither move nor count in the clipping.

    A loss or gradient norm that is not finite on any rank skips the update on all of them, and
    buffers (running statistics) go back to what they were before the forward pass.

    Args:
        fabric: devices and precision.
        optimizer: set up by `fabric`.
        module: set up by `fabric`; its gradients are clipped.
        losses: runs the forward pass and returns (total, parts to log); or one such for each
            micro-batch.
        clip: largest global L2 norm of the gradient.

    Raises:
        EnvironmentProblem: the device has too little memory for the batch.
    """
    optimizer.zero_grad(set_to_none=True)
    before = [buffer.detach().clone() for buffer in module.buffers()]
    micro = losses if isinstance(losses, Sequence) else (losses,)
    values, names = torch.zeros(1, device=fabric.device), ()
    try:
        for place, forward in enumerate(micro, start=1):
            with fabric.no_backward_sync(module, enabled=place < len(micro)):  # type: ignore[arg-type]
                total, parts = forward()
                fabric.backward(total / len(micro))
            names = tuple(parts)
            told = [v.detach().float().to(fabric.device) for v in (total, *parts.values())]
            values = values + torch.stack(told) / len(micro)
    except torch.OutOfMemoryError as error:
        raise EnvironmentProblem(_out_of_memory(fabric.device, error)) from None
    _leave_frozen(optimizer)
    norm = fabric.clip_gradients(module, optimizer, max_norm=clip, error_if_nonfinite=False)
    assert norm is not None
    if fabric.world_size > 1:
        values = cast(Tensor, fabric.all_reduce(values, reduce_op="mean"))
    loss, *shares = values.tolist()
    grad_norm = float(norm.detach())
    skipped = not (math.isfinite(loss) and math.isfinite(grad_norm))
    if skipped:
        with torch.no_grad():
            for buffer, value in zip(module.buffers(), before, strict=True):
                buffer.copy_(value)
    else:
        optimizer.step()
    return StepResult(loss, grad_norm, dict(zip(names, shares, strict=True)), skipped)


def _leave_frozen(optimizer: Optimizer) -> None:
    """Drop the gradients of frozen groups; those without one are skipped by every optimiser."""
    for group in optimizer.param_groups:
        if group.get("frozen", False):
            for parameter in group["params"]:
                parameter.grad = None


def rehearse(module: nn.Module, forward: Callable[[], object], name: str) -> None:
    """Run `forward` in training mode and leave no trace: generator and buffers are put back.

    Args:
        module: what runs.
        forward: one forward pass of it.
        name: what to call it in a message.

    Raises:
        ConfigError: it cannot run so; the reason is that of the first layer that refused.
    """
    before = [buffer.detach().clone() for buffer in module.buffers()]
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            forward()
    except (ValueError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{name} cannot be trained by this recipe: {reason}") from error
    finally:
        with torch.no_grad():
            for buffer, value in zip(module.buffers(), before, strict=True):
                buffer.copy_(value)


def _out_of_memory(device: torch.device, error: Exception) -> str:
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0
    reason = str(error).splitlines()[0]
    return (
        f"out of memory on {device} (peak {peak:.1f} GiB): {reason}; start a new run with a "
        "smaller optim.batch or data.crop, or on more devices"
    )


class StopRequest:
    """True once SIGTERM or SIGINT asked for a stop; the loop then saves and leaves."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __bool__(self) -> bool:
        return self.signal is not None

    def on_any_rank(self, fabric: Fabric) -> bool:
        """Whether any rank was asked to stop: signals arrive at different steps on each."""
        if fabric.world_size == 1:
            return bool(self)
        asked = torch.tensor(float(bool(self)), device=fabric.device)
        return float(cast(Tensor, fabric.all_reduce(asked, reduce_op="sum"))) > 0

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """Signal handler; a second signal falls through to Python's own behaviour."""
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Turn SIGTERM and SIGINT into a request that the loop reads between two steps."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, request.on_signal) for number in numbers]
    try:
        yield request
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def seed_step(seed: int, step: int, rank: int) -> torch.Generator:
    """Seed torch's own generator for one step and return another for the masks of its batch.

    The first is a pure function of (seed, step, rank), the second of (seed, step), from which every
    rank draws the masks of the whole batch to keep those of its share. A resumed run therefore
    draws the same masks, drop paths and dropouts as one that was never stopped, with no generator
    state to save, and any number of ranks draws the same masks.
    """
    mixed = (seed * 1_000_003 + step) * 4099
    torch.manual_seed((mixed + rank) % (2**63))
    return torch.Generator().manual_seed((mixed ^ 0x5DEECE66D) % (2**63))
