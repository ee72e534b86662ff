"""`pretrain --init`: go on from encoder weights, and from their objective where it is the same."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from spark3d.config import PretrainRecipe, resolve
from spark3d.errors import ConfigError
from spark3d.objectives.base import Objective
from spark3d.weights.exchange import load_encoder, load_into, load_objective
from spark3d.weights.options import merged_options
from spark3d.weights.passport import Passport


@dataclass(frozen=True)
class Start:
    """Weights to begin with.

    Attributes:
        state: Of the encoder.
        passport: Of the encoder weights.
        rest: Of the objective, such as decoder and tokens; empty if there is none.
    """

    state: dict[str, Tensor]
    passport: Passport
    rest: dict[str, Tensor]

    def load(self, objective: Objective, name: str) -> list[str]:
        """Put the weights into an objective; what was done, for the screen.

        Args:
            objective: A new one.
            name: Of its task.

        Raises:
            ConfigError: The encoder's weights do not fit.
        """
        encoder = load_into(objective.encoder.network, self.state, 1.0)
        reason = "none came with the weights"
        if self.rest and self.passport.objective != name:
            reason = f"the weights come from {self.passport.objective}, this is {name}"
        elif self.rest:
            reason = objective.load_rest(self.rest)
        if reason:
            return [str(encoder), f"decoder and tokens start from random weights: {reason}"]
        return [str(encoder), f"decoder and tokens: {len(self.rest)} tensors go on"]

    def extend(self, passport: Passport) -> Passport:
        """The passport of what became of them: all volumes seen, all steps, the whole history."""
        before = self.passport
        told = f"went on from {before.sha256[:12]} ({before.objective or 'imported'})"
        return replace(
            passport,
            content_hashes=tuple(dict.fromkeys((*before.content_hashes, *passport.content_hashes))),
            patient_hashes=tuple(dict.fromkeys((*before.patient_hashes, *passport.patient_hashes))),
            steps=before.steps + passport.steps,
            history=(*before.history, told),
        )


def read_start(init: Path | None, recipe: PretrainRecipe) -> tuple[Start | None, PretrainRecipe]:
    """The weights to go on from, None for random ones, and the recipe with their network's options.

    Raises:
        ConfigError: They are of another network than the recipe's.
        DataError: Files missing or damaged.
    """
    if init is None:
        return None, recipe
    state, passport = load_encoder(init)
    model = recipe.model
    if (passport.backbone, passport.ndim) != (model.backbone, recipe.dims):
        raise ConfigError(
            f"--init {init} is {passport.backbone} in {passport.ndim}D, the recipe "
            f"model.backbone={model.backbone} in {recipe.dims}D; set model.backbone="
            f"{passport.backbone}, dims={passport.ndim}"
        )
    options = merged_options(passport, model.options)
    start = Start(state, passport, load_objective(init, passport))
    return start, resolve(recipe, {"model.options": options})
