"""The JSON file in which a `spark3d bench` keeps its results, and goes on after a stop."""

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spark3d.engine.progress import step_progress
from spark3d.errors import DataError

MACHINE = ("cpu", "cores", "torch")
"""What must not differ between the figures of one file."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Measurement:
    """One thing to measure, in a process of its own.

    Attributes:
        key: of its result.
        run: returns the "result" and the "machine" it is of.
        case: the group of results that it belongs to, if they are grouped.
        until: seconds after which it does not begin.
    """

    key: str
    run: Callable[[], dict[str, Any]]
    case: str = ""
    until: float | None = None

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.case}: {self.key}" if self.case else self.key

    def place(self, results: dict[str, Any]) -> dict[str, Any]:
        """Where its result stands under `key`."""
        return results.setdefault(self.case, {}) if self.case else results


def complete(path: Path, document: dict[str, Any], wanted: Sequence[Measurement]) -> None:
    """Measure what `document` lacks; each result is in the file as soon as it is known.

    Raises:
        DataError: the results so far are of another machine.
    """
    missing = [one for one in wanted if one.key not in one.place(document["results"])]
    began = time.perf_counter()
    with step_progress("measuring", len(wanted), len(wanted) - len(missing)) as bar:
        for one in missing:
            if one.until is not None and time.perf_counter() - began > one.until:
                log.warning("out of time: the same command goes on with %s", one.name)
                return
            bar.say(one.name)
            answer = one.run()
            check_machine(path, document["machine"], answer.get("machine", {}))
            document["machine"] = answer.get("machine", document["machine"])
            one.place(document["results"])[one.key] = answer["result"]
            save(path, document)
            log.info("measured: %s", one.name)
            bar.advance()


def check_machine(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to put results of two machines, or of two versions of torch, into one file.

    Raises:
        DataError: names what differs.
    """
    changed = [key for key in MACHINE if key in before and before[key] != now.get(key, before[key])]
    if changed:
        found = "; ".join(f"{key} {before[key]}, now {now[key]}" for key in changed)
        raise DataError(f"{path} is of another machine ({found}): choose another file")


def load(path: Path, subject: str, measured: Mapping[str, Any]) -> dict[str, Any]:
    """The results so far, or an empty document.

    Args:
        path: JSON file, there or not.
        subject: key of the document under which it says what was measured.
        measured: what is to be measured now; it must be the same.

    Returns:
        "machine", "results" by name, and `subject`.

    Raises:
        DataError: something else stands there, or the results are of something else.
    """
    if not path.is_file():
        return {"machine": {}, "results": {}, subject: dict(measured)}
    try:
        document = json.loads(path.read_text())
        before = document[subject]
        changed = [key for key in measured if measured[key] != before.get(key)]
        document["results"].keys()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path} holds no results of this `spark3d bench`: choose another file"
        ) from error
    if changed:
        found = "; ".join(f"{key} {before.get(key)}, now {measured[key]}" for key in changed)
        raise DataError(f"{path} was measured otherwise ({found}): choose another file")
    return document


def save(path: Path, document: Mapping[str, Any]) -> None:
    """Replace the file at once, so that a kill leaves the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(document, indent=1) + "\n")
    temporary.replace(path)
