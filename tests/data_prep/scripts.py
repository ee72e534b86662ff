"""Running a script as a user does, and archives of a tree for the tests."""

import tarfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from data_prep.console import run

Main = Callable[[Sequence[str] | None], None]


def script(
    main: Main, capsys: pytest.CaptureFixture[str], *words: str | Path, code: int = 0
) -> str:
    """What a script says on its way out with this exit code; a mistake is exactly one line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        run(main, [str(word) for word in words])
    said = capsys.readouterr()
    assert left.value.code == code, said
    if code == 0:
        return said.out
    assert said.err.startswith("error: ")
    assert len(said.err.splitlines()) == 1
    return said.err


def zipped(tree: Path, archive: Path, junk: bool = True) -> Path:
    """A zip of a folder as macOS makes it."""
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as box:
        for path in sorted(tree.rglob("*")):
            box.write(path, path.relative_to(tree.parent))
            if junk and path.is_file():
                name = path.relative_to(tree.parent)
                box.writestr(f"__MACOSX/{name.parent}/._{name.name}", b"resource fork")
    return archive


def tarred(tree: Path, archive: Path, junk: bool = True) -> Path:
    """A tar of a folder as published: `._*` entries beside the files, paths from the folder on."""
    mode = "w:gz" if archive.suffix == ".gz" else "w"
    with tarfile.open(archive, mode) as box:
        for path in sorted(tree.rglob("*")):
            name = path.relative_to(tree.parent)
            if junk and path.is_file():
                box.addfile(tarfile.TarInfo(f"./{name.parent}/._{name.name}"))
            box.add(path, f"./{name}", recursive=False)
    return archive


def add_to_tar(archive: Path, name: str, link: str = "") -> Path:
    """One member more: a file of that name, or a symbolic link."""
    with tarfile.open(archive, "a") as box:
        info = tarfile.TarInfo(name)
        if link:
            info.type, info.linkname = tarfile.SYMTYPE, link
        box.addfile(info)
    return archive
