"""What is measured on a device: times, memory, and every way to compute every convolution."""

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor

from spark3d.benchmarks import meter
from spark3d.benchmarks.core import Contestant
from spark3d.benchmarks.device import PRECISIONS, Setup, rounding
from spark3d.sparse.convolution import ConvCase, Strategy, choose, convolve
from spark3d.sparse.encoder import SparseEncoder
from spark3d.sparse.mask import CellMask

STEPS = ("e0+official", "e1+light", "p+official", "p+light")
Runs = Mapping[str, meter.Prepare]


def speed(setup: Setup) -> dict[str, Any]:
    """Times of the encoder up to each stage and of a whole step, in alternating runs."""
    found = {}
    with rounding(fast=True):
        for count in range(1, 5):
            encoders = setup.contestants(("e0", "e1", "p"), "encoder")
            runs = {name: c.first_stages(count).prepare for name, c in encoders.items()}
            found[f"encoder to stage {count}"] = _times(setup, runs)
        steps = setup.contestants(STEPS)
        found["step"] = _times(setup, {name: c.prepare for name, c in steps.items()})
    return found


def _times(setup: Setup, runs: Runs) -> dict[str, Any]:
    """Seconds in alternating rounds, until the device is done."""

    def until_done(prepare: meter.Prepare) -> meter.Prepare:
        def of_round(number: int) -> Callable[[], None]:
            run = prepare(number)
            setup.wait()

            def timed() -> None:
                run()
                setup.wait()

            return timed

        return of_round

    seconds = meter.alternate(
        {name: until_done(prepare) for name, prepare in runs.items()}, setup.seconds, setup.rounds
    )
    return {
        "spread": {name: meter.spread(taken) for name, taken in seconds.items()},
        "ratios": meter.paired_ratios(seconds, list(runs)[-1]),
    }


def memory(setup: Setup) -> dict[str, Any]:
    """Bytes kept for the backward pass and, on CUDA, the peak of one step."""
    found: dict[str, Any] = {}
    for name in STEPS:
        contestant = setup.contestant(name)
        found[name] = _kept(contestant) | {"peak": _peak(setup, contestant)}
    return found


def _kept(contestant: Contestant) -> dict[str, int]:
    mask, known = contestant.mask(0), list(contestant.module.parameters())
    return meter.saved_bytes(lambda: contestant.outputs(mask), known, mask)


def _peak(setup: Setup, contestant: Contestant) -> int | None:
    """Of the second step, by which everything lazy has been made; None where nobody counts."""
    if not setup.cuda:
        return None
    contestant.prepare(0)()
    run = contestant.prepare(1)
    setup.wait()
    torch.cuda.reset_peak_memory_stats(setup.device)
    run()
    setup.wait()
    return torch.cuda.max_memory_allocated(setup.device)


def strategies(setup: Setup) -> list[dict[str, Any]]:
    """Forward and backward of every convolution of the encoder, by every strategy that can do it.

    Returns:
        One entry for each kind of convolution: how many layers are of it, the median seconds of
        each strategy, the fastest, and the one that `convolution.choose` takes.
    """
    contestant = setup.contestant("p", "encoder")
    mask, layers = contestant.mask(0), list[ConvCase]()
    assert isinstance(contestant.encoder, SparseEncoder)

    def note(case: ConvCase) -> Strategy:
        layers.append(case)
        return choose(case)

    contestant.encoder.strategy = note
    contestant.outputs(mask)
    with rounding(fast=True):
        return [_compare(setup, case, mask, layers.count(case)) for case in dict.fromkeys(layers)]


def _compare(setup: Setup, case: ConvCase, mask: CellMask, layers: int) -> dict[str, Any]:
    dtype, low = PRECISIONS[setup.precision]
    kind = torch.bfloat16 if low else dtype
    count = mask.batch * mask.n_visible
    shapes = (
        (count, *case.cell, case.channels),
        (case.out_channels, *case.kernel, case.channels // case.groups),
        (count, *case.out_cell, case.out_channels),
    )
    made = [torch.randn(s, device=setup.device, dtype=kind).movedim(-1, 1) for s in shapes]
    runs = {way: _by(way, case, mask, made) for way in possible(case)}
    spread = _times(setup, runs)["spread"]
    medians: dict[str, float] = {name: value["median"] for name, value in spread.items()}
    return {
        "convolution": describe(case),
        "layers": layers,
        "seconds": medians,
        "fastest": min(medians, key=medians.__getitem__),
        "chosen": choose(case),
    }


def _by(way: Strategy, case: ConvCase, mask: CellMask, made: list[Tensor]) -> meter.Prepare:
    def of_round(number: int) -> Callable[[], None]:
        x, weight = (tensor.detach().requires_grad_() for tensor in made[:2])
        return lambda: convolve(x, mask, weight, None, case, way).backward(made[2])

    return of_round


def possible(case: ConvCase) -> list[Strategy]:
    """The strategies that can compute a case; the tests hold them all equal."""
    ways: list[Strategy] = ["local"] if case.local else []
    if case.groups == 1 and prod(case.cell) <= 512:
        ways.append("columns")
    return [*ways, "halo", "grid"]


def describe(case: ConvCase) -> str:
    """In words: cell, kernel, stride and channels."""
    parts = ["x".join(map(str, n)) for n in (case.cell, case.kernel, case.stride)]
    groups = f" in {case.groups} groups" if case.groups > 1 else ""
    return (
        f"cell {parts[0]}, kernel {parts[1]}, stride {parts[2]}, "
        f"{case.channels} to {case.out_channels} channels{groups}"
    )
