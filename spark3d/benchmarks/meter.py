"""Time in alternating runs, bytes saved for the backward pass, peak memory of a process."""

import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spark3d.errors import EnvironmentProblem
from spark3d.sparse.gather import Table
from spark3d.sparse.mask import CellMask

Prepare = Callable[[int], Callable[[], object]]
"""Gives, for a round, what is timed; the preparation itself is not."""


def alternate(
    contestants: Mapping[str, Prepare],
    seconds: float,
    rounds: tuple[int, int],
    warm: bool = False,
) -> dict[str, list[float]]:
    """Seconds of every contestant in every round, one after the other.

    The order is reversed in every other round, so that no contestant always follows the same one.

    Args:
        contestants: By name; each is called with the number of the round.
        seconds: No new round begins after this time, warm-up included.
        rounds: At least and at most so many rounds are counted.
        warm: Every contestant has run already; else one round to warm up is not counted.
    """
    began = time.perf_counter()
    taken: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(1 if warm else 0, rounds[1] + 1):
        names = list(contestants)
        for name in reversed(names) if number % 2 else names:
            run = contestants[name](number)
            start = time.perf_counter()
            run()
            if number:
                taken[name].append(time.perf_counter() - start)
        if number >= rounds[0] and time.perf_counter() - began > seconds:
            break
    return taken


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, lowest and highest."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def paired_ratios(seconds: Mapping[str, Sequence[float]], last: str) -> dict[str, dict[str, float]]:
    """For every other contestant, its time over that of `last`, round by round: the spread."""
    return {
        f"{name}/{last}": spread([a / b for a, b in zip(taken, seconds[last], strict=True)])
        for name, taken in seconds.items()
        if name != last
    }


def saved_bytes(
    forward: Callable[[], object], known: Iterable[Tensor], mask: CellMask
) -> dict[str, int]:
    """Bytes that a forward pass keeps for the backward one.

    Args:
        forward: Returns something that holds on to the graph.
        known: Tensors that exist anyway (parameters), not counted.
        mask: Index tables that were built for it count too, apart.

    Returns:
        `activations`: unique storages saved by autograd; `tables`: index tables of the mask.
    """
    present = {t.untyped_storage().data_ptr() for t in known}
    found: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in present:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        held = forward()
    del held
    return {"activations": sum(found.values()), "tables": table_bytes(mask)}


def table_bytes(mask: CellMask) -> int:
    """Bytes of the index tables that the forward passes under this mask have built."""
    storages: dict[int, int] = {}
    for value in mask.tables.values():
        for table in value if isinstance(value, tuple) else (value,):
            if not isinstance(table, Table | Tensor):
                raise TypeError(f"the mask remembers a {type(table).__name__}; count it here")
            index = table.index if isinstance(table, Table) else table
            storage = index.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def peak_memory() -> int:
    """Largest resident size this process ever had, in bytes.

    Raises:
        EnvironmentProblem: The system does not tell (only Linux does).
    """
    status = Path("/proc/self/status")
    if not status.is_file():
        raise EnvironmentProblem("peak memory is read from /proc, which only Linux has")
    for line in status.read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise EnvironmentProblem("/proc/self/status does not tell VmHWM here")


def machine(threads: int) -> dict[str, Any]:
    """What the figures depend on."""
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.is_file() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else "unknown",
        "cores": os.cpu_count(),
        "threads": threads,
        "torch": torch.__version__,
        "wait_policy": os.environ.get("OMP_WAIT_POLICY", ""),
    }
