"""The arms of a label-efficiency study: from scratch, or from encoders; and what they share."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from spark3d.commands.finetune import usual_recipe
from spark3d.commands.labelled import encoder_file, plan_from_encoder
from spark3d.config import FinetuneRecipe, changed_keys, find_recipe, load_recipe
from spark3d.errors import ConfigError
from spark3d.weights.exchange import load_encoder
from spark3d.weights.passport import Passport

SCRATCH = "scratch"
FREE = ("split.labels", "split.subset_seed")
"""Keys that the study sets for every job."""


@dataclass(frozen=True)
class Start:
    """One arm.

    Attributes:
        arm: its name.
        encoders: one per pre-training seed, taken in turn; none for scratch.
        lr: its learning rate; None takes the recipe's.
    """

    arm: str
    encoders: tuple[tuple[Path, Passport], ...] = ()
    lr: float | None = None


def read_starts(encoders: Sequence[str], scratch: bool) -> list[Start]:
    """The arms in the order given, scratch first.

    Raises:
        ConfigError: nothing to compare, or a name that cannot stand in a file name.
        DataError: weights that are absent or damaged.
    """
    found: dict[str, list[tuple[Path, Passport]]] = {}
    for item in encoders:
        name, equals, folder = item.partition("=")
        if not equals or Path(item).exists():
            name, folder = Path(item).resolve().name, item
        if not re.fullmatch(r"[\w.+-]+", name) or name == SCRATCH:
            raise ConfigError(
                f"--encoder {item}: the name {name!r} must be letters, digits and -_.+ (and not "
                f"{SCRATCH}); write NAME=RUN"
            )
        file = encoder_file(Path(folder))
        found.setdefault(name, []).append((file, load_encoder(file)[1]))
    starts = [Start(SCRATCH)] if scratch else []
    starts += [Start(name, tuple(pairs)) for name, pairs in found.items()]
    if not starts:
        raise ConfigError("nothing to start from: give --encoder RUN, or leave --no-scratch away")
    return starts


def with_rates(starts: Sequence[Start], rates: Sequence[str]) -> list[Start]:
    """The arms with their own learning rates, given as `NAME=RATE`.

    Raises:
        ConfigError: no such arm, or no rate above 0.
    """
    found: dict[str, float] = {}
    for item in rates:
        arm, _, text = item.rpartition("=")
        try:
            found[arm] = float(text)
        except ValueError:
            found[arm] = math.nan
        if arm not in [s.arm for s in starts] or not 0 < found[arm] < math.inf:
            raise ConfigError(
                f"--lr {item}: write NAME=RATE with a rate above 0 and one of the starts "
                f"{', '.join(s.arm for s in starts)}"
            )
    return [replace(start, lr=found.get(start.arm)) for start in starts]


def base_recipe(
    name: str | None, overrides: tuple[str, ...], starts: Sequence[Start]
) -> FinetuneRecipe:
    """The recipe of all jobs, with the network, spacing and window of the encoders.

    Raises:
        ConfigError: encoders of different networks or inputs, or keys that the study sets itself.
    """
    taken = [o for o in overrides if o.partition("=")[0].strip() in FREE]
    if taken:
        raise ConfigError(f"{taken[0]}: the study sets it; use --labels and --subsets")
    path = find_recipe(name or usual_recipe(overrides), "finetune")
    recipe = load_recipe(FinetuneRecipe, path, overrides)
    passports = [passport for start in starts for _, passport in start.encoders]
    plans = [plan_from_encoder(recipe, passport)[0] for passport in passports]
    first = plans[0] if plans else plan_from_encoder(recipe, None)[0]
    for passport, plan in zip(passports, plans, strict=True):
        if different := changed_keys(first, plan):
            raise ConfigError(
                f"the encoders ask for different {', '.join(different)} ({passport.backbone} and "
                f"{passports[0].backbone}), so they share no start from scratch: set the keys in "
                "the recipe, or make one study for each"
            )
    if first.split.labels is not None:
        raise ConfigError("the recipe sets split.labels; the study does: use --labels")
    return first
