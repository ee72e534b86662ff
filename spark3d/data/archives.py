"""Archives as they were downloaded: unpacked whole into a new folder, or refused whole.

Names and kinds of all members are looked at before the first byte is written. A member that would
lie outside the folder, a link or a device condemns the archive: no sound data set holds one. Only
contents are taken, never owners or rights, which is stricter than `tarfile`'s filter "data".
"""

import errno
import lzma
import os
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from spark3d.data.checks import fault
from spark3d.data.folders import new_folder, refuse_filled
from spark3d.errors import DataError, EnvironmentProblem

Progress = Callable[[int, int], None]
BLOCK = 2**20
DAMAGED = (
    tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError,
)  # fmt: skip


@dataclass(frozen=True)
class Member:
    """A regular file of an archive: its path inside, its size, and how to read it."""

    path: PurePosixPath
    size: int
    open: Callable[[], IO[bytes]]


@dataclass(frozen=True)
class Unpacked:
    """What came out: files written, their bytes, and files of the system left in the archive."""

    files: int
    size: int
    passed_over: int


def is_archive(path: Path) -> bool:
    """Whether a path is a file that looks like a tar or zip archive by its name."""
    endings = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
    return path.is_file() and path.name.lower().endswith(endings)


def unpack(archive: Path, out: Path, progress: Progress | None = None) -> Unpacked:
    """Unpack a tar or zip archive into a new folder; whatever fails, nothing is left of it.

    Files of macOS (`._*`, `__MACOSX`, `.DS_Store`) are passed over.

    Args:
        archive: `.tar` (plain or compressed) or `.zip`.
        out: folder to make; an empty one may be there.
        progress: called with bytes written and bytes in all.

    Raises:
        ConfigError: `out` holds something.
        DataError: not an archive, damaged, truncated, or with a member that is refused.
        EnvironmentProblem: no room, or no right to write.
    """
    refuse_filled(out)
    with _opened(archive) as members, new_folder(out) as part:
        chosen = [m for m in members if not of_the_system(m.path)]
        _need_room(part, sum(m.size for m in chosen), archive)
        _write(chosen, part, progress)
    return Unpacked(len(chosen), sum(m.size for m in chosen), len(members) - len(chosen))


def of_the_system(path: PurePosixPath) -> bool:
    """Whether a file is one that macOS adds to archives."""
    return path.name.startswith("._") or path.name == ".DS_Store" or "__MACOSX" in path.parts


def inner_path(name: str, archive: Path) -> PurePosixPath:
    """The path of a member, which must lie inside the folder it is unpacked to.

    Raises:
        DataError: it does not.
    """
    path = PurePosixPath(name)
    drive = len(name) > 1 and name[1] == ":"
    if path.is_absolute() or ".." in path.parts or drive or "\\" in name or "\0" in name:
        raise _unsafe(archive, "a member that leads out of the folder")
    return path


@contextmanager
def _opened(archive: Path) -> Iterator[list[Member]]:
    """The checked members of an archive; what goes wrong in reading it becomes a fault."""
    try:
        if not archive.is_file():
            raise fault("E-NO-ARCHIVE", archive, "no such file", "a tar or zip archive",
                        "check the path")  # fmt: skip
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as box:
                yield _unique(list(_zip_members(box, archive)), archive)
            return
        with tarfile.open(archive) as box:
            yield _unique(list(_tar_members(box, archive)), archive)
    except (*DAMAGED, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the disk; decoders raise it without a number
        raise fault(
            "E-ARCHIVE-DAMAGED", archive, f"a truncated or damaged archive ({_why(error)})",
            "an intact tar or zip", "download it again and compare its size or checksum",
        ) from None  # fmt: skip


def _why(error: Exception) -> str:
    """The first line of what a reader said."""
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(":")


def _zip_members(box: zipfile.ZipFile, archive: Path) -> Iterator[Member]:
    for info in box.infolist():
        path = inner_path(info.filename, archive)
        kind = stat.S_IFMT(info.external_attr >> 16)
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise _unsafe(archive, "a link or device")
        if info.flag_bits & 1:
            raise fault("E-ARCHIVE-LOCKED", archive, "an encrypted member", "a plain archive",
                        "unpack it with its password and give the folder")  # fmt: skip
        if not info.is_dir():
            yield Member(path, info.file_size, lambda info=info: box.open(info))


def _tar_members(box: tarfile.TarFile, archive: Path) -> Iterator[Member]:
    for info in box.getmembers():
        path = inner_path(info.name, archive)
        if not (info.isfile() or info.isdir()):
            raise _unsafe(archive, "a link or device")
        if info.isfile():
            yield Member(path, info.size, lambda info=info: _stream(box, info))
    _read_to_the_end(box)


def _stream(box: tarfile.TarFile, info: tarfile.TarInfo) -> IO[bytes]:
    stream = box.extractfile(info)
    assert stream is not None, "a regular file has content"
    return stream


def _read_to_the_end(box: tarfile.TarFile) -> None:
    """Refuse a tar without its end mark, at which the standard library stops without a word."""
    stream = box.fileobj
    assert stream is not None
    stream.seek(box.offset)
    mark = stream.read(tarfile.BLOCKSIZE)
    if len(mark) != tarfile.BLOCKSIZE or any(mark):
        raise tarfile.ReadError("no end mark after its last member")
    while stream.read(BLOCK):  # where it is compressed, the checksum stands at the end
        pass


def _unique(members: Sequence[Member], archive: Path) -> list[Member]:
    """Refuse a path that stands twice, or is both a file and a folder."""
    paths = {m.path for m in members}
    if len(paths) < len(members) or any(p in paths for m in members for p in m.path.parents):
        raise _unsafe(archive, "two members of one path")
    if not members:
        raise fault("E-ARCHIVE-EMPTY", archive, "no file inside", "a data set",
                    "download it again")  # fmt: skip
    return list(members)


def _unsafe(archive: Path, found: str) -> DataError:
    return fault(
        "E-ARCHIVE-UNSAFE", archive, found, "regular files below one folder",
        "do not use this archive; get it from its original source",
    )  # fmt: skip


def _need_room(part: Path, size: int, archive: Path) -> None:
    free = shutil.disk_usage(part).free
    if size > free:
        raise EnvironmentProblem(
            f"{archive.name} unpacks to {size / 2**30:.1f} GiB, where {free / 2**30:.1f} GiB are "
            "free; make room, or choose another --out"
        )


def _write(members: Sequence[Member], part: Path, progress: Progress | None) -> None:
    done, total = 0, sum(m.size for m in members)
    for member in members:
        target = part / member.path
        target.parent.mkdir(parents=True, exist_ok=True)
        with member.open() as source, target.open("wb") as stream:
            while piece := source.read(BLOCK):
                stream.write(piece)
                done += len(piece)
                if progress:
                    progress(done, total)
            stream.flush()
            os.fsync(stream.fileno())
        if target.stat().st_size != member.size:
            raise OSError(errno.EIO, f"{member.path.name} came out at another size")
