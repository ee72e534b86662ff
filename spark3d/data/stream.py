"""The stream of samples: number `n` is a pure function of (seed, n), so any run can be resumed.

Entry, place and augmentation of a sample come from generators keyed by the seed and the sample's
number. Workers, restarts and the number of ranks decide who makes a sample, never what it is.
"""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate, get_worker_info

from spark3d.errors import ConfigError, DataError, EnvironmentProblem

Sample = dict[str, Any]
ORDER, SAMPLE = 0, 1


class Numbered(Dataset[Sample]):
    """A data set whose item `n`, for any n >= 0, is a pure function of (seed, n).

    Every epoch of `len(self)` numbers visits each entry once, in a fresh order.
    """

    def __init__(self, entries: int, seed: int) -> None:
        self.entries = entries
        self.seed = seed
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        return self.entries

    def entry(self, number: int) -> int:
        """Index of the entry (case or file) that sample `number` is cut from."""
        epoch, place = divmod(number, self.entries)
        if epoch != self._epoch:
            rng = np.random.default_rng((self.seed, ORDER, epoch))
            self._epoch, self._order = epoch, rng.permutation(self.entries)
        return int(self._order[place])

    def generator(self, number: int) -> np.random.Generator:
        """The generator of sample `number`."""
        return np.random.default_rng((self.seed, SAMPLE, number))

    def name(self, number: int) -> str:
        """What to call the entry of sample `number` in a message."""
        return str(self.entry(number))


def batches(
    dataset: Numbered,
    batch_size: int,
    first_step: int,
    steps: int,
    workers: int = 0,
    rank: int = 0,
    world: int = 1,
    pin_memory: bool = False,
) -> Iterator[Sample]:
    """Yield the batches of steps `first_step .. steps - 1` of a run of `steps` steps.

    Step `s` holds the samples `s * batch_size + i`; every rank takes its consecutive share. The
    samples of a step therefore depend on neither `workers`, `world` nor where a run restarted.

    Args:
        dataset: Items by number.
        batch_size: Samples a step over ALL ranks.
        first_step: Step to start from: the number of steps already done.
        steps: Steps of the whole run, those done included.
        workers: Processes that make samples; 0 makes them here.
        rank: Of this process.
        world: Number of ranks.
        pin_memory: Page-lock batches for a faster copy to a GPU.

    Raises:
        ConfigError: The batch cannot be shared equally between the ranks.
        DataError: What a sample's reading raised, whichever process did it.
        EnvironmentProblem: A worker died; says of which signal and at which case.
    """
    if batch_size < 1 or batch_size % world:
        raise ConfigError(
            f"batch of {batch_size} cannot be shared by {world} ranks; the nearest that can is "
            f"{max(1, round(batch_size / world)) * world}"
        )
    if first_step < 0 or not 0 <= rank < world or workers < 0:
        raise ConfigError(f"impossible {first_step=}, {rank=} of {world=} or {workers=}")
    return _stream(dataset, _Steps(batch_size, first_step, steps, rank, world), workers, pin_memory)


def _stream(
    dataset: Numbered, numbers: "_Steps", workers: int, pin_memory: bool
) -> Iterator[Sample]:
    guarded = _Guarded(dataset, workers)
    loader = DataLoader(
        guarded,
        batch_sampler=numbers,
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=pin_memory,
        generator=torch.Generator().manual_seed(0),  # else it would draw from the global one
    )
    before = set(multiprocessing.active_children())
    with _synchronous_children():
        iterator = iter(loader)
    started = set(multiprocessing.active_children()) - before
    try:
        for _ in numbers:
            batch = _next(iterator, started, guarded)
            if isinstance(batch, Exception):
                raise batch
            yield batch
    finally:
        del iterator  # ends the workers now, not when the traceback is forgotten


