"""Who trains, validates and is kept for the test; leaks between them and from pre-training."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from spark3d.commands.stores import some
from spark3d.config import SplitSection
from spark3d.data.record import CaseRecord
from spark3d.data.splits import (
    check_disjoint,
    few_labels,
    held_out,
    named_split,
    overlapping,
    same_patients,
    without_comparison,
)
from spark3d.errors import ConfigError, DataError
from spark3d.weights.passport import Passport

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SplitCases:
    """The cases of a fine-tuning run.

    Attributes:
        train: labelled, to learn from.
        validation: labelled, scored at the end.
        test: neither; no weights may have seen them.
        note: where the split comes from, for the screen.
        scored: labels that the split scores; none for all.
    """

    train: tuple[CaseRecord, ...]
    validation: tuple[CaseRecord, ...]
    test: tuple[CaseRecord, ...] = ()
    note: str = ""
    scored: tuple[int, ...] = ()


def split_cases(split: SplitSection, records: Sequence[CaseRecord]) -> SplitCases:
    """Divide the cases of a store by the recipe's section `split`.

    Raises:
        ConfigError: ids, a name or a fold that do not fit.
        DataError: a split file that does not fit the cases.
    """
    if split.use != "named" and (split.name or split.fold is not None):
        raise ConfigError(f"split.name and split.fold need split.use=named, not {split.use}")
    if split.use == "named":
        parts = _by_name(split, records)
    elif split.use == "list":
        parts = _by_lists(split, records)
    else:
        parts = _by_sections(split, records)
    if split.labels is None:
        return parts
    by_id = {r.id: r for r in parts.train}
    kept = few_labels(list(by_id), split.labels, split.subset_seed)
    return replace(parts, train=tuple(by_id[i] for i in kept))


def _by_name(split: SplitSection, records: Sequence[CaseRecord]) -> SplitCases:
    chosen = named_split(split.name, split.fold)
    by_id = {r.id: r for r in records}
    chosen.check(by_id)
    if bare := [i for i in (*chosen.train, *chosen.validation) if not by_id[i].has_label]:
        raise DataError(
            f"E-SPLIT-LABEL: split {chosen.name}: found no label of {some(bare)}; expected one of "
            "every training and validation case; prepare them with their labels"
        )
    train, validation, test = (
        tuple(by_id[i] for i in ids) for ids in (chosen.train, chosen.validation, chosen.test)
    )
    note = f"split {chosen.name}, {len(test)} test cases kept apart; {chosen.about}".rstrip("; ")
    return SplitCases(train, validation, test, note, chosen.labels or ())


def _by_lists(split: SplitSection, records: Sequence[CaseRecord]) -> SplitCases:
    by_id = {r.id: r for r in records if r.has_label}
    named = [*split.train, *split.validation]
    if not split.train:
        raise ConfigError("split.use=list needs ids in split.train")
    if unknown := [i for i in named if i not in by_id]:
        raise ConfigError(
            f"split.train and split.validation name cases without a label here: {some(unknown)}"
        )
    if twice := sorted({i for i in named if named.count(i) > 1}):
        raise ConfigError(f"split.train and split.validation name a case twice: {some(twice)}")
    train, validation = (tuple(by_id[i] for i in ids) for ids in (split.train, split.validation))
    return SplitCases(train, validation)


def _by_sections(split: SplitSection, records: Sequence[CaseRecord]) -> SplitCases:
    labelled = [r for r in records if r.has_label]
    test = tuple(r for r in records if r.section == "test")
    validation = tuple(r for r in labelled if r.section == "validation")
    train = tuple(r for r in labelled if r.section == "training")
    if validation and split.use == "dataset":
        return SplitCases(train, validation, test)
    train = tuple(r for r in labelled if r.section != "test")
    held = held_out({r.id: r.group for r in train}, split.validation_share)
    return SplitCases(
        tuple(r for r in train if r.id not in held), tuple(r for r in train if r.id in held), test
    )


def check_overlap(parts: SplitCases, passport: Passport | None, allow: bool) -> dict[str, Any]:
    """Refuse a patient or voxels in two parts, and held-out ones seen in pre-training.

    Training volumes seen in pre-training are usual, and only told.

    Args:
        parts: of the run.
        passport: of the encoder; None for a start from scratch.
        allow: warn instead of refusing.

    Returns:
        What the run's record and reports say: `allowed`, the warnings; `pretraining`, how many
        volumes of each part the encoder has seen (absent without an encoder); `patients`, of how
        many that can be compared it has seen the patient (absent where its data tell none).

    Raises:
        DataError: names the cases, unless `allow`.
    """
    problems = leaks(parts)
    record: dict[str, Any] = {}
    if passport is not None:
        sides = {"training": parts.train, "validation": parts.validation, "test": parts.test}
        seen = {name: overlapping(side, passport.content_hashes) for name, side in sides.items()}
        record["pretraining"] = {name: [len(seen[name]), len(sides[name])] for name in sides}
        if passport.patient_hashes:
            record["patients"], found = _patients_seen(sides, seen, passport)
            problems += found
        problems += [
            f"{len(seen[name])} {name} volumes were seen in pre-training: {some(seen[name])}; "
            "pre-train without them"
            for name in ("validation", "test")
            if seen[name]
        ]
        if seen["training"]:
            log.warning(
                "%d of %d training volumes were seen in pre-training, without their labels",
                len(seen["training"]), len(parts.train),
            )  # fmt: skip
    return weighed(problems, record, allow)


def weighed(problems: list[str], record: dict[str, Any], allow: bool) -> dict[str, Any]:
    """What a run's record says of overlaps; empty where there is nothing to say.

    Raises:
        DataError: there are problems, unless `allow`, which warns.
    """
    if problems and not allow:
        raise DataError(f"{'; '.join(problems)}, or pass --allow-overlap")
    for problem in problems:
        log.warning("%s (allowed; scores are not those of unseen cases)", problem)
    return {**record, "allowed": problems} if record or problems else {}


def _patients_seen(
    sides: Mapping[str, Sequence[CaseRecord]],
    volumes: Mapping[str, Sequence[str]],
    passport: Passport,
) -> tuple[dict[str, list[int]], list[str]]:
    """Cases of each part whose patient is known to the encoder, beside those whose voxels are.

    Returns:
        How many there are of how many that can be compared, by part; and the problems.
    """
    counts, problems = {}, []
    for name, side in sides.items():
        apart = without_comparison(side, passport.patient_hashes)
        found = same_patients(side, passport.patient_hashes)
        counts[name] = [len(found), len(side) - len(apart)]
        others = sorted(set(found) - set(volumes[name]))
        if name == "training" or not side:
            continue
        if others:
            problems.append(
                f"E-LEAK-PATIENT: {len(others)} {name} volumes are of patients seen in "
                f"pre-training: {some(others)}; pre-train without these patients"
            )
        if apart:
            log.warning(
                "the patients of %d of %d %s volumes cannot be compared with those of "
                "pre-training, only their voxels: give 'spark3d prepare' --group-pattern, and "
                "SPARK3D_ID_KEY the secret of that store",
                len(apart), len(side), name,
            )  # fmt: skip
    return counts, problems


def leaks(parts: SplitCases) -> list[str]:
    """The same patient or the same voxels in two parts, told as errors are."""
    pairs = (
        (parts.train, parts.validation, ("training", "validation")),
        (parts.train, parts.test, ("training", "test")),
        (parts.validation, parts.test, ("validation", "test")),
    )
    found = []
    for one, other, names in pairs:
        try:
            check_disjoint(one, other, names)
        except DataError as error:
            found.append(str(error))
    return found
