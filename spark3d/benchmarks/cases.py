"""What is measured: networks, tasks, sizes and shares of hidden cells. Imports no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal

Task = Literal["encoder", "step"]
Measure = Literal["time", "saved", "peak", "profile"]
STRIDE = 32


@dataclass(frozen=True)
class Net:
    """A network of the bench; `widths` are those of the light and of the official decoder."""

    backbone: str
    norm: str
    widths: tuple[int, int] = (256, 768)
    options: Mapping[str, Any] = field(default_factory=dict)


NETWORKS: Mapping[str, Net] = MappingProxyType(
    {
        "resnet50": Net("monai/resnet50", "bn"),
        "convnext_tiny": Net("timm/convnext_tiny", "ln"),
        "quick_resnet": Net(
            "monai/resnet50",
            "bn",
            (16, 32),
            {"widen_factor": 1 / 16},
        ),
        "quick_convnext": Net(
            "timm/convnext_tiny",
            "ln",
            (16, 32),
            {"depths": (1, 1, 1, 1), "dims": (4, 8, 8, 16)},
        ),
    }
)

CONTESTANTS: Mapping[Task, tuple[str, ...]] = MappingProxyType(
    {
        "encoder": ("e0", "e1", "p"),
        "step": ("e0+official", "e1+light", "p+light"),
    }
)
"""e0: emulation of public ports; e1: the same, tuned; p: packed cells."""


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        network: Name in NETWORKS.
        task: Forward and backward of the encoder, or a whole training step.
        crop: Voxels per axis, a multiple of the total stride.
        ratio: Share of hidden cells.
        batch: Crops.
        contestants: What is compared; the last one is what the others are divided by.
    """

    network: str
    task: Task
    crop: int
    ratio: float
    batch: int
    contestants: tuple[str, ...]

    @property
    def name(self) -> str:
        """Identifies the case in the results."""
        return (
            f"{self.network} {self.task} {self.crop}^3 batch {self.batch} hidden {self.ratio:g} "
            f"{' '.join(self.contestants)}"
        )

    @property
    def cells(self) -> int:
        """Cells of one crop."""
        return (self.crop // STRIDE) ** 3

    @property
    def visible(self) -> int:
        """Visible cells of one crop, as `spark3d.sparse.mask.visible_count`."""
        return max(1, min(self.cells - 1, round(self.cells * (1 - self.ratio))))

    @property
    def bound(self) -> float:
        """Cells over visible cells: what leaving out the hidden ones can bring at most."""
        return self.cells / self.visible


@dataclass(frozen=True)
class Job:
    """One process: a case and what is measured of it."""

    measure: Measure
    case: Case
    contestant: str | None = None  # peak memory and profile are of a process with one contestant
    seconds: float = 60.0
    rounds: tuple[int, int] = (2, 9)

    @property
    def key(self) -> str:
        """Where its result is kept."""
        return f"{self.measure}: {self.contestant}" if self.contestant else self.measure

    def as_dict(self) -> dict[str, Any]:
        """For another process."""
        return asdict(self)

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> "Job":
        """The inverse of `as_dict`, also after a way through JSON."""
        case = given["case"]
        rest = {**given, "case": Case(**{**case, "contestants": tuple(case["contestants"])})}
        return cls(**{**rest, "rounds": tuple(given["rounds"])})


def main_cases(quick: bool = False) -> tuple[Case, ...]:
    """The table: encoders, whole steps, both decoders; with `quick`, of tiny networks."""
    names = ("quick_resnet", "quick_convnext") if quick else ("resnet50", "convnext_tiny")
    crop, batch = (64, 1) if quick else (96, 2)
    encoders = [
        Case(name, "encoder", crop, ratio, batch, CONTESTANTS["encoder"])
        for name in names
        for ratio in (0.6, 0.75)
    ]
    steps = [Case(name, "step", crop, 0.6, batch, CONTESTANTS["step"]) for name in names]
    decoders = [replace(case, contestants=("p+official", "p+light")) for case in steps]
    return (*encoders, *steps, *decoders)


def curve_cases(
    quick: bool = False,
    crops: Sequence[int] = (64, 96, 128, 160),
    ratios: Sequence[float] = (0.3, 0.5, 0.6, 0.75, 0.9),
) -> tuple[Case, ...]:
    """Growth of the encoder's cost: packed cells against the tuned emulation, one crop a batch.

    Two of 64³, where one visible cell would be a single site at the deepest stage, which has no
    batch statistics.
    """
    names = ("quick_resnet", "quick_convnext") if quick else ("resnet50", "convnext_tiny")
    chosen = ((64, 0.5), (64, 0.75)) if quick else [(c, r) for c in crops for r in ratios]
    return tuple(
        Case(name, "encoder", crop, ratio, 2 if crop == 64 else 1, ("e1", "p"))
        for crop, ratio in chosen
        for name in names
    )


def jobs(
    cases: Sequence[Case], measures: Sequence[Measure], seconds: float, rounds: tuple[int, int]
) -> tuple[Job, ...]:
    """The processes to run: cheap measures that noise does not touch first."""
    out: list[Job] = []
    for measure in sorted(measures, key=("saved", "peak", "profile", "time").index):
        for case in cases:
            if measure == "peak":
                out += [Job(measure, case, name) for name in case.contestants]
            elif measure == "profile":
                out += [Job(measure, case, name, seconds, rounds) for name in case.contestants]
            else:
                out.append(Job(measure, case, None, seconds, rounds))
    return tuple(out)
