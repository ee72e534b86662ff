"""The folder of a run: who may write there, what was resolved, with which versions."""

import fcntl
import json
import logging
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lightning_fabric import Fabric

from spark3d.commands.command_line import place_mark, recorded_command, without_paths
from spark3d.config import Section, changed_keys, dump_yaml, load_recipe
from spark3d.data.files import remove_temporaries
from spark3d.engine.checkpoint import write_atomically
from spark3d.errors import ConfigError, DataError, EnvironmentProblem

log = logging.getLogger(__name__)
Problem = ConfigError | DataError | EnvironmentProblem
LOCK = ".lock"
OURS = frozenset({"store", "data", "recipe.yaml", LOCK})
"""What a folder may hold before it is a run: stores, and what a kill right at the start left."""
PACKAGES = ("torch", "monai", "timm", "lightning-fabric", "numpy", "nibabel", "blosc2")


def versions() -> dict[str, str]:
    """Versions of spark3d, python and the packages whose numerics matter."""
    own = {"spark3d": version("spark3d"), "python": platform.python_version()}
    return own | {name: version(name) for name in PACKAGES}


def git_state(folder: Path) -> str | None:
    """Commit of the checkout spark3d runs from, marked `+dirty` if changed; None outside of one."""
    call = ["git", "-C", str(folder), "describe", "--always", "--dirty=+dirty", "--abbrev=12"]
    try:
        done = subprocess.run(call, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def on_first_rank(fabric: Fabric, action: Callable[[], Any]) -> None:
    """Do something on rank 0 while the others wait; what it raises is raised on every rank."""
    problem: Problem | None = None
    if fabric.is_global_zero:
        try:
            action()
        except (ConfigError, DataError, EnvironmentProblem) as error:
            problem = error
    if fabric.world_size > 1:
        problem = fabric.broadcast(problem)
    if problem is not None:
        raise problem


@contextmanager
def claim_run(out: Path, kind: str, fabric: Fabric) -> Iterator[None]:
    """Hold a run folder alone; nothing is written to one that is not of this kind.

    Rank 0 locks it, so that a second process on the same folder cannot mix its lines and
    checkpoints with ours. A folder in which nothing was left is removed again.

    Raises:
        ConfigError: the folder holds something else.
        EnvironmentProblem: it cannot be written, or another process is at work there.
    """
    held: list[Any] = []
    on_first_rank(fabric, lambda: held.append(_lock(out, kind)))
    try:
        yield
    finally:
        for lock in held:
            left = {file.name for file in out.iterdir()}
            if left == {LOCK}:
                (out / LOCK).unlink()
                out.rmdir()
            lock.close()


def _lock(out: Path, kind: str) -> Any:
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out} is a file; choose a new folder")
    if (out / "run.json").is_file():
        _same_kind(out, kind)
    elif out.is_dir() and (others := sorted(f.name for f in out.iterdir() if _foreign(f.name))):
        raise ConfigError(
            f"--out {out} is not empty ({others[0]}) and not a run of spark3d; choose a new folder"
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = (out / LOCK).open("w")
    except OSError as error:
        raise EnvironmentProblem(
            f"cannot write --out {out}: {error.strerror}; choose another folder"
        ) from None
    try:  # lockf, as forked data workers, which outlive a killed parent, do not inherit it
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        lock.close()
        raise EnvironmentProblem(
            f"another process is at work in --out {out}; wait for it, or choose another folder"
        ) from None
    except OSError as error:
        log.warning("no lock on %s (%s): start no second process on it", out, error.strerror)
    remove_temporaries(out / "checkpoints")
    for file in out.glob(".*.tmp"):
        file.unlink()
    return lock


def _foreign(name: str) -> bool:
    return name not in OURS and not (name.startswith(".") and name.endswith(".tmp"))


def open_run(
    out: Path, kind: str, recipe: Section, inputs: dict[str, Any], source: Path, fabric: Fabric
) -> None:
    """Make or re-open a claimed run folder; an existing one must have the same recipe and inputs.

    Args:
        out: the folder.
        kind: "pretrain", "finetune" or "classify".
        recipe: resolved; keys under `compute` and `log` may differ from the first time.
        inputs: what else fixes the result, such as the hash of the encoder.
        source: the data as they were given; where they are no longer there does not matter.
        fabric: rank 0 reads and writes, the others wait.

    Raises:
        ConfigError: the folder belongs to another run; names the keys that differ.
        EnvironmentProblem: the folder cannot be written.
    """
    on_first_rank(fabric, lambda: _open(out, kind, recipe, inputs, source))


def _open(out: Path, kind: str, recipe: Section, inputs: dict[str, Any], source: Path) -> None:
    if (out / "run.json").is_file():
        _same_run(out, recipe, inputs)
        return
    write_atomically(out / "recipe.yaml", dump_yaml(without_paths(recipe)).encode())
    record = {
        "kind": kind,
        "command": recorded_command(),
        "inputs": inputs,
        "source": place_mark(source.resolve()),
        "versions": versions(),
        "git": git_state(Path(__file__).parent),
        "machine": {"system": platform.system(), "processor": platform.machine()},
    }
    write_atomically(out / "run.json", json.dumps(record, indent=1).encode())


def read_run_record(out: Path) -> dict[str, Any]:
    """The content of `run.json`.

    Raises:
        ConfigError: it cannot be read, or is not of a run.
    """
    try:
        record = json.loads((out / "run.json").read_text(encoding="utf-8"))
        if {"kind", "inputs"} <= record.keys():
            return record
    except (OSError, ValueError, AttributeError):
        pass
    raise ConfigError(f"--out {out} holds a run.json that cannot be read; choose a new folder")


def _same_kind(out: Path, kind: str) -> None:
    found = read_run_record(out)["kind"]
    if found != kind:
        raise ConfigError(f"--out {out} holds a {found} run, not {kind}; choose a new folder")


def _same_run(out: Path, recipe: Section, inputs: dict[str, Any]) -> None:
    known = read_run_record(out)["inputs"]
    for key in ("data", "test"):  # runs of before, which do not have them, cannot be told apart
        known.setdefault(key, inputs.get(key))
    try:
        old = load_recipe(type(recipe), out / "recipe.yaml")
    except (OSError, ConfigError) as error:
        raise ConfigError(
            f"--out {out} holds a recipe this version cannot read ({error}); choose a new folder"
        ) from None
    different = changed_keys(without_paths(old), without_paths(recipe))
    different += [k for k in sorted(inputs.keys() | known.keys()) if inputs.get(k) != known.get(k)]
    if different == ["data"]:
        raise ConfigError(
            f"--out {out} is a run on other data: stored voxels or labels of its cases changed "
            "since; choose a new folder, or prepare them as they were"
        )
    if different:
        raise ConfigError(
            f"--out {out} is another run: {', '.join(different[:6])} differ from its recipe.yaml; "
            "choose a new folder, or give the same values to resume"
        )


def finished(out: Path) -> dict[str, Any] | None:
    """What `finish_run` noted, or None if the run has not come to its end."""
    return read_run_record(out).get("result")


class RunTime:
    """How long a run has taken over all its stretches; in `run.json` as of every checkpoint.

    What a killed run did after its last checkpoint is done again, so its time does not count.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.before = float(read_run_record(out).get("seconds", 0.0))
        self.began = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Of all stretches up to now."""
        return round(self.before + time.perf_counter() - self.began, 1)

    def note(self) -> None:
        """Write it into the record of the run."""
        record = read_run_record(self.out)
        record["seconds"] = self.seconds
        write_atomically(self.out / "run.json", json.dumps(record, indent=1).encode())


def finish_run(out: Path, seconds: float, summary: dict[str, Any], result: dict[str, Any]) -> None:
    """Add the end of a run to `run.json`.

    Args:
        out: the run folder.
        seconds: of all stretches.
        summary: headline numbers, for reports.
        result: what the same command returns when it is given again.
    """
    record = read_run_record(out)
    record["seconds"] = seconds
    record["summary"] = summary
    record["result"] = result
    write_atomically(out / "run.json", json.dumps(record, indent=1).encode())
