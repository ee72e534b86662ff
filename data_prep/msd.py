"""Medical Segmentation Decathlon: ten tasks of CT and MR, each one tar.

  where    http://medicaldecathlon.com (links to the tars; no account); not downloaded here
  licence  CC BY-SA 4.0
  size     of the tars, about: Task01_BrainTumour 7.1 GB, Task02_Heart 0.4 GB, Task03_Liver 27 GB,
           Task04_Hippocampus 0.03 GB, Task05_Prostate 0.2 GB, Task06_Lung 8.5 GB,
           Task07_Pancreas 11.5 GB, Task08_HepaticVessel 8.7 GB, Task09_Spleen 1.5 GB,
           Task10_Colon 5.8 GB

  python -m data_prep.msd Task09_Spleen.tar --out data     unpack to data/Task09_Spleen, then check
  python -m data_prep.msd data/Task09_Spleen               check where it lies, write nothing
  python -m data_prep.msd data --splits splits             all tasks of a folder, with their splits
  python -m data_prep.msd data/Task05_Prostate --channel T2 --out data/Prostate_T2

`spark3d prepare` reads a task as it is: the volumes of the 4D tasks (01 and 05) become channels.
With --channel one of them is written as 3D files, labels being linked, to pre-train or fine-tune a
network of one channel. --splits writes the two divisions in common use, made from the task's own
dataset.json: MONAI's (seed 0, a fifth held out) and nnU-Net's five folds (seed 12345).
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.console import Parser, bar, folder_of, run
from spark3d.data.archives import is_archive
from spark3d.data.checks import fault
from spark3d.data.dataset_json import read_json
from spark3d.data.files import write_atomic
from spark3d.data.folders import new_folder, place, write_channel
from spark3d.data.sources import FoundCases, find
from spark3d.errors import ConfigError

TRAINING = {
    "BrainTumour": 484, "Heart": 20, "Liver": 131, "Hippocampus": 260, "Prostate": 32, "Lung": 63,
    "Pancreas": 281, "HepaticVessel": 303, "Spleen": 41, "Colon": 126,
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Unpack or find the tasks, check them, write what was asked for."""
    options = parse(arguments)
    if options.channel is not None and (options.out is None or is_archive(options.source)):
        raise ConfigError(
            "--channel needs an unpacked task and --out, a new folder for the volumes"
        )
    root = options.source if options.channel else folder_of(options.source, options.out)
    tasks = tasks_of(root)
    for task in tasks:
        found, data = find(task), read_json(task / "dataset.json")
        for line in summary(task, found, data):
            print(line)
        if options.splits:
            write_splits(task, found, data, options.splits)
        if options.channel is None:
            print(f"next: spark3d prepare --data {task} --out STORE")
        elif len(tasks) > 1:
            raise ConfigError(f"{root} holds {len(tasks)} tasks; give --channel one of them")
        else:
            write_single(task, found, data, options.channel, options.out)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = Parser("msd", __doc__)
    parser.add_argument("source", type=Path, help="a task's tar or folder, or a folder of tasks")
    parser.add_argument("--out", type=Path, help="new folder: for a tar, or with --channel")
    parser.add_argument("--channel", help="of a 4D task: its name in dataset.json, or its number")
    parser.add_argument("--splits", type=Path, help="folder for the split files")
    return parser.parse_args(arguments)


def tasks_of(root: Path) -> list[Path]:
    """The folders with a `dataset.json`: `root` itself, or those in it.

    Raises:
        DataError: there is none.
    """
    if (root / "dataset.json").is_file():
        return [root]
    inside = sorted(p.parent for p in root.glob("*/dataset.json")) if root.is_dir() else []
    if not inside:
        raise fault(
            "E-NOT-MSD", root, "no dataset.json", "a task such as Task09_Spleen, or its tar",
            "check the path; unpack the tar with this script",
        )  # fmt: skip
    return inside


