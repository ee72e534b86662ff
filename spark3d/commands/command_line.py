"""The command line as records and reports keep it: what was done, without the paths of files.

A folder may be called after a patient, and records leave the machine. What was read stands there as
hashes of its content; where it lay is told by the name of the option alone.
"""

import hashlib
import os
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from spark3d.config import Section, resolve, to_tree
from spark3d.data.names import safe_name

R = TypeVar("R", bound=Section)
PLACES = frozenset(
    {
        "--data", "--out", "--encoder", "--init", "--exclude", "--model", "--predictions",
        "--references", "--images", "--names", "--volumes",
    }
)  # fmt: skip
"""Options whose value is a path, whatever it looks like."""
PACKAGE = Path(__file__).resolve().parents[1]
"""A program that starts in this folder is `spark3d`."""
PATH_KEYS = ("split.name", "probe.data")
"""Keys of recipes that may be paths."""


def recorded_command(words: Sequence[str] | None = None) -> list[str]:
    """Words of this command, paths replaced: `--data DATA`, `split.name=PATH`, `PATH`.

    Args:
        words: after the program's name; by default those of this process, which may be a script
            that calls a command: `python study.py --data DATA`.
    """
    told, option = ["spark3d"] if words is not None else _program(), ""
    for word in sys.argv[1:] if words is None else words:
        name, equals, value = word.partition("=")
        if option in PLACES:
            told.append(_of(option, word))
        elif equals and name in PLACES:
            told.append(f"{name}={_of(name, value)}")
        elif equals and _is_path(value, name in PATH_KEYS):
            told.append(f"{name}=PATH")
        else:
            told.append("PATH" if not equals and _is_path(word) else word)
        option = word if word.startswith("--") and not equals else ""
    return told


def _program() -> list[str]:
    """What was started: this package's own command, or a script of somebody's."""
    started = Path(sys.argv[0])
    script = started.suffix == ".py" and started.name != "__main__.py"
    own = not script or started.resolve().is_relative_to(PACKAGE)
    return ["spark3d"] if own else ["python", safe_name(started.name, "PATH")]


def without_paths(recipe: R) -> R:
    """The recipe with the mere names of files where it holds paths, for records and weights."""
    tree, changes = to_tree(recipe), {}
    for key in PATH_KEYS:
        section, _, name = key.partition(".")
        value = str((tree.get(section) or {}).get(name, ""))
        if os.sep in value:
            changes[key] = safe_name(Path(value).name, "PATH")
    return resolve(recipe, changes) if changes else recipe


def _of(option: str, value: str) -> str:
    """`--encoder NAME=FOLDER` keeps the name, which the user gave to be shown."""
    name, equals, _ = value.partition("=")
    place = option.removeprefix("--").upper()
    return f"{name}={place}" if equals and os.sep not in name else place


def _is_path(text: str, may_be: bool = False) -> bool:
    """Leads to a place by its form, or (where there may be a path) has a separator or is there."""
    if text.startswith(("/", "~", "./", "../")):
        return True
    return (os.sep in text or may_be) and Path(text).exists()


def place_mark(path: Path, mark: str = "") -> str:
    """A mark that tells whether a path is the same as before, and not which it is.

    Salted, and slow to compute (scrypt), so that guesses are dear; it needs no key, as the same run
    may go on under another user or on another machine.

    Args:
        path: in the form in which it is to be compared.
        mark: an earlier one, whose salt is taken; a path in plain words, of older runs, is
            answered with the path.
    """
    kind, _, rest = mark.partition(":")
    if mark and kind != "scrypt":
        return str(path)
    salt = rest.partition(":")[0] or secrets.token_hex(16)
    digest = hashlib.scrypt(str(path).encode(), salt=salt.encode(), n=2**14, r=8, p=1, dklen=16)
    return f"scrypt:{salt}:{digest.hex()}"
