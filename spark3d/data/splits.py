"""Who is trained on and who is not: published splits by name, folds by patient, few-label subsets.

Every rule here depends on case ids, groups and a seed alone, never on the order in which cases are
listed: a case keeps its place when others are added.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import xxhash

from spark3d.data.checks import check_apart, fault
from spark3d.data.privacy import key_mark
from spark3d.data.record import CaseRecord
from spark3d.errors import ConfigError, DataError

FOLDER = files("spark3d.data") / "named_splits"
BESIDE = ("validation", "test", "about", "labels")


@dataclass(frozen=True)
class Split:
    """Ids for training, validation and test, and the classes that are scored.

    Attributes:
        name: of the split.
        about: where it comes from.
        train: ids.
        validation: ids.
        test: ids.
        labels: class values that are scored; None for all.
    """

    name: str
    about: str
    train: tuple[str, ...]
    validation: tuple[str, ...] = ()
    test: tuple[str, ...] = ()
    labels: tuple[int, ...] | None = None

    def check(self, present: Iterable[str]) -> None:
        """Refuse a split that names a case twice or one that is not present; all are listed.

        Raises:
            DataError: names the cases.
        """
        named = [*self.train, *self.validation, *self.test]
        if twice := sorted({i for i in named if named.count(i) > 1}):
            raise DataError(
                f"E-SPLIT-TWICE: split {self.name}: found {', '.join(twice)} in two parts; "
                "expected each case once; correct the split"
            )
        if absent := sorted(set(named) - set(present)):
            shown = ", ".join(absent[:8]) + (f" and {len(absent) - 8} more" if absent[8:] else "")
            raise DataError(
                f"E-SPLIT-ABSENT: split {self.name}: found no case {shown}; expected all of its "
                f"{len(named)} cases in the store; prepare them, or choose another split"
            )


def split_names() -> tuple[str, ...]:
    """The published splits that come with the package."""
    return tuple(
        sorted(p.name.removesuffix(".json") for p in FOLDER.iterdir() if p.name.endswith(".json"))
    )


def named_split(name: str, fold: int | None = None) -> Split:
    """A published split by its name, or a split of your own by the path of its JSON file.

    Args:
        name: one of `split_names()`, or a file ending in `.json`; see `parse_split`.
        fold: which fold validates, from 0, where the file holds folds.

    Raises:
        ConfigError: there is none of this name, or the fold does not fit it.
        DataError: the file is absent or no split.
    """
    if name in split_names():
        return parse_split(name, json.loads((FOLDER / f"{name}.json").read_text("utf-8")), fold)
    if not name.endswith(".json"):
        raise ConfigError(
            f"no split is called {name!r}: choose from {', '.join(split_names())}, or give a JSON "
            "file"
        )
    try:
        data = json.loads(Path(name).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise fault(
            "E-SPLIT-FILE", name, f"a file that cannot be read ({type(error).__name__})",
            "JSON with the lists of a split", "check the path of split.name, or correct the file",
        ) from None  # fmt: skip
    return parse_split(Path(name).name, data, fold)


def parse_split(name: str, data: Any, fold: int | None = None) -> Split:
    """A split from the content of its JSON file.

    Args:
        name: of the split, for messages.
        data: `{"train": [...], "validation": [...], "test": [...]}`; or `{"folds": [[...], ...]}`,
            of which one validates and the others train (`about`, `labels` and `test` may stand
            beside); or nnU-Net's list of `{"train": [...], "val": [...]}`.
        fold: from 0, where there are folds.

    Raises:
        ConfigError: a fold that is not there, is missing or not wanted.
        DataError: no such lists.
    """
    try:
        pairs = _pairs(data)
        head = {} if isinstance(data, list) else data
        about, test = str(head.get("about", "")), _ids(head.get("test", []))
        labels = tuple(int(v) for v in head["labels"]) if "labels" in head else None
    except (AttributeError, KeyError, TypeError, ValueError):
        raise fault(
            "E-SPLIT-FILE", name, "something else than the lists of a split",
            f"lists of case ids, called 'train' or 'folds', beside any of {', '.join(BESIDE)}",
            "correct the file",
        ) from None  # fmt: skip
    if "folds" not in head and isinstance(data, dict):
        if fold is not None:
            raise ConfigError(f"split {name} has no folds; leave split.fold out")
        return Split(name, about, *pairs[0], test, labels)
    if fold is None or not 0 <= fold < len(pairs):
        asked = "none was chosen" if fold is None else f"{fold} is not among them"
        raise ConfigError(
            f"split {name} has {len(pairs)} folds, {asked}: give split.fold=0 to {len(pairs) - 1}"
        )
    return Split(f"{name}, fold {fold}", about, *pairs[fold], test, labels)


def _pairs(data: Any) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    """Training and validation ids, once or for each fold."""
    if isinstance(data, list):
        return [(_ids(part["train"]), _ids(part["val"])) for part in data]
    if set(data) - {"train", "folds", *BESIDE}:
        raise KeyError("unknown keys")
    if "folds" not in data:
        return [(_ids(data["train"]), _ids(data.get("validation", [])))]
    parts = [_ids(part) for part in data["folds"]]
    rest = [[case for j, part in enumerate(parts) if j != k for case in part]
            for k in range(len(parts))]  # fmt: skip
    return [(tuple(others), part) for others, part in zip(rest, parts, strict=True)]


def _ids(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(case, str) for case in value):
        raise TypeError("no list of ids")
    return tuple(value)


def folds(groups: Mapping[str, str], count: int, seed: int = 0) -> tuple[tuple[str, ...], ...]:
    """Divide cases into `count` folds of about equal size; cases of one patient stay together.

    Args:
        groups: case id -> patient.
        count: folds, at least 2.
        seed: of the draw.

    Returns:
        The ids of each fold, sorted; every case is in exactly one.

    Raises:
        ConfigError: fewer patients than folds.
    """
    members: dict[str, list[str]] = {}
    for case, group in groups.items():
        members.setdefault(group, []).append(case)
    if not 2 <= count <= len(members):
        raise ConfigError(
            f"{count} folds of {len(members)} patients: choose from 2 to {len(members)} folds"
        )
    drawn = sorted(members, key=lambda group: _draw(group, seed))
    parts: list[list[str]] = [[] for _ in range(count)]
    for group in sorted(drawn, key=lambda g: -len(members[g])):  # stable: large patients first
        min(parts, key=len).extend(members[group])
    return tuple(tuple(sorted(part)) for part in parts)


def held_out(groups: Mapping[str, str], share: float, seed: int = 0) -> frozenset[str]:
    """Cases to keep back: whole patients, until at least `share` of the cases are out.

    Args:
        groups: case id -> patient.
        share: in (0, 1).
        seed: of the draw.

    Raises:
        ConfigError: nothing would be left on one side.
    """
    if not 0 < share < 1 or len(set(groups.values())) < 2:
        raise ConfigError(
            f"a share of {share} of {len(set(groups.values()))} patients leaves one side empty: "
            "give a share between 0 and 1, and at least two patients"
        )
    kept: set[str] = set()
    drawn = sorted(set(groups.values()), key=lambda group: _draw(group, seed))
    for group in drawn[:-1]:
        if len(kept) >= share * len(groups):
            break
        kept.update(case for case, its in groups.items() if its == group)
    return frozenset(kept)


def few_labels(ids: Sequence[str], count: int, seed: int = 0) -> tuple[str, ...]:
    """A random subset of `count` cases; smaller subsets of the same seed lie inside larger ones.

    Returns:
        The ids in the order of their draw, so that a smaller subset is a prefix.

    Raises:
        ConfigError: more than there are, or fewer than one.
    """
    if not 1 <= count <= len(set(ids)):
        raise ConfigError(
            f"{count} labelled cases of {len(set(ids))}: choose from 1 to {len(set(ids))}"
        )
    return tuple(sorted(set(ids), key=lambda case: (_draw(case, seed), case))[:count])


def overlapping(records: Iterable[CaseRecord], hashes: Iterable[str]) -> tuple[str, ...]:
    """Ids of the cases whose voxels are among `hashes` (content hashes of pre-training volumes)."""
    seen = frozenset(hashes)
    return tuple(sorted(record.id for record in records if record.content_hash in seen))


def same_patients(records: Iterable[CaseRecord], hashes: Iterable[str]) -> tuple[str, ...]:
    """Ids of the cases whose patient is among `hashes` (keyed hashes of known patients)."""
    seen = frozenset(hashes)
    return tuple(sorted(record.id for record in records if record.patient in seen))


def without_comparison(records: Iterable[CaseRecord], hashes: Iterable[str]) -> tuple[str, ...]:
    """Ids of the cases whose patient is unknown, or hashed under another key than `hashes`."""
    marks = {key_mark(patient) for patient in hashes}
    return tuple(sorted(r.id for r in records if key_mark(r.patient) not in marks))


def check_disjoint(
    train: Iterable[CaseRecord], other: Iterable[CaseRecord], names: tuple[str, str]
) -> None:
    """Refuse the same patient or the same voxels on both sides.

    Raises:
        DataError: names the cases.
    """
    left, right = tuple(train), tuple(other)
    for what, key in (("patient", "group"), ("voxels", "content_hash")):
        first, second = ({r.id: r.to_json()[key] for r in side} for side in (left, right))
        check_apart(first, second, names, what)


def _draw(name: str, seed: int) -> int:
    return xxhash.xxh3_64_intdigest(f"{seed}:{name}".encode())
