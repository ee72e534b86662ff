"""From physical intensities (HU, or a scanner's units) to the range a network reads."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from spark3d.errors import ConfigError

PerChannel = float | Sequence[float] | np.ndarray


@dataclass(frozen=True)
class Window:
    """Clip, then scale, intensities.

    Attributes:
        mode: "unit" maps `low..high` to `0..scale`, so that air (at or below `low`) is 0.
            "zscore" clips to `low..high` where given, then subtracts a mean and divides by a
            standard deviation: `mean` and `std` where given (CT), else those of the case (MR).
        low: Lower clip in physical units; "unit" needs it.
        high: Upper clip in physical units; "unit" needs it.
        scale: Upper end of the range of "unit".
        mean: Mean used by "zscore" for every case.
        std: Standard deviation used by "zscore" for every case.

    Raises:
        ConfigError: Values missing for the mode, or an empty window.
    """

    mode: Literal["unit", "zscore"] = "unit"
    low: float | None = None
    high: float | None = None
    scale: float = 1.0
    mean: float | None = None
    std: float | None = None

    def __post_init__(self) -> None:
        if self.mode not in ("unit", "zscore"):
            raise ConfigError(f"window mode {self.mode!r} is unknown; take unit or zscore")
        if self.mode == "unit" and (self.low is None or self.high is None):
            raise ConfigError("window mode unit needs low and high, for CT e.g. -200 and 300")
        if self.low is not None and self.high is not None and self.low >= self.high:
            raise ConfigError(f"window {self.low}..{self.high} is empty; low must be below high")
        if (self.mean is None) != (self.std is None) or (self.std is not None and self.std <= 0):
            raise ConfigError("window mean and std go together, and std must be above 0")

    @property
    def has_air(self) -> bool:
        """Whether air is 0: voxels at or below `low` hold nothing."""
        return self.mode == "unit"

    @property
    def needs_statistics(self) -> bool:
        """True where every case brings its own mean and standard deviation."""
        return self.mode == "zscore" and self.mean is None

    def darkest(self, minimum: PerChannel) -> np.ndarray:
        """Physical intensity of what lies outside of a volume, one value per channel.

        Args:
            minimum: Of the case, one or per channel; what `low` clips to where it is given.
        """
        lowest = np.asarray(minimum, dtype=np.float32).reshape(-1)
        return lowest if self.low is None else np.full_like(lowest, self.low)

    def outside(
        self, minimum: PerChannel, mean: PerChannel | None = None, std: PerChannel | None = None
    ) -> tuple[float, ...]:
        """The same in the network's range; `mean` and `std` as in `apply`."""
        dark = self.apply(self.darkest(minimum)[:, None], mean, std)
        return tuple(dark[:, 0].tolist())

    def apply(
        self, values: np.ndarray, mean: PerChannel | None = None, std: PerChannel | None = None
    ) -> np.ndarray:
        """Map `(c, *size)` to the network's range as float32; a constant channel becomes 0.

        Args:
            values: Physical intensities.
            mean: Of the case, one or per channel; used if `needs_statistics`.
            std: Of the case, likewise.

        Raises:
            ConfigError: Statistics of the case are needed and not given.
        """
        out = values.astype(np.float32)  # always a copy, worked on in place
        if self.low is not None or self.high is not None:
            np.clip(out, self.low, self.high, out=out)
        if self.mode == "unit":
            assert self.low is not None
            assert self.high is not None
            out -= np.float32(self.low)
            out *= np.float32(self.scale / (self.high - self.low))
            return out
        if not self.needs_statistics:
            mean, std = self.mean, self.std
        if mean is None or std is None:
            raise ConfigError("window mode zscore needs the mean and std of the case or of the set")
        out -= _channels(mean, out)
        spread = _channels(std, out)
        return np.divide(out, spread, out=np.zeros_like(out), where=spread > 0)


def _channels(value: PerChannel, like: np.ndarray) -> np.ndarray:
    """Shape one value, or one per channel, for broadcasting over `(c, *size)`."""
    values = np.asarray(value, dtype=np.float32).reshape(-1)
    return np.broadcast_to(values, (like.shape[0],)).reshape(-1, *(1,) * (like.ndim - 1))
