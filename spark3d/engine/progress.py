"""Progress bars with time left. Imports no torch, so that light commands start at once."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

PROGRESS_COLUMNS = (
    TextColumn("{task.description}"),
    BarColumn(),
    MofNCompleteColumn(),
    TimeElapsedColumn(),
    TextColumn("left"),
    TimeRemainingColumn(),
)


class StepProgress:
    """A progress bar whose text carries the current loss."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress, self._task = progress, task

    def update(self, done: int, total: int) -> None:
        """Set how much is done, where the total shows only later."""
        self._progress.update(self._task, completed=done, total=total)

    def say(self, text: str) -> None:
        """What is being done now."""
        self._progress.update(self._task, status=text)

    def advance(self, text: str = "") -> None:
        """One unit of work done."""
        self._progress.update(self._task, advance=1, status=text)


@contextmanager
def step_progress(
    title: str, total: int, done: int = 0, show: bool = True
) -> Iterator[StepProgress]:
    """A bar with share, elapsed time and time left; nothing is drawn where `show` is False."""
    columns = (*PROGRESS_COLUMNS, TextColumn("{task.fields[status]}"))
    with Progress(*columns, console=Console(stderr=True), disable=not show) as progress:
        task = progress.add_task(title, total=total, completed=done, status="")
        yield StepProgress(progress, task)
