"""Named protocols: frozen fine-tuning recipes, so that numbers of different runs compare.

A protocol is a file of `configs/protocols`: a whole recipe, and a head that says which data it
needs. Its content is sealed by a hash in `frozen.json`, whatever its comments and layout; a change
needs a new name. Network, seed, number of labels, the encoder's learning rates and everything of
`compute` and `log` are the user's choice, all else is refused.
"""

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spark3d.config import (
    AugmentSection,
    FinetuneRecipe,
    ProtocolSection,
    load_recipe,
    resolve,
    to_tree,
    validate,
)
from spark3d.errors import ConfigError, DataError
from spark3d.recipe_files import apply_override, find_recipe, read_yaml

FREE = (
    "model", "seed", "split.labels", "split.subset_seed", "optim.encoder_lr_ratio",
    "optim.layer_decay", "optim.freeze_steps", "optim.accumulate", "optim.precision",
    "compute", "log",
)  # fmt: skip
"""Keys, and sections, that a protocol leaves to the user."""
SEALED_AUGMENT = to_tree(AugmentSection())
"""What a protocol's `data.augment` leaves out is as it was when the protocols were sealed."""
SMOKE_STEPS, SMOKE_CROP, SMOKE_COARSER = 4, 32, 4
SMOKE_NOTE = "smoke run, shortened: no result"


@dataclass(frozen=True)
class Protocol:
    """A frozen recipe and the data that it is for.

    Attributes:
        name: As asked for.
        about: Where split and recipe come from.
        prepare: Command that makes the data ready.
        cases: Labelled cases needed of every section; empty where the split names them.
        labels: Names of the classes 1, 2, ...
        tree: The recipe as in the file.
        sha256: Of the whole content.
    """

    name: str
    about: str
    prepare: str
    cases: Mapping[str, int]
    labels: tuple[str, ...]
    tree: Mapping[str, Any]
    sha256: str

    def recipe(self, overrides: Sequence[str] = (), smoke: bool = False) -> FinetuneRecipe:
        """The recipe with what the user chose; `smoke` shortens it.

        Raises:
            ConfigError: an override of a frozen key, or one that is wrong in itself.
        """
        for item in overrides:
            key = item.partition("=")[0].strip()
            if not any(key == free or key.startswith(f"{free}.") for free in FREE):
                raise ConfigError(
                    f"{key} is fixed by the protocol {self.name}; free are {', '.join(FREE)}. For "
                    f"another value copy {self.name}.yaml without its head and give that as recipe"
                )
        tree: dict[str, Any] = json.loads(json.dumps(self.tree))
        for item in overrides:
            apply_override(tree, item)
        tree["data"]["augment"] = {**SEALED_AUGMENT, **tree["data"]["augment"]}
        recipe = validate(FinetuneRecipe, tree, self.name)
        changes = shortened(recipe) if smoke else {}
        seal = ProtocolSection(name=self.name, sha256=self.sha256, smoke=smoke)
        return resolve(recipe, {**changes, "protocol": seal.model_dump()})

    def check_cases(self, sections: Mapping[str, str], split: Collection[str], data: Path) -> None:
        """Refuse data without the cases that the protocol needs.

        Args:
            sections: Section of every labelled case, by id.
            split: Ids that the split names, none if it goes by sections.
            data: Where they were looked for.

        Raises:
            DataError: names the missing cases and the command that makes them ready.
        """
        remedy = f"prepare them: {self.prepare}"
        if missing := sorted(set(split) - set(sections)):
            raise DataError(
                f"protocol {self.name}: {len(missing)} of its {len(split)} labelled cases are not "
                f"in {data}: {', '.join(missing)}; {remedy}"
            )
        for section, wanted in self.cases.items():
            found = sum(its == section for its in sections.values())
            if found < wanted:
                raise DataError(
                    f"protocol {self.name}: {wanted - found} of its {wanted} labelled {section} "
                    f"cases are not in {data}, which has {found}; {remedy}"
                )

    def check_labels(self, found: Collection[int]) -> None:
        """Refuse classes that the protocol does not know.

        Raises:
            DataError: names them.
        """
        if strange := sorted(value for value in found if value > len(self.labels)):
            raise DataError(
                f"protocol {self.name} knows the labels 1 to {len(self.labels)} "
                f"({', '.join(self.labels)}); the data have {strange} too: give the data it is for"
            )


def shortened(recipe: FinetuneRecipe) -> dict[str, Any]:
    """Changes by which a recipe ends within minutes on a CPU; its scores mean nothing."""
    crop = recipe.data.crop
    sides = (crop,) * recipe.dims if isinstance(crop, int) else crop
    changes: dict[str, Any] = {
        "optim.steps": SMOKE_STEPS, "optim.warmup": 1, "optim.batch": 2, "optim.accumulate": 1,
        "data.crops_per_case": 1, "window_overlap": 0.0, "log.validate_every": 0,
    }  # fmt: skip
    if sides != "auto":
        changes["data.crop"] = tuple(min(side, SMOKE_CROP) for side in sides)
    if recipe.data.spacing_mm != "auto":
        changes["data.spacing_mm"] = tuple(SMOKE_COARSER * s for s in recipe.data.spacing_mm)
    return changes


def read_protocol(name: str) -> Protocol:
    """The protocol called `name`.

    Raises:
        ConfigError: there is none, or its file is not as it was sealed.
    """
    if "/" in name or name.endswith(".yaml"):
        raise ConfigError(f"--protocol {name}: give a name; a file of your own is a recipe")
    path = find_recipe(name, "protocols")
    tree = read_yaml(path.read_text(encoding="utf-8"), path.name)
    sealed = json.loads((path.parent / "frozen.json").read_text(encoding="utf-8"))
    found = content_hash(tree)
    if sealed.get(path.stem) != found:
        raise ConfigError(
            f"{path} is not the protocol that was frozen under this name (its hash is "
            f"{found[:12]}, not {str(sealed.get(path.stem))[:12]}); restore it, or give your own "
            "recipe without --protocol"
        )
    head = tree.pop("protocol")
    return Protocol(
        path.stem, head["about"], head["prepare"], head.get("cases", {}), tuple(head["labels"]),
        tree, found,
    )  # fmt: skip


def content_hash(tree: Any) -> str:
    """SHA-256 of a tree's content, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def own_recipe(path: Path, overrides: Sequence[str]) -> FinetuneRecipe:
    """A recipe that is no protocol's.

    Raises:
        ConfigError: it says it were.
    """
    recipe = load_recipe(FinetuneRecipe, path, overrides)
    if recipe.protocol is not None:
        raise ConfigError(
            f"{path.name} says it is of the protocol {recipe.protocol.name}: give --protocol "
            f"{recipe.protocol.name}, or take the section `protocol` out of it"
        )
    return recipe
