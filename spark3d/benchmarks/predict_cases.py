"""What `spark3d bench predict` measures: volumes, windows and contestants. Imports no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from types import MappingProxyType
from typing import Any, Literal

Measure = Literal["agree", "time", "peak"]
MEASURES: tuple[Measure, ...] = ("agree", "peak", "time")

CONTESTANTS: Mapping[str, str] = MappingProxyType(
    {
        "monai": "sliding_window_inference, then argmax",
        "monai buffered": "the same with buffer_steps, its own way to save time on slow devices",
        "spark3d": "predict_labels: rows leave the accumulator as soon as they are final",
    }
)
LAST = "spark3d"


@dataclass(frozen=True)
class PredictCase:
    """One comparison.

    Attributes:
        size: Voxels of the volume.
        classes: Of the network, background included.
        window: Voxels of a window.
        overlap: Of neighbouring windows.
        filters: Width of the SegResNet.
        batch: Windows per forward pass.
    """

    size: tuple[int, int, int] = (512, 512, 300)
    classes: int = 14
    window: tuple[int, int, int] = (96, 96, 96)
    overlap: float = 0.25
    filters: int = 8
    batch: int = 1

    @property
    def name(self) -> str:
        """Identifies the case in the results."""
        size, window = ("x".join(map(str, n)) for n in (self.size, self.window))
        return (
            f"{self.classes} classes of {size}, windows {window} overlap {self.overlap:g} batch "
            f"{self.batch}, SegResNet of {self.filters}"
        )

    @property
    def class_map_bytes(self) -> int:
        """Of all logits as float32."""
        x, y, z = self.size
        return 4 * self.classes * x * y * z


QUICK = PredictCase((40, 36, 30), 4, (16, 16, 16), 0.25, 8)


@dataclass(frozen=True)
class PredictJob:
    """One process: a case and what is measured of it; of the time, one round of all contestants."""

    measure: Measure
    case: PredictCase = field(default_factory=PredictCase)
    contestant: str | None = None
    round: int = 0

    @property
    def key(self) -> str:
        """Where its result is kept."""
        part = self.contestant or (f"round {self.round}" if self.round else "")
        return f"{self.measure}: {part}" if part else self.measure

    def as_dict(self) -> dict[str, Any]:
        """For another process."""
        return asdict(self)

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> "PredictJob":
        """The inverse of `as_dict`, also after a way through JSON."""
        case = dict(given["case"])
        case |= {key: tuple(case[key]) for key in ("size", "window")}
        return cls(**{**given, "case": PredictCase(**case)})


def predict_jobs(case: PredictCase, measures: Sequence[Measure], rounds: int) -> list[PredictJob]:
    """The processes to run: what noise does not touch first."""
    out: list[PredictJob] = []
    for measure in MEASURES:
        if measure not in measures:
            continue
        if measure == "peak":
            out += [PredictJob(measure, case, name) for name in CONTESTANTS]
        elif measure == "time":
            out += [PredictJob(measure, case, None, n) for n in range(1, rounds + 1)]
        else:
            out.append(PredictJob(measure, case))
    return out
