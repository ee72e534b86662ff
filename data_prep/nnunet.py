"""nnU-Net raw datasets (versions 1 and 2): read where they lie, or made from any labelled data set.

  where    your own nnUNet_raw folder; nothing is downloaded
  licence  that of the data inside
  size     links take no room; with --copy as much as the volumes; the volumes of 4D files and of
           .nii files are written anew, as .nii.gz

  python -m data_prep.nnunet nnUNet_raw/Dataset501_Spleen      check; `spark3d prepare` reads it
  python -m data_prep.nnunet data/Task09_Spleen --out nnUNet_raw/Dataset509_Spleen
  python -m data_prep.nnunet scans --out nnUNet_raw/Dataset600_Mine --channels T2 --labels tumour=1

What comes out has one file per channel (imagesTr/CASE_0000.nii.gz), labelsTr/CASE.nii.gz, imagesTs
and the dataset.json of version 2. Where the data set lists validation cases, splits_final.json
keeps them apart: put it into nnUNet_preprocessed/DatasetNNN_Name. Links stay good as long as the
originals stay where they are.
"""

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path

from data_prep.console import Advance, Parser, bar, run
from spark3d.data.checks import check_label_names, fault
from spark3d.data.dataset_json import read_json
from spark3d.data.files import write_atomic
from spark3d.data.folders import Placing, new_folder, place, write_channel
from spark3d.data.sources import CaseSource, FoundCases, find
from spark3d.errors import ConfigError

NAME = re.compile(r"Dataset\d{3}_\w+")
ENDING = ".nii.gz"


def main(arguments: Sequence[str] | None = None) -> None:
    """Check a data set, or write it as nnU-Net reads it."""
    options = parse(arguments)
    found = find(options.source)
    labelled = [case for case in found.cases if case.label is not None]
    print(f"{options.source}: {len(found.cases)} cases ({found.layout}), {len(labelled)} labelled")
    if options.out is None:
        print(f"next: spark3d prepare --data {options.source} --out STORE")
        return
    if not NAME.fullmatch(options.out.name):
        raise ConfigError(f"--out {options.out}: call the folder DatasetNNN_Name, NNN three digits")
    channels = (
        options.channels.split(",") if options.channels else channels_of(found, options.source)
    )
    labels = parse_labels(options.labels) if options.labels else labels_of(found, options.source)
    with new_folder(options.out) as part, bar("writing cases") as advance:
        written = write_cases(found, part, channels, "copy" if options.copy else "link", advance)
        write_description(part, options.out.name, channels, labels, written)
    training, test = len(written["imagesTr"]), len(written["imagesTs"])
    print(
        f"wrote {training} training and {test} test cases to {options.out}; "
        f"{len(found.cases) - training - test} without label left out"
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = Parser("nnunet", __doc__)
    parser.add_argument("source", type=Path, help="a data set in any layout that prepare reads")
    parser.add_argument("--out", type=Path, help="new folder DatasetNNN_Name")
    parser.add_argument("--channels", help="names with commas; default: those declared")
    parser.add_argument("--labels", help="name=value with commas; default: those declared")
    parser.add_argument("--copy", action="store_true", help="copy files instead of linking them")
    return parser.parse_args(arguments)


def channels_of(found: FoundCases, source: Path) -> list[str]:
    """Names of the channels: declared in `dataset.json`, or CT for BTCV.

    Raises:
        ConfigError: nothing declares them.
    """
    if found.layout == "btcv":
        return ["CT"]
    file = source / "dataset.json"
    data = read_json(file) if file.is_file() else {}
    declared = data.get("channel_names", data.get("modality"))
    if not isinstance(declared, dict) or not declared:
        raise ConfigError(
            f"{source} does not name its channels; pass --channels, such as CT or T1,T2"
        )
    return [str(declared[key]) for key in sorted(declared, key=int)]


def parse_labels(text: str) -> dict[str, int]:
    """Read "liver=1,spleen=2"; the background is added.

    Raises:
        ConfigError: something else, or values with gaps.
    """
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(name.strip() and value.strip().isdigit() for name, _, value in pairs):
        raise ConfigError(f"--labels {text}: give name=value with commas, such as liver=1,spleen=2")
    return {"background": 0} | {name.strip(): int(value) for name, _, value in pairs}


def labels_of(found: FoundCases, source: Path) -> dict[str, int]:
    """The declared labels, 0 being called background as nnU-Net wants it.

    Raises:
        ConfigError: none are declared.
    """
    if not found.labels:
        raise ConfigError(f"{source} does not name its labels; pass --labels, such as liver=1")
    return {name if value else "background": value for name, value in found.labels.items()}


def write_cases(
    found: FoundCases, part: Path, channels: Sequence[str], how: Placing, advance: Advance
) -> dict[str, list[CaseSource]]:
    """Place the files of every case; returns the cases of each folder."""
    written: dict[str, list[CaseSource]] = {"imagesTr": [], "imagesTs": []}
    for done, case in enumerate(found.cases, start=1):
        folder = "imagesTs" if case.section == "test" else "imagesTr"
        if case.label is not None or folder == "imagesTs":
            for number, name in enumerate(channels):
                target = part / folder / f"{case.id}_{number:04d}{ENDING}"
                if found.fourth_axis:
                    write_channel(case.image, target, number)
                elif number < len(case.images) == len(channels):
                    move(case.images[number], target, how)
                else:
                    raise fault(
                        "E-CHANNELS", case.id, f"{len(case.images)} files", f"{len(channels)}, "
                        f"{name} among them", "correct --channels or the case",
                    )  # fmt: skip
            if case.label is not None:
                folder_of_label = part / folder.replace("images", "labels")
                move(case.label, folder_of_label / f"{case.id}{ENDING}", how)
            written[folder].append(case)
        advance(done, len(found.cases))
    return written


def move(source: Path, target: Path, how: Placing) -> None:
    """Link or copy a `.nii.gz`; write a `.nii` anew, as the ending is one for the whole data set.

    Raises:
        DataError: another format.
    """
    if source.name.endswith(ENDING):
        place(source, target, how)
    elif source.name.endswith(".nii"):
        write_channel(source, target)
    else:
        raise fault(
            "E-FORMAT", source, "a file that is no NIfTI", "NIfTI", "convert it first",
        )  # fmt: skip


def write_description(
    part: Path,
    name: str,
    channels: Sequence[str],
    labels: dict[str, int],
    written: dict[str, list[CaseSource]],
) -> None:
    """`dataset.json` of version 2, and `splits_final.json` where validation cases are listed."""
    check_label_names(labels, name)
    description = {
        "name": name,
        "channel_names": {str(number): channel for number, channel in enumerate(channels)},
        "labels": labels,
        "numTraining": len(written["imagesTr"]),
        "file_ending": ENDING,
    }
    write_atomic(part / "dataset.json", json.dumps(description, indent=1).encode())
    held = [case.id for case in written["imagesTr"] if case.section == "validation"]
    if held:
        train = [case.id for case in written["imagesTr"] if case.section != "validation"]
        splits = [{"train": train, "val": held}]
        write_atomic(part / "splits_final.json", json.dumps(splits, indent=1).encode())


if __name__ == "__main__":
    run(main, None)
