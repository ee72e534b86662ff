"""One network on one device, as `benchmarks/gpu.py` checks and measures it."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from spark3d.benchmarks.cases import Case, Task
from spark3d.benchmarks.core import Contestant
from spark3d.sparse.encoder import SparseEncoder

PRECISIONS: Mapping[str, tuple[torch.dtype, bool]] = MappingProxyType(
    {
        "float64": (torch.float64, False),
        "float32": (torch.float32, False),
        "bfloat16": (torch.float32, True),
    }
)
"""Dtype of the weights, and whether the forward runs under bfloat16 autocast."""


@dataclass(frozen=True)
class Setup:
    """One network on one device.

    Attributes:
        network: Name in `cases.NETWORKS`.
        device: As torch names it.
        precision: Name in PRECISIONS.
        crop: Voxels per axis.
        batch: Crops.
        seconds: Of timing per comparison.
        rounds: At least and at most so many are counted.
    """

    network: str
    device: str
    precision: str
    crop: int
    batch: int
    seconds: float = 10.0
    rounds: tuple[int, int] = (2, 9)

    @property
    def cuda(self) -> bool:
        """Whether the device is one of CUDA's."""
        return torch.device(self.device).type == "cuda"

    def contestant(self, name: str, task: Task = "step") -> Contestant:
        """One of `cases.CONTESTANTS`; `reference` is the other backend of packed cells."""
        dtype, low = PRECISIONS[self.precision]
        kind = name.replace("reference", "p")
        case = Case(self.network, task, self.crop, 0.6, self.batch, (kind,))
        made = Contestant(case, kind, dtype, self.device, low)
        if name.startswith("reference") and isinstance(made.encoder, SparseEncoder):
            made.encoder.backend = "reference"
        return made

    def contestants(self, names: Sequence[str], task: Task = "step") -> dict[str, Contestant]:
        """Several, by name."""
        return {name: self.contestant(name, task) for name in names}

    def wait(self) -> None:
        """Until the device has done all it was given."""
        if self.cuda:
            torch.cuda.synchronize(self.device)


@contextmanager
def rounding(fast: bool) -> Iterator[None]:
    """Let CUDA multiply float32 in TF32, or not."""
    convolution: Any = torch.backends.cudnn
    product: Any = torch.backends.cuda.matmul
    before = convolution.allow_tf32, product.allow_tf32
    convolution.allow_tf32 = product.allow_tf32 = fast
    try:
        yield
    finally:
        convolution.allow_tf32, product.allow_tf32 = before
