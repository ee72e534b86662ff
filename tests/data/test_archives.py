"""Archives come out whole or not at all, and never outside of their folder."""

import io
import os
import resource
import shutil
import stat
import tarfile
import zipfile
from collections import namedtuple
from pathlib import Path

import pytest

from spark3d.data.archives import is_archive, unpack
from spark3d.errors import ConfigError, DataError, EnvironmentProblem

FILES = {"set/a.txt": b"a" * 3000, "set/deep/b.txt": bytes(range(256)) * 40}
KINDS = ("set.tar", "set.tar.gz", "set.tar.xz", "set.zip")


def packed(path: Path, files: dict[str, bytes] = FILES) -> Path:
    """An archive of the kind that its name says."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as box:
            box.writestr("set/", b"")
            for name, content in files.items():
                box.writestr(name, content)
        return path
    mode = {".gz": "w:gz", ".xz": "w:xz"}.get(path.suffix, "w")
    with tarfile.open(path, mode) as box:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            box.addfile(info, io.BytesIO(content))
    return path


def special(path: Path, name: str = "set/x", kind: bytes = tarfile.SYMTYPE, to: str = "a") -> Path:
    """A sound archive with one member more, of another kind."""
    if path.suffix == ".zip":
        packed(path)
        with zipfile.ZipFile(path, "a") as box:
            info = zipfile.ZipInfo(name)
            info.external_attr = (stat.S_IFLNK | 0o777) << 16
            box.writestr(info, to)
        return path
    packed(path)
    with tarfile.open(path, "a") as box:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, to
        box.addfile(info)
    return path


def nothing_but(folder: Path, *names: str) -> bool:
    return sorted(p.name for p in folder.iterdir()) == sorted(names)


def refuses(code: str):
    return pytest.raises(DataError, match=f"^{code}: [^\n]*; expected [^\n]*; [^\n]+$")


@pytest.mark.parametrize("kind", KINDS)
def test_an_archive_comes_out_whole_without_the_files_of_the_system(
    tmp_path: Path, kind: str
) -> None:
    junk = {"__MACOSX/set/._a.txt": b"x", "set/._a.txt": b"x", "set/.DS_Store": b"x"}
    archive = packed(tmp_path / kind, FILES | junk)
    seen: list[tuple[int, int]] = []
    total = sum(map(len, FILES.values()))
    assert is_archive(archive)
    done = unpack(archive, tmp_path / "out", lambda *step: seen.append(step))
    assert (done.files, done.size, done.passed_over) == (2, total, 3)
    assert seen[-1] == (total, total)
    found = {p.relative_to(tmp_path / "out"): p for p in (tmp_path / "out").rglob("*.txt")}
    assert {str(name): p.read_bytes() for name, p in found.items()} == FILES
    assert nothing_but(tmp_path, kind, "out")


def test_owners_and_rights_are_not_taken(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "s.tar", "w") as box:
        info = tarfile.TarInfo("a")
        info.mode = 0o6777
        box.addfile(info)
    unpack(tmp_path / "s.tar", tmp_path / "out")
    assert stat.S_IMODE((tmp_path / "out" / "a").stat().st_mode) & 0o6111 == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "name", ["../evil", "set/../../evil", "/tmp/evil", "C:/evil", "..\\evil", "set/.."]
)
def test_a_member_that_leads_out_condemns_the_archive(tmp_path: Path, kind: str, name: str) -> None:
    archive = packed(tmp_path / kind, FILES | {name: b"evil"})
    with refuses("E-ARCHIVE-UNSAFE"):
        unpack(archive, tmp_path / "in" / "out")
    assert not list(tmp_path.rglob("*evil*"))
    assert nothing_but(tmp_path, kind)


@pytest.mark.parametrize("kind", ["set.tar", "set.zip"])
@pytest.mark.parametrize("target", ["a", "../..", "/etc/passwd"])
def test_symbolic_links_condemn_the_archive(tmp_path: Path, kind: str, target: str) -> None:
    with refuses("E-ARCHIVE-UNSAFE"):
        unpack(special(tmp_path / kind, to=target), tmp_path / "out")
    assert nothing_but(tmp_path, kind)


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_hard_links_devices_and_pipes_condemn_it_too(tmp_path: Path, kind: bytes) -> None:
    with refuses("E-ARCHIVE-UNSAFE"):
        unpack(special(tmp_path / "set.tar", kind=kind), tmp_path / "out")
    assert nothing_but(tmp_path, "set.tar")


@pytest.mark.parametrize("name", ["set/./a.txt", "set/a.txt/b"])
@pytest.mark.parametrize("kind", ["set.tar", "set.zip"])
def test_two_members_of_one_path_condemn_it(tmp_path: Path, kind: str, name: str) -> None:
    with refuses("E-ARCHIVE-UNSAFE"):
        unpack(packed(tmp_path / kind, FILES | {name: b"other"}), tmp_path / "out")
    assert nothing_but(tmp_path, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_a_truncated_archive_leaves_nothing_wherever_it_ends(tmp_path: Path, kind: str) -> None:
    whole = packed(tmp_path / kind).read_bytes()
    # a tar is padded with zeros, which no reader can miss; up to its end mark each byte counts
    needed = len(whole.rstrip(b"\0")) if kind == "set.tar" else len(whole)
    ends = {*range(0, needed, max(1, needed // 40)), needed - 1}
    for end in sorted({*ends, *(n for n in range(0, needed, 512) if kind == "set.tar")}):
        (tmp_path / kind).write_bytes(whole[:end])
        with refuses("E-ARCHIVE-DAMAGED"):
            unpack(tmp_path / kind, tmp_path / "out")
        assert nothing_but(tmp_path, kind)


@pytest.mark.parametrize("kind", ["set.tar.gz", "set.tar.xz", "set.zip"])
def test_a_flipped_bit_is_found_by_the_checksum(tmp_path: Path, kind: str) -> None:
    content = bytearray(packed(tmp_path / kind, {"a": os.urandom(5000)}).read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / kind).write_bytes(content)
    with refuses("E-ARCHIVE-DAMAGED"):
        unpack(tmp_path / kind, tmp_path / "out")
    assert nothing_but(tmp_path, kind)


def test_a_damaged_header_inside_a_tar_is_not_its_end(tmp_path: Path) -> None:
    content = bytearray(packed(tmp_path / "set.tar").read_bytes())
    second = content.index(b"set/deep/b.txt")
    content[second] ^= 1
    (tmp_path / "set.tar").write_bytes(content)
    with refuses("E-ARCHIVE-DAMAGED"):
        unpack(tmp_path / "set.tar", tmp_path / "out")


@pytest.mark.parametrize(
    ("content", "code"), [(b"<html>sign in</html>", "E-ARCHIVE-DAMAGED"), (None, "E-NO-ARCHIVE")]
)
def test_what_is_no_archive(tmp_path: Path, content: bytes | None, code: str) -> None:
    if content:
        (tmp_path / "a.zip").write_bytes(content)
    with refuses(code):
        unpack(tmp_path / "a.zip", tmp_path / "out")


def test_an_empty_archive(tmp_path: Path) -> None:
    with refuses("E-ARCHIVE-EMPTY"):
        unpack(packed(tmp_path / "a.zip", {}), tmp_path / "out")


def test_an_encrypted_archive_is_not_half_read(tmp_path: Path) -> None:
    content = bytearray(packed(tmp_path / "a.zip").read_bytes())
    at = content.rindex(b"PK\x01\x02")
    content[at + 8] |= 1
    (tmp_path / "a.zip").write_bytes(content)
    with refuses("E-ARCHIVE-LOCKED"):
        unpack(tmp_path / "a.zip", tmp_path / "out")


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    unpack(packed(tmp_path / "a.zip"), tmp_path / "out")
    with pytest.raises(ConfigError, match="holds something already"):
        unpack(tmp_path / "a.zip", tmp_path / "out")
    with pytest.raises(ConfigError, match="holds something already"):
        unpack(tmp_path / "a.zip", tmp_path / "a.zip")


def test_too_little_room_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**6, 10**6, 100))
    with pytest.raises(EnvironmentProblem, match="make room"):
        unpack(packed(tmp_path / "a.zip"), tmp_path / "out")
    assert nothing_but(tmp_path, "a.zip")


def test_a_disk_that_fills_up_leaves_nothing(tmp_path: Path) -> None:
    archive = packed(tmp_path / "a.tar")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limits[1]))
    try:
        with pytest.raises(EnvironmentProblem, match="nothing was left behind"):
            unpack(archive, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert nothing_but(tmp_path, "a.tar")


def test_what_a_kill_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".out.unfinished").mkdir()
    (tmp_path / ".out.unfinished" / "half").write_bytes(b"x")
    unpack(packed(tmp_path / "a.tar"), tmp_path / "out")
    assert nothing_but(tmp_path, "a.tar", "out")
    assert not (tmp_path / "out" / "half").exists()
