"""Folds of any data set as a file, whole patients in each, for `split.use=named`.

  python -m data_prep.folds data/Task09_Spleen --out folds.json
  python -m data_prep.folds scans --folds 4 --group-pattern '^(p\\d+)_' --out folds.json
  spark3d finetune split.use=named split.name=folds.json split.fold=0 --data STORE --out RUN

The labelled cases that are listed neither for validation nor for the test are divided; a case keeps
its fold as long as the patients stay the same. Test cases stand in the file as well, to be kept
apart. The patient is the case itself, or what the headers say (DICOM), or the first group of
--group-pattern in the case's id; give `spark3d prepare` the same pattern.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from data_prep.console import Parser, run
from spark3d.data.checks import fault
from spark3d.data.files import write_atomic
from spark3d.data.sources import find
from spark3d.data.splits import folds
from spark3d.errors import ConfigError


def main(arguments: Sequence[str] | None = None) -> None:
    """Divide the cases and write the file."""
    options = parse(arguments)
    if options.out.exists():
        raise ConfigError(f"--out {options.out} exists; a split that was used should stay, so "
                          "choose a new name")  # fmt: skip
    cases = find(options.source, options.group_pattern).cases
    kept = ("validation", "test")
    groups = {c.id: c.group for c in cases if c.label is not None and c.section not in kept}
    if not groups:
        raise fault(
            "E-NO-LABEL", options.source, "no labelled training case", "labelled cases to divide",
            "give a data set with labels: of the Decathlon, nnU-Net or BTCV, or img beside label",
        )  # fmt: skip
    parts = folds(groups, options.folds, options.seed)
    content = {
        "about": f"{len(parts)} folds of {len(groups)} cases of {len(set(groups.values()))} "
        f"patients, seed {options.seed}, made by data_prep.folds",
        "folds": parts,
        "test": [case.id for case in cases if case.section == "test"],
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(options.out, json.dumps(content, indent=1).encode())
    sizes = ", ".join(str(len(part)) for part in parts)
    print(f"{options.out}: {content['about']}; {sizes} cases")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = Parser("folds", __doc__)
    parser.add_argument("source", type=Path, help="a labelled data set in any layout")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--folds", type=int, default=5, help="how many (default 5)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw (default 0)")
    parser.add_argument("--group-pattern", help="finds the patient in a case's id (first group)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    run(main, None)
