"""A look at the encoder while it is pre-trained: a frozen probe and figures of its stages.

Nothing of the training changes: the encoder is read in evaluation mode without gradients, the
probe's crops have generators of their own, and its head draws nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from spark3d import build
from spark3d.commands.inputs import PretrainInputs
from spark3d.commands.stores import fixed, is_store
from spark3d.config import ProbeSection
from spark3d.data.crops import CropRule
from spark3d.data.loader import VolumeCrops
from spark3d.data.record import CaseRecord
from spark3d.data.splits import few_labels
from spark3d.data.store import Store
from spark3d.errors import ConfigError, DataError
from spark3d.models.linear_probe import LinearProbe, stage_figures
from spark3d.models.losses import DiceCrossEntropy
from spark3d.objectives.base import Objective

BATCH = 2


@dataclass(frozen=True)
class Probe:
    """What is looked at, the same at every look.

    Attributes:
        section: Of the recipe.
        train: Labelled crops that the head learns from; None: figures only.
        test: Those that it is scored on, of other cases.
        labels: Name of every class.
    """

    section: ProbeSection
    train: VolumeCrops | None = None
    test: VolumeCrops | None = None
    labels: tuple[tuple[int, str], ...] = ()

    def due(self, step: int, last: bool) -> bool:
        """Whether to look after this step."""
        every = self.section.every
        return bool(every) and (last or step % every == 0)

    def look(self, objective: Objective, crops: Tensor) -> dict[str, float]:
        """Dice of a fresh head on the frozen stages, and their figures, by name.

        Args:
            objective: in training; it is left as it was.
            crops: to measure the stages on where there are no labelled ones.
        """
        objective.eval()
        try:
            with torch.random.fork_rng(devices=[]):
                return self._look(objective, crops)
        finally:
            objective.train()

    def _look(self, objective: Objective, crops: Tensor) -> dict[str, float]:
        if self.train is None or self.test is None:
            return stage_figures(stages(objective, crops))
        classes = max(number for number, _ in self.labels) + 1
        device = crops.device
        maps = stages(objective, pick(self.train, range(BATCH), device)[0])
        head = LinearProbe([m.shape[1] for m in maps], classes, crops.ndim - 2).to(device)
        self._fit(objective, head, device)
        overlap, sums = torch.zeros(2, classes, dtype=torch.float64)
        head.eval()
        figures: dict[str, float] = {}
        with torch.no_grad():
            for start in range(0, self.section.crops, BATCH):
                batch, labels = pick(self.test, range(start, start + BATCH), device)
                maps = stages(objective, batch)
                figures = figures or stage_figures(maps)
                found = head(maps, batch.shape[2:]).argmax(1)
                for c in range(classes):
                    overlap[c] += float(((found == c) & (labels == c)).sum())
                    sums[c] += float((found == c).sum() + (labels == c).sum())
        dice = {
            name: float(2 * overlap[number] / sums[number])
            for number, name in self.labels
            if sums[number]
        }
        mean = sum(dice.values()) / len(dice) if dice else 0.0
        return {"dice": mean, **{f"dice {name}": value for name, value in dice.items()}, **figures}

    def _fit(self, objective: Objective, head: LinearProbe, device: torch.device) -> None:
        """Train the head alone, on the crops in their order again and again."""
        assert self.train is not None
        optimizer = torch.optim.Adam(head.parameters(), lr=self.section.lr)
        loss = DiceCrossEntropy()
        for step in range(self.section.steps):
            first = step * BATCH % self.section.crops
            batch, labels = pick(self.train, range(first, first + BATCH), device)
            optimizer.zero_grad()
            loss(head(stages(objective, batch), batch.shape[2:]), labels).backward()
            optimizer.step()


def stages(objective: Objective, crops: Tensor) -> tuple[Tensor, ...]:
    """The encoder's stages of whole crops, without gradients."""
    with torch.no_grad():
        return objective.encoder.dense(crops)


def pick(crops: VolumeCrops, numbers: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Crops and labels of some numbers of a stream."""
    items = [crops[number] for number in numbers]
    return (
        torch.stack([item["crop"] for item in items]).to(device),
        torch.stack([item["label"] for item in items]).to(device),
    )


def open_probe(inputs: PretrainInputs) -> Probe:
    """The probe of a resolved recipe.

    Raises:
        ConfigError: labelled data that a probe of this run cannot read, or never looks at.
        DataError: fewer than two labelled cases, or no class in them.
    """
    recipe, section = inputs.recipe, inputs.recipe.probe
    if not section.data:
        return Probe(section)
    if not section.every:
        raise ConfigError(
            f"probe.data={section.data} is never looked at with probe.every=0; set probe.every to "
            "the steps between two looks, or leave probe.data out"
        )
    folder = Path(section.data)
    if inputs.spacing_mm is None or not is_store(folder):
        raise ConfigError(
            f"probe.data={folder} must be a prepared store of labelled volumes, and the run one on "
            "volumes: `spark3d prepare` makes it, or leave probe.data out for figures only"
        )
    store = Store.open(folder)
    if not torch.allclose(torch.tensor(store.spacing_mm), torch.tensor(inputs.spacing_mm)):
        raise ConfigError(
            f"probe.data={folder} has voxels of {store.spacing_mm} mm, the run of "
            f"{inputs.spacing_mm} mm; prepare it again at the spacing of the run"
        )
    labelled = [r for r in store.cases if r.has_label]
    strange = sorted({r.channels for r in labelled} - {recipe.model.in_channels})
    if strange:
        raise ConfigError(
            f"probe.data={folder} has volumes of {strange} channels, the run those of "
            f"{recipe.model.in_channels}; give a store of volumes like the run's"
        )
    train, test = sides(labelled, section.cases, folder)
    names = {value: name for name, value in (store.settings["labels"] or {}).items()}
    values = sorted({v for r in labelled for v in r.labels or () if v > 0})
    if not values:
        raise DataError(
            f"probe.data={folder} has labels without any class; prepare labels that have one, or "
            "leave probe.data out for figures only"
        )

    def crops(ids: Sequence[str]) -> VolumeCrops:
        size = build.sizes(fixed(recipe.data.crop), recipe.dims, "data.crop")
        window = build.window(fixed(recipe.data.window))
        rule = CropRule("balanced", class_probability=1.0)
        return VolumeCrops(store, ids, size, window, recipe.seed, rule, labelled=True)

    return Probe(
        section, crops(train), crops(test), tuple((v, names.get(v, f"class {v}")) for v in values)
    )


def sides(
    labelled: Sequence[CaseRecord], count: int, folder: Path
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """At most `count` cases to learn from, and as many others to be scored on."""
    test = [r.id for r in labelled if r.section == "validation"]
    train = [r.id for r in labelled if r.section != "validation"]
    if not train or not test:
        both = few_labels([r.id for r in labelled], len(labelled)) if labelled else ()
        train, test = list(both[::2]), list(both[1::2])
    if not train or not test:
        raise DataError(
            f"probe.data={folder} has {len(labelled)} labelled cases; a probe needs two at least"
        )
    return few_labels(train, min(count, len(train))), few_labels(test, min(count, len(test)))