def summary(task: Path, found: FoundCases, data: dict[str, Any]) -> list[str]:
    """What a task holds, and what is not as published."""
    training = sum(case.section == "training" for case in found.cases)
    release = data.get("release", data.get("relase", "unknown"))  # misspelt in Task04
    names = ", ".join(f"{value} {name}" for name, value in (found.labels or {}).items())
    channels = " in one 4D file each" if found.fourth_axis else ""
    lines = [
        f"{task.name}: {training} training and {len(found.cases) - training} other cases, in place",
        f"  release {release}; modalities {', '.join(modalities(data))}{channels}; labels {names}",
    ]
    published = TRAINING.get(str(data.get("name")), training)
    if training != published:
        lines.append(f"  {training} of the {published} training cases that were published")
    if data.get("numTraining", training) != training:
        lines.append(f"  numTraining says {data['numTraining']}, which is ignored")
    return lines


def modalities(data: dict[str, Any]) -> list[str]:
    """Names of the channels, in order."""
    declared = data.get("modality") or {}
    return [str(declared[key]) for key in sorted(declared, key=int)]


def write_single(
    task: Path, found: FoundCases, data: dict[str, Any], channel: str, out: Path
) -> None:
    """A task of one channel of a 4D task: volumes written anew, labels linked.

    Raises:
        ConfigError: no such channel.
    """
    names = modalities(data)
    by_name = {name.lower(): k for k, name in enumerate(names)} | {
        str(k): k for k in range(len(names))
    }
    if not found.fourth_axis or (number := by_name.get(channel.lower())) is None:
        raise ConfigError(f"--channel {channel}: {task.name} has {', '.join(names)}")
    with new_folder(out) as part, bar("writing volumes") as advance:
        for done, case in enumerate(found.cases, start=1):
            write_channel(case.image, part / case.image.relative_to(task), number)
            if case.label is not None:
                place(case.label, part / case.label.relative_to(task))
            advance(done, len(found.cases))
        single = {**data, "modality": {"0": names[number]}, "tensorImageSize": "3D"}
        write_atomic(part / "dataset.json", json.dumps(single, indent=1).encode())
    print(
        f"wrote {len(found.cases)} volumes of {names[number]} to {out}; labels are links to {task}"
    )
    print(f"next: spark3d prepare --data {out} --out STORE")


def write_splits(task: Path, found: FoundCases, data: dict[str, Any], folder: Path) -> None:
    """MONAI's split and nnU-Net's folds of a task, as files for `split.name`.

    Raises:
        DataError: an nnU-Net dataset, which does not list its files; no case to train on.
    """
    training = {case.image: case.id for case in found.cases if case.section == "training"}
    if found.layout != "decathlon" or not training:
        raise fault(
            "E-NOT-MSD", task, f"{len(training)} training cases ({found.layout} layout)",
            "a task of the Decathlon, whose dataset.json lists what it trains on",
            "divide other data sets with `python -m data_prep.folds`",
        )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    entries = [task / entry["image"] for entry in data["training"]]
    listed = [training[path] for path in entries if path in training]
    test = [case.id for case in found.cases if case.section == "test"]
    train, validation = monai_split(listed)
    about = f"{task.name} as MONAI's DecathlonDataset divides it: seed 0, val_frac 0.2"
    single = {"about": about, "train": train, "validation": validation, "test": test}
    about = f"{task.name} as nnU-Net divides it: five folds of the sorted ids, seed 12345"
    several = {"about": about, "folds": nnunet_folds(listed), "test": test}
    for name, content in (("monai-80-20", single), ("nnunet-folds", several)):
        path = folder / f"{task.name}-{name}.json"
        write_atomic(path, json.dumps(content, indent=1).encode())
        fold = "" if "train" in content else " split.fold=0"
        print(f"  split.use=named split.name={path}{fold}")


def monai_split(ids: list[str]) -> tuple[list[str], list[str]]:
    """Training and validation ids of MONAI's `DecathlonDataset` for ids in the listed order."""
    order = np.arange(len(ids))
    np.random.RandomState(0).shuffle(order)
    held = int(len(ids) * 0.2)
    return [ids[k] for k in order[held:]], [ids[k] for k in order[:held]]


def nnunet_folds(ids: list[str], count: int = 5) -> list[list[str]]:
    """The validation ids of nnU-Net's folds: scikit-learn's shuffled KFold of the sorted ids."""
    order = np.arange(len(ids))
    np.random.RandomState(12345).shuffle(order)
    parts = np.array_split(order, min(count, len(ids)))
    return [[sorted(ids)[k] for k in sorted(part)] for part in parts]


if __name__ == "__main__":
    run(main, None)
