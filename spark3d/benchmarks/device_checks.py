"""What must hold on a device: equal numbers, equal bits, no waiting. Float32 means float32 here,
never TF32.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from spark3d.benchmarks.core import Contestant
from spark3d.benchmarks.device import Setup, rounding

EXACT = 1e-9
WAYS = ("p+light", "reference+light", "e0+light")


def accuracy(setup: Setup) -> dict[str, Any]:
    """Stages, loss and gradients of one step against the reference backend in float64.

    Errors are root mean squares over those of the true values. In float64 packed cells must be
    exact; in less they must be about as close as the other ways to compute the same.
    """
    with rounding(fast=False):
        truth = step_values(replace(setup, precision="float64").contestant("reference+light"))
        errors: dict[str, dict[str, float]] = {}
        for name in WAYS:
            found = step_values(setup.contestant(name))
            errors[name] = {key: _apart(found[key], value) for key, value in truth.items()}
    packed, *others = (errors[name] for name in WAYS)
    if setup.precision == "float64":
        return {"errors": errors, "holds": max(packed.values()) <= EXACT}
    low = torch.bfloat16 if setup.precision == "bfloat16" else torch.float32
    allowed = {key: 2 * max(o[key] for o in others) + torch.finfo(low).eps for key in packed}
    return {"errors": errors, "holds": all(packed[key] <= allowed[key] for key in packed)}


def step_values(contestant: Contestant) -> dict[str, Tensor]:
    """Stages on the full grid, the loss, and all gradients as one row, in float64."""
    liven(contestant.module)
    mask = contestant.mask(0)
    kept: list[Tensor] = []
    hook = contestant.encoder.register_forward_hook(
        lambda module, inputs, pyramid: kept.extend(y.detach() for y in pyramid.dense())
    )
    (loss,) = contestant.outputs(mask)
    hook.remove()
    loss.backward()
    found = {f"stage {number}": y.double() for number, y in enumerate(kept, start=1)}
    grads = [p.grad.flatten() for p in contestant.module.parameters() if p.grad is not None]
    return found | {"loss": loss.detach().double(), "gradients": torch.cat(grads).double()}


def liven(module: nn.Module) -> None:
    """Draw anew what starts as a constant: scales, offsets, a layer scale of almost zero."""
    rng = torch.Generator().manual_seed(2)
    for parameter in module.parameters():
        if parameter.ndim <= 1:
            noise = torch.randn(parameter.shape, generator=rng, dtype=torch.float64)
            parameter.data.copy_(0.5 + 0.2 * noise)


def _apart(found: Tensor, truth: Tensor) -> float:
    return float((found - truth).norm() / truth.norm().clamp_min(1e-300))


def determinism(setup: Setup) -> dict[str, Any]:
    """Two runs of two steps from one start, bit by bit: as they are, and with deterministic cuDNN.

    The second must hold: what still differed would be the packed cells' own.
    """
    backend = torch.backends.cudnn
    before, found = backend.deterministic, {}
    try:
        for name, fixed in (("as it is", False), ("deterministic cuDNN", True)):
            backend.deterministic = fixed
            first, second = (_after_two_steps(setup) for _ in range(2))
            apart = max(_apart(second[k].double(), v.double()) for k, v in first.items())
            same = all(torch.equal(second[k], v) for k, v in first.items())
            found[name] = {"same bits": same, "apart": apart}
    finally:
        backend.deterministic = before
    return {**found, "holds": found["deterministic cuDNN"]["same bits"]}


def _after_two_steps(setup: Setup) -> dict[str, Tensor]:
    contestant = setup.contestant("p+light")
    for number in range(2):
        contestant.prepare(number)()
    return copy.deepcopy(contestant.module.state_dict())


def waiting(setup: Setup) -> dict[str, Any]:
    """Whether a step, tables of its new mask included, ever makes the host wait for the device.

    On CUDA every wait is an error for the time of one step. Elsewhere the step runs on the meta
    device: its tensors hold no values, so what would wait for one on a GPU fails there.
    """
    where = setup if setup.cuda else replace(setup, device="meta", precision="float32")
    contestant = where.contestant("p+light")
    if setup.cuda:
        contestant.prepare(0)()  # handles, plans and pinned memory are made once, and may wait
    run = contestant.prepare(1)
    try:
        with _no_waiting(where):
            run()
    except (RuntimeError, NotImplementedError) as error:
        return {"on": where.device, "holds": False, "first": str(error).splitlines()[0]}
    return {"on": where.device, "holds": True}


@contextmanager
def _no_waiting(setup: Setup) -> Iterator[None]:
    setup.wait()
    if setup.cuda:
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if setup.cuda:
            torch.cuda.set_sync_debug_mode("default")
