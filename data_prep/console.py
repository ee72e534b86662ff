"""What the scripts share: their help, one line for a mistake, a bar with the time left."""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from spark3d.data.archives import Unpacked, is_archive, unpack
from spark3d.errors import ConfigError, DataError, EnvironmentProblem

Advance = Callable[[int, int], None]


class Parser(argparse.ArgumentParser):
    """Options of a script; its help is the script's docstring, as written."""

    def __init__(self, name: str, about: str | None) -> None:
        super().__init__(
            prog=f"python -m data_prep.{name}",
            description=about,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        """A wrong option, told like every other mistake."""
        raise ConfigError(f"{message}; see {self.prog} --help")


def run(main: Callable[[Sequence[str] | None], None], arguments: Sequence[str] | None) -> NoReturn:
    """Call a script and leave: 0, or 2, 3 or 4 with one line that says what is wrong."""
    try:
        main(arguments)
    except (ConfigError, DataError, EnvironmentProblem) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        sys.stderr.write(f"error: {'; '.join(lines)}\n")
        sys.exit(error.exit_code)
    sys.exit(0)


@contextmanager
def bar(what: str, in_bytes: bool = False) -> Iterator[Advance]:
    """A progress bar; what it yields is called with what is done and what there is in all."""
    count = DownloadColumn() if in_bytes else MofNCompleteColumn()
    left = TextColumn("left")
    columns = (TextColumn(what), BarColumn(), count, TimeElapsedColumn(), left)
    with Progress(*columns, TimeRemainingColumn(), disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def folder_of(source: Path, out: Path | None) -> Path:
    """The tree of a data set: `source` itself, or `out` with what was unpacked from it.

    Raises:
        ConfigError: an archive without `out`, or a tree with one.
    """
    if not is_archive(source):
        if out is not None and source.exists():
            raise ConfigError(f"{source} is read where it lies; leave --out away")
        return source
    if out is None:
        raise ConfigError(f"{source.name} is an archive; give --out, the folder to unpack it into")
    with bar(f"unpacking {source.name}", in_bytes=True) as advance:
        told(unpack(source, out, advance), out)
    return out


def told(done: Unpacked, out: Path) -> None:
    """Say what was unpacked."""
    more = f"; {done.passed_over} files of macOS left out" if done.passed_over else ""
    print(f"unpacked {done.files} files, {done.size / 2**30:.2f} GiB, into {out}{more}")