def _next(
    iterator: Iterator[Sample | DataError | EnvironmentProblem],
    started: set[BaseProcess],
    guarded: "_Guarded",
) -> Sample | Exception:
    """Fetch a batch, or return (not raise: a traceback would keep the loader) what went wrong."""
    try:
        return next(iterator)
    except (RuntimeError, OSError, EOFError):  # a death noticed, or a transfer torn off by it
        dead = _bury(started)
        if not dead:
            raise
        return EnvironmentProblem(_obituary(dead, guarded))


def _bury(started: set[BaseProcess], timeout: float = 10.0) -> list[BaseProcess]:
    """The workers that died, with their exit codes known; waits until there is one.

    A dying process first closes its files, which makes its sentinel ready, and only later has an
    exit code to ask for: on a loaded machine that is long enough to be told None.
    """
    ready = wait([p.sentinel for p in started], timeout)
    for process in started:
        if process.sentinel in ready:
            process.join(timeout)
    return [p for p in started if p.exitcode not in (None, 0)]


class _Steps(Sampler[list[int]]):
    """The sample numbers of every step, for one rank."""

    def __init__(self, batch: int, first: int, steps: int, rank: int, world: int) -> None:
        self.batch, self.first, self.steps = batch, first, steps
        self.share = batch // world
        self.offset = rank * self.share

    def __len__(self) -> int:
        return max(0, self.steps - self.first)

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.first, self.steps):
            begin = step * self.batch + self.offset
            yield list(range(begin, begin + self.share))


class _Guarded(Dataset[Sample | DataError]):
    """Notes which sample each worker is making, and hands a `DataError` over as a value.

    As a value its one line survives the way from a worker.
    """

    def __init__(self, dataset: Numbered, workers: int) -> None:
        self.dataset = dataset
        self.making = multiprocessing.RawArray("q", 2 * workers)  # pid, sample; pid, sample; ...

    def __getitem__(self, number: int) -> Sample | DataError:
        worker = get_worker_info()
        if worker is not None:
            self.making[2 * worker.id : 2 * worker.id + 2] = [os.getpid(), number]
        try:
            return self.dataset[number]
        except DataError as error:
            return error

    def made_by(self, pid: int | None) -> int | None:
        """The sample a worker made last, or was making; None if it made none."""
        notes = dict(zip(self.making[::2], self.making[1::2], strict=True))
        return notes.get(pid or 0)


def _collate(samples: list[Sample | DataError]) -> Sample | DataError | EnvironmentProblem:
    """A batch, or what went wrong, as a value; a worker lays the batch into shared memory."""
    whole: list[Sample] = []
    for sample in samples:
        if isinstance(sample, DataError):
            return sample
        whole.append(sample)
    try:
        return default_collate(whole)
    except RuntimeError as error:
        if get_worker_info() is None or "</torch_" not in str(error):  # so torch names its files
            raise
        size = sum(v.nbytes for s in whole for v in s.values() if isinstance(v, torch.Tensor))
        return EnvironmentProblem(_no_room(f"a batch of {size / 2**20:.1f} MiB"))


def _no_room(what: str) -> str:
    return (
        f"a data worker found no room in /dev/shm for {what}: make it larger (docker run "
        "--shm-size=8g), or lower optim.batch or compute.workers (0 needs none)"
    )


@contextlib.contextmanager
def _synchronous_children() -> Iterator[None]:
    """Undo the handler by which torch raises in the midst of anything when a worker dies.

    The loader still notices, within seconds, when it waits for the worker's batch; only there
    can the error be caught and say which case was being read.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, handler)


def _obituary(dead: Sequence[BaseProcess], guarded: _Guarded) -> str:
    deaths = []
    for process in dead:
        code, number = process.exitcode or 0, guarded.made_by(process.pid)
        cause = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        place = "before its first sample"
        if number is not None:
            place = f"at case {guarded.dataset.name(number)}, sample {number}"
        deaths.append(f"{process.pid} ({cause}, {place})")
    if any(process.exitcode == -signal.SIGBUS for process in dead):
        return f"data worker {', '.join(deaths)} died; {_no_room('its batch')}"
    return (
        f"data worker {', '.join(deaths)} died; if memory ran out (SIGKILL), lower "
        "compute.workers or the cache, then give the same command again to go on"
    )
