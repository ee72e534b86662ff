"""Making a read cold: pages of a file thrown out of the system's cache, and proof that they are.

Cold means that this machine's memory does not hold the file; what lies behind its disk (the cache
of a virtual machine's host, of a file server) is beyond reach.
"""

import ctypes
import mmap
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from spark3d.errors import EnvironmentProblem


def evict(paths: Iterable[Path]) -> float:
    """Ask the system to forget files, and see what of them it still holds.

    Returns:
        Share of their bytes that is in memory all the same, in [0, 1].

    Raises:
        EnvironmentProblem: this system cannot be asked.
    """
    if not hasattr(os, "posix_fadvise"):
        raise EnvironmentProblem("cold reads are measured on Linux only: leave out 'cold'")
    held = total = 0
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)  # pages not yet written cannot be dropped
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            held += resident(handle)
            total += os.fstat(handle).st_size
        finally:
            os.close(handle)
    return min(1.0, held / max(1, total))


def resident(handle: int) -> int:
    """Bytes of an open file that are in memory, in whole pages (mincore)."""
    size = os.fstat(handle).st_size
    if size == 0:
        return 0
    with mmap.mmap(handle, 0, access=mmap.ACCESS_READ) as mapped:
        pages = np.zeros(-(-size // mmap.PAGESIZE), np.uint8)
        view = np.frombuffer(mapped, np.uint8)
        address, length = ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(size)
        failed = ctypes.CDLL(None, use_errno=True).mincore(
            address, length, ctypes.c_void_p(pages.ctypes.data)
        )
        del view  # else the map cannot be closed
    if failed:
        raise EnvironmentProblem(f"mincore failed ({os.strerror(ctypes.get_errno())})")
    return int((pages & 1).sum()) * mmap.PAGESIZE


def bytes_from_disk() -> int:
    """Bytes that this process has had fetched from storage so far.

    Raises:
        EnvironmentProblem: the system does not tell.
    """
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError as error:
        raise EnvironmentProblem(
            f"/proc/self/io does not tell what is read from disk ({error.strerror}): leave out "
            "'cold'"
        ) from None
    return int(dict(line.split(": ") for line in lines)["read_bytes"])
