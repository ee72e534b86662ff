"""`spark3d demo`: phantoms, prepare, pre-train, fine-tune twice, predict, evaluate, report."""

import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from spark3d.commands.evaluate import evaluate_command
from spark3d.commands.finetune import finetune_command
from spark3d.commands.predict import predict_command
from spark3d.commands.prepare import prepare_command
from spark3d.commands.pretrain import pretrain_command
from spark3d.commands.report import report_command
from spark3d.data.phantom import write_btcv_phantoms
from spark3d.data.store import Store
from spark3d.engine.precision import cpu_has_bfloat16
from spark3d.engine.progress import step_progress
from spark3d.evaluation.tables import compare, rich_table

log = logging.getLogger(__name__)

TRAINING, TESTING, UNLABELLED = 4, 8, 24
FLOAT32 = (
    "optim.precision=32-true",
    "model.options={init_filters: 8, blocks_down: [1, 2, 2, 2], blocks_up: [1, 1, 1]}",
)
"""Where bfloat16 is emulated: half the filters keep the demo within ten minutes on two cores."""
ARMS = ("scratch", "pre-trained")


def demo_command(out: Path, steps: int | None = None, unlabelled: int = UNLABELLED) -> Path:
    """Run the whole way on phantoms; steps that are done already are not repeated.

    Args:
        out: folder for data, runs, scores and the report.
        steps: of each of the three trainings; None takes those of the recipes. Few steps show
            that everything runs, not what pre-training brings.
        unlabelled: phantoms to pre-train on.

    Returns:
        The report, `out/report.html`.
    """
    console = Console()
    began = time.perf_counter()
    slow = cpu_has_bfloat16() is False
    if slow:
        console.print(
            "this CPU emulates bfloat16, which is slow: float32, and a network of half the filters"
        )
    short: tuple[str, ...] = (
        () if steps is None else (f"optim.steps={steps}", f"optim.warmup={steps // 10}")
    )
    short += FLOAT32 if slow else ()

    with stage(console, 1, f"{TRAINING + TESTING} labelled and {unlabelled} unlabelled phantoms"):
        data = out / "data"
        with step_progress("drawing phantoms", TRAINING + TESTING + unlabelled) as bar:
            write_btcv_phantoms(data, TRAINING, TESTING, unlabelled, progress=bar.update)
        labelled, other = out / "store-labelled", out / "store-unlabelled"
        spacing = "4.5,4.5,5"
        prepare_command(data / "RawData", labelled, spacing, console=console)
        prepare_command(data / "Unlabelled", other, spacing, console=console)

    with stage(console, 2, "pre-training on the unlabelled phantoms (SparK, 3D)"):
        encoder = pretrain_command(other, out / "pretrain", "demo", short)

    cases = [case.id for case in Store.open(labelled).cases if case.section == "training"]
    split = ("split.use=list", f"split.train={json.dumps(cases)}")
    evaluations = []
    for number, arm in enumerate(ARMS, start=3):
        with stage(console, number, f"fine-tuning {arm} on {TRAINING} labels, then scoring"):
            run = out / arm
            start = encoder if arm == "pre-trained" else None
            finetune_command(labelled, run, start, "demo", (*short, *split))
            found = predict_command(
                run, data / "RawData", out / f"{arm}-predictions", overlap=0.25, batch=4,
                amp=not slow, section="test",
            )  # fmt: skip
            scores = out / f"{arm}-scores"
            evaluations.append(evaluate_command(found, data / "RawData", scores, arm, partial=True))

    runs = [f"{name}={out / name}" for name in ("pretrain", *ARMS)]
    report = report_command(
        [*runs, *(f"{arm}={out / f'{arm}-scores'}" for arm in ARMS)],
        out / "report.html",
        "From unlabelled volumes to a better segmenter: the demo",
    )
    for metric in ("dice", "asd_mm"):
        console.print(rich_table(compare(evaluations, metric)))
    console.print(f"{(time.perf_counter() - began) / 60:.1f} minutes; report: {report.resolve()}")
    return report


@contextmanager
def stage(console: Console, number: int, title: str) -> Iterator[None]:
    """A heading, and the time it took."""
    console.rule(f"{number}/4 {title}", align="left")
    began = time.perf_counter()
    yield
    console.print(f"  {time.perf_counter() - began:.0f} s")
