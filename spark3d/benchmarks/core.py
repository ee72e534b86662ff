"""The contestants of a case, ready to run, and what is measured of them."""

import copy
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from spark3d.benchmarks import meter
from spark3d.benchmarks.cases import NETWORKS, Case, Job
from spark3d.benchmarks.emulation import GridEncoder, GridSparK
from spark3d.engine.optim import can_be_fused
from spark3d.models.backbones import Backbone, build_backbone
from spark3d.models.decoder import LightDecoder, OfficialDecoder
from spark3d.models.densify import Densify
from spark3d.objectives.spark import SparK
from spark3d.sparse.cells import pack
from spark3d.sparse.encoder import SparseEncoder
from spark3d.sparse.mask import CellMask, random_mask

Encoder = GridEncoder | SparseEncoder


class Contestant:
    """One way to do a case: a network, crops and, for a whole step, all that is trained.

    The same case gives every contestant the same weights, crops and masks.

    Args:
        case: What to do.
        name: One of `CONTESTANTS`.
        dtype: Of weights and crops.
        device: Where it runs.
        low: Forward under bfloat16 autocast.
    """

    def __init__(
        self,
        case: Case,
        name: str,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        low: bool = False,
    ) -> None:
        torch.manual_seed(0)
        kind, _, decoder = name.partition("+")
        net = NETWORKS[case.network]
        backbone = build_backbone(net.backbone, 3, 1, **net.options)
        self.case, self.cell, self.device, self.low = case, backbone.stride, device, low
        self.encoder: Encoder
        if kind == "p":
            self.encoder = SparseEncoder(backbone.network, backbone.stages, 3)
        else:
            self.encoder = GridEncoder(backbone.network, backbone.stages, tuned=kind == "e1")
        self.module: nn.Module = self.encoder
        self.optimizer: Optimizer | None = None
        if decoder:
            self.module = _spark(self.encoder, backbone, case, decoder)
        self.module.to(device, dtype)
        if decoder:
            weights = list(self.module.parameters())
            self.optimizer = AdamW(weights, lr=1e-4, fused=can_be_fused(weights))
        size = (case.crop,) * 3
        rng = torch.Generator().manual_seed(1)
        self.crops = torch.randn(case.batch, 1, *size, generator=rng).to(device, dtype)
        self.grads: list[Tensor] = []
        if not decoder:
            self.grads = [
                torch.randn(case.batch, c, *(case.crop // s for s in strides), generator=rng)
                .to(device, dtype)
                .div_(c)
                for c, strides in zip(backbone.channels, backbone.strides, strict=True)
            ]

    def mask(self, seed: int) -> CellMask:
        """A mask that no table has been built for yet."""
        grid = [self.case.crop // side for side in self.cell]
        rng = torch.Generator().manual_seed(seed)
        return random_mask(self.case.batch, grid, self.case.ratio, self.cell, rng).to(self.device)

    def first_stages(self, count: int) -> "Contestant":
        """Itself, whose encoder ends with its `count`-th stage."""
        self.encoder.stages, self.grads = self.encoder.stages[:count], self.grads[:count]
        return self

    def outputs(self, mask: CellMask) -> Sequence[Tensor]:
        """The maps of the encoder, or the loss."""
        kind = torch.device(self.device).type
        with torch.autocast(kind, torch.bfloat16) if self.low else nullcontext():
            found = self.module(self.crops, mask)
        return [found.total] if self.optimizer else found.maps

    def prepare(self, seed: int) -> Callable[[], None]:
        """One run under a fresh mask: forward, backward and, for a step, the update."""
        mask = self.mask(seed)
        packed = isinstance(self.encoder, SparseEncoder)
        dense = [g * mask.at(g.shape[2:]) for g in self.grads]
        grads = [pack(g, self.mask(seed)) for g in dense] if packed else dense

        def run() -> None:
            self.module.zero_grad(set_to_none=True)
            torch.autograd.backward(self.outputs(mask), grads if self.grads else None)
            if self.optimizer:
                self.optimizer.step()

        return run

    def gradients(self) -> dict[str, Tensor]:
        """Of the network's parameters, by name, after a run."""
        named = self.encoder.network.named_parameters()
        return {name: p.grad.detach().clone() for name, p in named if p.grad is not None}


def _spark(encoder: Encoder, backbone: Backbone, case: Case, decoder: str) -> nn.Module:
    """SparK with the named decoder around an encoder."""
    net = NETWORKS[case.network]
    light, official = net.widths
    if decoder == "official":
        top: LightDecoder | OfficialDecoder = OfficialDecoder(backbone.strides, 1, official)
    else:
        top = LightDecoder(backbone.strides, 1, light)
    dense = Densify(backbone.channels, top.widths, 3, net.norm, top.folds)
    if isinstance(encoder, SparseEncoder):
        return SparK(encoder, dense, top)
    return GridSparK(encoder, dense, top)


def run_job(job: Job) -> dict[str, Any]:
    """Do what `job` says, in this process.

    Returns:
        JSON-able: `seconds` and `ratios` for time, bytes by contestant for the others.
    """
    if job.measure == "peak":
        return _peak(job)
    if job.measure == "saved":
        return {name: _saved(job.case, name) for name in job.case.contestants}
    load = os.getloadavg()[0]
    contestants = {name: Contestant(job.case, name) for name in job.case.contestants}
    agreement = _agreement(contestants) if job.case.task == "encoder" else {}
    runs = {name: contestant.prepare for name, contestant in contestants.items()}
    seconds = meter.alternate(runs, job.seconds, job.rounds, warm=bool(agreement))
    return {
        "seconds": seconds,
        "spread": {name: meter.spread(taken) for name, taken in seconds.items()},
        "ratios": meter.paired_ratios(seconds, job.case.contestants[-1]),
        "agreement": agreement,
        "load": [load, os.getloadavg()[0]],
    }


def _agreement(contestants: dict[str, Contestant]) -> dict[str, float]:
    """Largest difference of a gradient from that of the last contestant, over the largest one.

    Doubles as the warm-up.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for name, contestant in contestants.items():
        state = copy.deepcopy(contestant.module.state_dict())
        contestant.prepare(0)()
        found[name] = contestant.gradients()
        contestant.module.load_state_dict(state)
    *others, last = found
    scale = max(float(g.abs().max()) for g in found[last].values())
    return {
        name: max(float((g - found[last][key]).abs().max()) for key, g in found[name].items())
        / scale
        for name in others
    }


def _saved(case: Case, name: str) -> dict[str, int]:
    contestant = Contestant(case, name)
    mask = contestant.mask(0)
    known = list(contestant.module.parameters())
    return meter.saved_bytes(lambda: contestant.outputs(mask), known, mask)


def _peak(job: Job) -> dict[str, int]:
    """Peak of this process after one run, and before it; a process that did more tells nothing."""
    if job.contestant is None:
        raise ValueError("peak memory is measured for one contestant")
    run = Contestant(job.case, job.contestant).prepare(0)
    before = meter.peak_memory()
    run()
    return {"before": before, "peak": meter.peak_memory()}
