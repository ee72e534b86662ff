"""BTCV: abdominal CT of 30 training cases with 13 organs, and 20 test cases without labels.

  where    https://www.synapse.org/Synapse:syn3193805 (Files > Abdomen > RawData.zip); needs a free
           account and the challenge's terms; not downloaded here
  licence  the terms shown there (CC BY 4.0 for the images)
  size     about 1.5 GB as an archive, a little more unpacked

  python -m data_prep.btcv RawData.zip --out data/btcv     unpack, then check
  python -m data_prep.btcv data/btcv                       check a tree where it lies, write nothing

Checked are names only: every image has its label, all 30 training cases are there, and which of
the published splits can be used. Voxels and headers are checked by `spark3d prepare`.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from data_prep.console import Parser, folder_of, run
from spark3d.data.checks import fault
from spark3d.data.sources import FoundCases, find
from spark3d.data.splits import named_split, split_names
from spark3d.errors import DataError

TRAINING = frozenset(f"img{n:04d}" for n in (*range(1, 11), *range(21, 41)))
TEST = frozenset(f"img{n:04d}" for n in range(61, 81))


def main(arguments: Sequence[str] | None = None) -> None:
    """Unpack or find the tree, check it, say what to do next."""
    options = parse(arguments)
    root = folder_of(options.source, options.out)
    found = check(root, options.partial)
    labelled = sum(case.label is not None for case in found.cases)
    print(
        f"{root}: {labelled} labelled and {len(found.cases) - labelled} unlabelled cases, in place"
    )
    usable = usable_splits(found)
    print(f"splits that can be used: {', '.join(usable) or 'none'}")
    print(f"next: spark3d prepare --data {root} --out STORE --spacing 1.5,1.5,2")
    if usable:
        print(
            f"then: spark3d finetune split.use=named split.name={usable[0]} --data STORE --out RUN"
        )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = Parser("btcv", __doc__)
    parser.add_argument("source", type=Path, help="RawData.zip, or the folder it was unpacked to")
    parser.add_argument("--out", type=Path, help="new folder for what the archive holds")
    parser.add_argument("--partial", action="store_true", help="accept missing training cases")
    return parser.parse_args(arguments)


def check(root: Path, partial: bool) -> FoundCases:
    """The cases of a BTCV tree.

    Raises:
        DataError: another layout, labels missing (all are listed), or cases missing.
    """
    found = find(root)
    if found.layout != "btcv":
        raise fault(
            "E-NOT-BTCV", root, f"a folder of {found.layout} layout",
            "RawData/Training/img and RawData/Training/label", "give the folder above RawData",
        )  # fmt: skip
    there = {case.id for case in found.cases if case.label is not None}
    if (missing := sorted(TRAINING - there)) and not partial:
        raise fault(
            "E-BTCV-INCOMPLETE", root, f"{len(TRAINING) - len(missing)} of 30 labelled cases, "
            f"without {', '.join(missing)}", "all that the published splits name",
            "complete the folder, or pass --partial",
        )  # fmt: skip
    return found


def usable_splits(found: FoundCases) -> list[str]:
    """The published splits of BTCV whose cases are all there."""
    usable = []
    for name in (name for name in split_names() if name.startswith("btcv-")):
        try:
            named_split(name).check(case.id for case in found.cases if case.label is not None)
        except DataError:
            continue
        usable.append(name)
    return usable


if __name__ == "__main__":
    run(main, None)
