"""Any folders of scans, NIfTI, NRRD, MetaImage and DICOM mixed: one list of cases with ids.

  where    TCIA (https://www.cancerimagingarchive.net), LUNA16 (https://luna16.grand-challenge.org),
           FLARE (https://flare22.grand-challenge.org), AMOS22 and TotalSegmentator (Zenodo), or the
           scans of your own hospital; nothing is downloaded
  licence  of each collection: CC BY 4.0 for LUNA16, AMOS22 and TotalSegmentator, by collection for
           TCIA, the challenge's rules for FLARE
  size     tens to hundreds of GB each; the scans are read where they lie, only the list is written

  python -m data_prep.ct_folder LIDC-IDRI subset0 subset1 FLARE22/images --out cases.json
  python -m data_prep.ct_folder amos22 --skip 'amos_05*' --skip 'amos_06*' --out amos_ct.json
  spark3d prepare --data cases.json --out STORE --modality CT

Each volume file is a case, and so is each DICOM series; label maps (by their names or folders),
localisers and other files are passed over and counted. Ids come from the paths, without what all
of them share; a path that may name a patient, and every DICOM series, gets a keyed hash instead.
Labels that a data set lists are kept if all folders declare the same ones. The list holds paths,
which can name patients: keep it with the scans.
"""

import argparse
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

from data_prep.console import Parser, bar, run
from spark3d.data.case_list import write_case_list
from spark3d.data.checks import check_cases, fault
from spark3d.data.sources import CaseSource, FoundCases, find
from spark3d.errors import ConfigError


def main(arguments: Sequence[str] | None = None) -> None:
    """Find the cases of every folder and write one list."""
    options = parse(arguments)
    if options.out.exists():
        raise ConfigError(f"--out {options.out} exists; choose a new name")
    parts: list[tuple[Path, FoundCases]] = []
    for folder in options.folders:
        with bar(f"reading headers in {folder.name}") as advance:
            found = find(folder, options.group_pattern, advance)
        kept, skipped = without(found, options.skip)
        parts.append((folder, kept))
        for line in summary(folder, kept, skipped):
            print(line)
    merged = merge(parts)
    check_cases(merged.cases, options.out)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_case_list(options.out, merged)
    patients = len({case.group for case in merged.cases})
    print(f"{options.out}: {len(merged.cases)} cases of {patients} patients, read where they lie")
    print(f"next: spark3d prepare --data {options.out} --out STORE")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = Parser("ct_folder", __doc__)
    parser.add_argument("folders", type=Path, nargs="+", help="folders, searched recursively")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument(
        "--skip", action="append", default=[], help="leave out ids like this (*, ?)"
    )
    parser.add_argument("--group-pattern", help="finds the patient in a case's id (first group)")
    return parser.parse_args(arguments)


def without(found: FoundCases, patterns: Sequence[str]) -> tuple[FoundCases, int]:
    """The cases whose ids match none of the patterns, and how many did."""
    kept = tuple(c for c in found.cases if not any(fnmatch(c.id, pattern) for pattern in patterns))
    return replace(found, cases=kept), len(found.cases) - len(kept)


def summary(folder: Path, found: FoundCases, skipped: int) -> list[str]:
    """What was found and what was passed over."""
    series = sum(bool(case.slices) for case in found.cases)
    kinds = f"{series} DICOM series, {len(found.cases) - series} files"
    lines = [f"{folder}: {len(found.cases)} cases ({found.layout} layout; {kinds})"]
    if found.passed_over:
        lines.append(f"  passed over {len(found.passed_over)} files named as label maps")
    lines += [f"  {notice}" for notice in found.notices]
    if skipped:
        lines.append(f"  left out {skipped} cases by --skip")
    return lines


def merge(parts: Sequence[tuple[Path, FoundCases]]) -> FoundCases:
    """One list of all folders: short ids, made unique by the folder's name where they clash.

    Raises:
        DataError: folders of 4D files and others.
    """
    founds = [found for _, found in parts]
    if len({found.fourth_axis for found in founds}) > 1:
        raise fault(
            "E-4D", "the folders", "4D files in some and volumes in others", "one kind",
            "take one channel with `python -m data_prep.msd --channel`, or make two lists",
        )  # fmt: skip
    short = [(folder.resolve().name, with_short_ids(found.cases)) for folder, found in parts]
    counts = Counter(case.id for _, cases in short for case in cases)
    cases = [
        case if counts[case.id] == 1 else renamed(case, f"{name}__{case.id}")
        for name, part in short
        for case in part
    ]
    agree = all(found.labels == founds[0].labels for found in founds)
    if not agree:
        print("labels are left out: the folders declare different ones")
        cases = [replace(case, label=None, section=unlabelled(case)) for case in cases]
    modalities = {found.modality for found in founds}
    return FoundCases(
        "list",
        tuple(sorted(cases, key=lambda case: case.id)),
        modalities.pop() if len(modalities) == 1 else "auto",
        founds[0].labels if agree else None,
        founds[0].fourth_axis,
    )


def unlabelled(case: CaseSource) -> str:
    """The section of a case without its label: what is kept for scoring stays kept."""
    return "unlabelled" if case.section == "training" else case.section


def with_short_ids(cases: Sequence[CaseSource]) -> list[CaseSource]:
    """Without what all ids share at either end: `images__` and `_0000` of FLARE, `__ct` of others.

    Ids of DICOM series are keyed hashes and stay.
    """
    files = [case for case in cases if not case.slices]
    parts = [case.id.split("__") for case in files]
    if len(files) < 2:
        return list(cases)
    first, last = shared(parts), shared([part[::-1] for part in parts])
    short = ["__".join(part[first : len(part) - last]) for part in parts]
    if all(name.endswith("_0000") for name in short):
        short = [name.removesuffix("_0000") for name in short]
    if len(set(short)) < len(files) or not all(short):
        return list(cases)
    new = {case.id: name for case, name in zip(files, short, strict=True)}
    return [renamed(case, new.get(case.id, case.id)) for case in cases]


def shared(lists: Sequence[Sequence[str]]) -> int:
    """How many elements all lists have in common from the start."""
    count = 0
    for same in zip(*lists, strict=False):
        if len(set(same)) > 1:
            break
        count += 1
    return count


def renamed(case: CaseSource, new: str) -> CaseSource:
    """The case under another id; its patient follows if it was the id."""
    return replace(case, id=new, group=new if case.group == case.id else case.group)


if __name__ == "__main__":
    run(main, None)
