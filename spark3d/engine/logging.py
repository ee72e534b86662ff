"""What a run writes while it goes: `metrics.jsonl`, TensorBoard, messages."""

import json
import logging
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch.utils.tensorboard import SummaryWriter

from spark3d.engine.checkpoint import write_atomically

T = TypeVar("T")


class MetricsFile:
    """Append-only `metrics.jsonl`; on resume the lines after the checkpoint are cut off first."""

    def __init__(self, path: Path, resume_step: int) -> None:
        self.path = path
        kept = [line for line in read_metrics(path) if line["step"] <= resume_step]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        write_atomically(path, text.encode())
        self._file = path.open("a", buffering=1)

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """One JSON object on one line; `step` counts from 1."""
        self._file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")

    def close(self) -> None:
        """Flush and close."""
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All complete lines of a metrics file (a line cut short by a kill is left out)."""
    if not path.is_file():
        return []
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


def finite_or_none(value: float) -> float | None:
    """The value, or None where JSON has no number for it."""
    return value if math.isfinite(value) else None


class RunLog:
    """Metrics to file and TensorBoard; does nothing on ranks other than 0."""

    def __init__(self, folder: Path, resume_step: int, tensorboard: bool, active: bool) -> None:
        self._file = MetricsFile(folder / "metrics.jsonl", resume_step) if active else None
        self._board: SummaryWriter | None = None
        if active and tensorboard:
            purge = resume_step + 1
            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=purge)

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Log named numbers of one step under `kind` ("train", "val", ...)."""
        if self._file is None:
            return
        self._file.write(kind, step, values)
        for name, value in values.items():
            if self._board is not None and isinstance(value, int | float):
                self._board.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        """Flush and close both sinks."""
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()


def set_up_logging(rank: int = 0) -> None:
    """Plain messages on stderr from rank 0, warnings from the others."""
    level = logging.INFO if rank == 0 else logging.WARNING
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("spark3d").setLevel(level)


class Waited(Iterator[T]):
    """Passes items on and adds up the seconds that were spent waiting for them.

    Args:
        source: where the items come from.
    """

    def __init__(self, source: Iterator[T]) -> None:
        self._source, self._seconds = source, 0.0

    def __next__(self) -> T:
        begin = time.perf_counter()
        try:
            return next(self._source)
        finally:
            self._seconds += time.perf_counter() - begin

    def lap(self) -> float:
        """Seconds waited since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds


class Stopwatch:
    """Seconds since it was made or last read."""

    def __init__(self) -> None:
        self._then = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last call."""
        now = time.perf_counter()
        seconds, self._then = now - self._then, now
        return seconds
