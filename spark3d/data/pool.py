"""Running preparation jobs in this process or in several, within a memory budget."""

import contextlib
import fcntl
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

from spark3d.data.io import read_extent
from spark3d.data.job import Job, run_job
from spark3d.errors import DataError, EnvironmentProblem

T = TypeVar("T")
COPIES = 6  # float32 volumes alive at once while a case is resampled


def run_jobs(
    jobs: Sequence[Job],
    workers: int,
    memory_gib: float | None = None,
    lock: Path | None = None,
) -> Iterator[tuple[Job, str | None]]:
    """Prepare every case and yield it with None, or with the reason why it cannot be used.

    The arguments and errors are those of `run_each`.
    """
    return run_each(run_job, jobs, workers, memory_gib, lock)


def run_each(
    work: Callable[[Job], T],
    jobs: Sequence[Job],
    workers: int,
    memory_gib: float | None = None,
    lock: Path | None = None,
) -> Iterator[tuple[Job, T]]:
    """Do some work for every job and yield it with what came of it, in the order they end.

    Args:
        work: a function of a module, as it may run in another process.
        jobs: what to do it for.
        workers: processes (started afresh, not forked); 0 works here.
        memory_gib: start no further job where all running would take more; None is half of the
            machine's memory. A job too large for the budget runs alone.
        lock: file on which every worker shares a lock, so that one that outlives this process for
            a moment is waited for.

    Raises:
        EnvironmentProblem: from a job, or because a worker was killed.
    """
    if workers <= 0:
        for job in jobs:
            yield job, work(job)
        return
    budget = memory_gib * 2**30 if memory_gib else _physical_memory() / 2
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (os.getpid(), lock))
    try:
        yield from _schedule(pool, work, list(jobs), workers, budget)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _schedule(
    pool: ProcessPoolExecutor,
    work: Callable[[Job], T],
    waiting: list[Job],
    workers: int,
    budget: float,
) -> Iterator[tuple[Job, T]]:
    running: dict[Future[T], tuple[Job, float]] = {}
    waiting.reverse()
    while waiting or running:
        while waiting and len(running) < 2 * workers:  # one waiting per worker, so that none idles
            need = memory_of(waiting[-1])
            if running and need + sum(size for _, size in running.values()) > budget:
                break
            job = waiting.pop()
            running[pool.submit(work, job)] = (job, need)
        done, _ = wait(running, return_when=FIRST_COMPLETED)
        for future in done:
            try:
                result = future.result()
            except BrokenProcessPool:
                names = ", ".join(sorted(job.case.id for job, _ in running.values()))
                raise EnvironmentProblem(
                    f"a worker was killed while it prepared one of: {names}; it may have run out "
                    "of memory: lower --workers and repeat the command, finished cases are kept"
                ) from None
            yield running.pop(future)[0], result


def memory_of(job: Job) -> float:
    """Bytes, estimated from the header alone; 0 for a bad one, which fails in its own job.

    Counted are the voxels of the source or, where there are more, those at the target spacing.
    """
    try:
        shape, spacing = read_extent(job.case.sources[0], job.spec.geometry)
    except DataError:
        return 0.0
    voxels = math.prod(shape) * len(job.case.images)
    growth = math.prod(spacing) / math.prod(job.spec.spacing_mm or spacing)
    return voxels * max(1.0, growth) * 4 * COPIES


def _physical_memory() -> float:
    return float(os.sysconf("SC_PAGE_SIZE")) * os.sysconf("SC_PHYS_PAGES")


def _start_worker(parent: int, lock: Path | None) -> None:
    """Leave Ctrl-C to the parent, and end with it even if it was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    held = lock.open("a+") if lock else None  # the thread below keeps it open
    if held:
        with contextlib.suppress(OSError):  # no locks there, as the writer has said
            fcntl.flock(held, fcntl.LOCK_SH)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        if held:
            held.flush()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
