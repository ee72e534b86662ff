"""The store that training reads: opened, or prepared from a folder of volumes; crops of it."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from lightning_fabric import Fabric

from spark3d import build
from spark3d.commands.command_line import place_mark
from spark3d.commands.prepare import prepare_command
from spark3d.commands.runs import on_first_rank, read_run_record
from spark3d.config import DataSection, FinetuneRecipe, PretrainRecipe
from spark3d.data.loader import VolumeCrops
from spark3d.data.names import shown
from spark3d.data.plan import Plan
from spark3d.data.record import CaseRecord
from spark3d.data.store import Store
from spark3d.errors import ConfigError, DataError

SHOWN = 5
"""Cases or files that a message names before it says how many more there are."""


def fixed(value: Any) -> Any:
    """A value that the plan has replaced if it was `auto`."""
    assert value != "auto", "the recipe is not resolved"
    return value


def some(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def existing_folder(path: Path, what: str) -> Path:
    """The folder.

    Raises:
        DataError: it does not exist or is a file.
    """
    if not path.is_dir():
        found = "is a file" if path.exists() else "no such folder"
        raise DataError(f"--data {shown(path)}: {found}; {what}")
    return path


def is_store(folder: Path) -> bool:
    """Whether `prepare` has made this folder."""
    return (folder / "store.json").is_file()


def open_store(data: Path, out: Path, spacing_mm: Any, fabric: Fabric) -> tuple[Store, str]:
    """The store at `data`, or one prepared from the volumes there into `out/store`.

    A run that has begun keeps the store it began with: its folder of volumes is not read again.

    Returns:
        The store, and why its spacing is what it is.

    Raises:
        DataError: no such folder, or nothing in it that can be read.
        ConfigError: the recipe's spacing is not the store's, or the run began on other data.
    """
    existing_folder(data, "give a prepared store or a folder of volumes")
    store, why = data, "as the store was prepared"
    if not is_store(data):
        store, why = out / "store", "median of the volumes" if spacing_mm == "auto" else "as asked"
        if (out / "run.json").is_file():
            refuse_other_source(out, data)
        else:
            spacing = "auto" if spacing_mm == "auto" else ",".join(str(s) for s in spacing_mm)
            on_first_rank(fabric, lambda: prepare_command(data, store, spacing))
    opened = Store.open(store)
    if spacing_mm != "auto" and not np.allclose(opened.spacing_mm, spacing_mm):
        raise ConfigError(
            f"{store} was prepared at {opened.spacing_mm} mm, the recipe asks for {spacing_mm}: "
            f"give data.spacing_mm={list(opened.spacing_mm)} or prepare again"
        )
    return opened, why


def refuse_other_source(out: Path, data: Path) -> None:
    """Keep the store inside a run from being filled from another folder.

    Raises:
        ConfigError: the run in `out` did not begin with the volumes of `data`.
    """
    mark = str(read_run_record(out).get("source", ""))
    if not mark or mark != place_mark(data.resolve(), mark):
        raise ConfigError(
            f"--out {out} is a run on other data than --data {shown(data)}; choose a new folder, "
            "or give the same data to resume"
        )


def planned(data: DataSection, plan: Plan) -> tuple[dict[str, Any], list[str]]:
    """Values for the `auto` of the section `data`, and a line each for the screen."""
    changes: dict[str, Any] = {}
    notes = [f"modality {plan.modality}: {plan.reasons['modality']}"]
    if data.window == "auto":
        changes["data.window"] = plan.window.__dict__
        notes.append(f"window: {plan.reasons['window']}")
    if data.crop == "auto":
        changes["data.crop"] = plan.crop
        notes.append(f"crop {plan.crop}: {plan.reasons['crop']}")
    return changes, notes


def check_crop(
    crop: tuple[int, ...],
    unit: tuple[int, ...],
    key: str,
    unit_name: str,
    least: int = 1,
    otherwise: str = "",
) -> None:
    """Crops are whole numbers of cells (or of a network's stride), at least `least` in all.

    `otherwise` ends the message with what else one may do.

    Raises:
        ConfigError: names the axis and the nearest sizes that fit.
    """
    for axis, (side, step) in enumerate(zip(crop, unit, strict=True)):
        if side % step:
            below, above = side // step * step, -(-side // step) * step
            near = f"are {below} and {above}" if below else f"is {above}"
            raise ConfigError(
                f"{key}={crop} is not a multiple of {unit_name}{unit} along axis {axis}; "
                f"the nearest that fit {near}{otherwise}"
            )
    count = math.prod(side // step for side, step in zip(crop, unit, strict=True))
    if count < least:
        raise ConfigError(
            f"{key}={crop} holds {count} cell of {unit_name}{unit}, but {least} are needed, one "
            "to hide and one to see; enlarge the crop or take smaller cells"
        )


def shared_batch(
    asked: int | Literal["auto"], planned: int, world: int, accumulate: int = 1
) -> int:
    """The global batch: as asked, else as planned, which is rounded up for `world` ranks to share.

    Raises:
        ConfigError: the recipe's own batch cannot be shared, or divided by `accumulate`.
    """
    unit = world * accumulate
    if asked == "auto":
        return -(-planned // unit) * unit
    if asked % world == 0 and asked % unit:
        raise ConfigError(
            f"optim.batch={asked} over {world} ranks cannot be divided by optim.accumulate="
            f"{accumulate}; the nearest batch that can is {max(1, round(asked / unit)) * unit}"
        )
    if asked % world:
        raise ConfigError(
            f"optim.batch={asked} is the batch over all {world} ranks, which cannot share it; the "
            f"nearest that can is {max(1, round(asked / world)) * world}"
        )
    return asked


def volume_crops(
    store: Store,
    records: Sequence[CaseRecord],
    recipe: PretrainRecipe | FinetuneRecipe,
    labelled: bool,
) -> VolumeCrops:
    """The numbered stream of crops of a resolved recipe."""
    data = recipe.data
    return VolumeCrops(
        store,
        [r.id for r in records],
        build.sizes(fixed(data.crop), recipe.dims, "data.crop"),
        build.window(fixed(data.window)),
        recipe.seed,
        rule=build.crop_rule(data, labelled),
        augment=build.augment(data.augment, store.spacing_mm[: recipe.dims]),
        labelled=labelled,
        cache=recipe.compute.cache,
        crops_per_case=data.crops_per_case,
    )


def padding_notes(crops: VolumeCrops) -> list[str]:
    """A line about cases that are smaller than the crop, if there are any."""
    if not crops.padded:
        return []
    count = f"{len(crops.padded)} of {len(crops.ids)} cases"
    size = f"the crop {crops.crop_size}"
    return [f"{count} are smaller than {size} on some axis and padded: {some(crops.padded)}"]
