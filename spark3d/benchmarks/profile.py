"""Where a run's time goes: its phases by the clock, its operations by PyTorch's profiler.

Phases are timed without the profiler, which slows small operations. Gradients of the decoder and
densify end when the last stage of the encoder has got its gradient.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from types import MappingProxyType
from typing import Any

from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from spark3d.benchmarks.cases import Job
from spark3d.benchmarks.core import Contestant
from spark3d.sparse.mask import CellMask

TABLES = "index tables"
GROUPS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "optimiser": ("adam", "Optimizer"),
        "convolutions": ("conv", "slow_conv", "mkldnn"),
        "matrix products": ("mm", "linear", "dot"),
        "gathering": ("index", "embedding_bag", "nonzero", "where", "masked", "cat"),
        "norms": ("norm",),
        "activations": ("relu", "gelu", "hardtanh", "elu", "silu"),
        "copies": ("copy_", "clone", "contiguous", "to_copy", "fill_", "zero_", "empty"),
        "sums and products": ("add", "mul", "sum", "mean", "sub", "div", "pow", "square"),
    }
)
"""An operation belongs to the first group one of whose words its name contains."""


def profile_run(job: Job) -> dict[str, Any]:
    """One contestant: median seconds of its phases, and seconds of its operations by group."""
    if job.contestant is None:
        raise ValueError("a profile is that of one contestant")
    contestant = Contestant(job.case, job.contestant)
    contestant.prepare(0)()
    began, rounds = time.perf_counter(), list[dict[str, float]]()
    for number in range(1, job.rounds[1] + 1):
        rounds.append(phases(contestant, number))
        if number >= job.rounds[0] and time.perf_counter() - began > job.seconds:
            break
    median = {name: statistics.median(r[name] for r in rounds) for name in rounds[0]}
    return {"phases": median, "operations": operations(contestant, len(rounds) + 1)}


def phases(contestant: Contestant, number: int) -> dict[str, float]:
    """Seconds of one run, phase by phase."""
    marks: dict[str, float] = {}

    def mark(name: str) -> Callable[..., None]:
        return lambda *_: marks.update({name: time.perf_counter()})

    def watch(module: nn.Module, inputs: Any, pyramid: Any) -> None:
        mark("encoder")()
        for stage in pyramid.maps:
            stage.register_hook(mark("top backward"))

    handles = [contestant.encoder.register_forward_hook(watch)]
    if contestant.optimizer:
        densify: Any = contestant.module.densify
        handles.append(densify.register_forward_hook(mark("densify")))
        handles.append(contestant.module.register_forward_hook(mark("decoder and loss")))
        before: Any = contestant.optimizer.register_step_pre_hook(mark("encoder backward"))
        handles.append(before)
    run = contestant.prepare(number)
    start = time.perf_counter()
    run()
    end = time.perf_counter()
    for handle in handles:
        handle.remove()
    if not contestant.optimizer:
        return {"encoder": marks["encoder"] - start, "encoder backward": end - marks["encoder"]}
    names = ("encoder", "densify", "decoder and loss", "top backward", "encoder backward")
    times = [start, *(marks[name] for name in names), end]
    spent = [b - a for a, b in pairwise(times)]
    return dict(zip((*names, "optimiser"), spent, strict=True))


def operations(contestant: Contestant, number: int) -> dict[str, float]:
    """Seconds of one run by group of operations; the rest is Python and the autograd engine."""
    run = contestant.prepare(number)
    with _named_tables(), profile(activities=[ProfilerActivity.CPU]) as found:
        start = time.perf_counter()
        run()
        total = time.perf_counter() - start
    spent = dict.fromkeys((TABLES, *GROUPS, "other operations"), 0.0)
    for event in found.events() or ():
        spent[group_of(event)] += event.self_cpu_time_total / 1e6
    spent["between operations"] = max(0.0, total - sum(spent.values()))
    return spent


def group_of(event: Any) -> str:
    """The group of a profiled operation; all that happens while tables are built is theirs."""
    above = event
    while above is not None:
        if above.name == TABLES:
            return TABLES
        above = above.cpu_parent
    for group, words in GROUPS.items():
        if any(word in event.name for word in words):
            return group
    return "other operations"


@contextmanager
def _named_tables() -> Iterator[None]:
    """Let the profiler see when a mask builds what it remembers."""
    plain = CellMask.remember

    def named(self: CellMask, key: Any, build: Callable[[], Any]) -> Any:
        def watched() -> Any:
            with record_function(TABLES):
                return build()

        return plain(self, key, watched)

    CellMask.remember = named  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        CellMask.remember = plain
