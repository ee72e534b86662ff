"""The commands around scores: evaluate, label-efficiency, export, report, bench predict."""

from pathlib import Path
from typing import Annotated

import typer

from spark3d.cli_options import Geometry, Overrides, by_name, numbers, required, split_recipe


def evaluate(
    predictions: Annotated[Path, typer.Option(help="Folder of predicted label maps.")],
    references: Annotated[Path, typer.Option(help="Dataset, or folder of reference label maps.")],
    out: Annotated[Path, typer.Option(help="Gets evaluation.json, evaluation.csv and overlays.")],
    name: Annotated[str | None, typer.Option(help="What tables call these predictions.")] = None,
    tolerance_mm: Annotated[
        str | None,
        typer.Option(help="Of the surface Dice: one, or as 2,liver=5; default the run's, or 2."),
    ] = None,
    partial: Annotated[bool, typer.Option(help="Leave out references without prediction.")] = False,
    legacy: Annotated[
        bool, typer.Option(help="Also print Dice as other programs average it, named so.")
    ] = False,
    pages: Annotated[bool, typer.Option(help="A page with slices to scroll, per case.")] = False,
    images: Annotated[
        Path | None,
        typer.Option(help="Volumes that were predicted, for pictures, if references lack them."),
    ] = None,
    allow_overlap: Annotated[
        bool, typer.Option(help="Score cases too that the model was trained on.")
    ] = False,
    geometry: Annotated[
        Geometry | None,
        typer.Option(help="Which to trust where sform and qform differ; default as predicted."),
    ] = None,
) -> None:
    """Score predictions per case and organ, in mm, on the original grid.

    Example: `spark3d evaluate --predictions predictions/ --references labels/ --out scores/`
    """
    from spark3d.commands.evaluate import evaluate_command

    within = None if tolerance_mm is None else by_name(tolerance_mm, "--tolerance-mm")
    evaluate_command(
        predictions,
        references,
        out,
        name,
        tolerance_mm=within,
        partial=partial,
        legacy=legacy,
        pages=pages,
        images=images,
        allow_overlap=allow_overlap,
        geometry=geometry,
    )


def label_efficiency(
    arguments: Overrides = None,
    data: Annotated[Path | None, typer.Option(help="Labelled volumes, or their store.")] = None,
    out: Annotated[Path | None, typer.Option(help="Study folder; an existing one goes on.")] = None,
    encoder: Annotated[
        list[str] | None,
        typer.Option(help="RUN or NAME=RUN; a name twice: further pre-training seeds."),
    ] = None,
    labels: Annotated[str, typer.Option(help="Label counts, e.g. 4,8,20 or 8,all.")] = "all",
    subsets: Annotated[int, typer.Option(help="Draws of training cases per count.")] = 5,
    volumes: Annotated[
        Path | None, typer.Option(help="Files of a store, for scores on the original grid.")
    ] = None,
    scratch: Annotated[bool, typer.Option(help="Compare with a start from scratch.")] = True,
    jobs: Annotated[int, typer.Option(help="Processes at once, sharing the cores.")] = 1,
    shard: Annotated[
        str | None, typer.Option(help="i/n: only this share of the jobs, in a job array.")
    ] = None,
    tolerance_mm: Annotated[
        float | None, typer.Option(help="Of the normalised surface Dice; default the recipe's.")
    ] = None,
    allow_overlap: Annotated[
        bool, typer.Option(help="Go on although held-out volumes were seen in pre-training.")
    ] = False,
    lr: Annotated[
        list[str] | None,
        typer.Option(help="NAME=RATE: learning rate of one start (scratch, or an encoder's NAME)."),
    ] = None,
) -> None:
    """Scratch against pre-trained over label counts and subsets: tables, curve, paired tests.

    Example: `spark3d label-efficiency --data task/ --encoder runs/pre --labels 4,8,20 --out study/`
    """
    from spark3d.commands.label_efficiency import label_efficiency_command

    recipe, overrides = split_recipe(arguments)
    counts = [part.strip() for part in labels.split(",") if part.strip() != "all"]
    chosen = [int(n) for n in numbers(",".join(counts), "--labels")]
    every = ["all"] if len(counts) < len(labels.split(",")) else []
    label_efficiency_command(
        required(data, "--data"), required(out, "--out"), encoder or [], [*chosen, *every],
        subsets, recipe, overrides, volumes, scratch, jobs, shard, tolerance_mm, allow_overlap,
        lr or [],
    )  # fmt: skip


def export(
    run: Annotated[Path, typer.Argument(help="Run folder: fine-tuning; for nnunet pre-training.")],
    out: Annotated[Path, typer.Option(help="New folder.")],
    to: Annotated[
        str, typer.Option(help="bundle (MONAI), onnx, exported (torch.export) or nnunet.")
    ] = "bundle",
    overlap: Annotated[float, typer.Option(help="Of windows, in a bundle.")] = 0.5,
) -> None:
    """Write a model for other programs, checked to compute the same numbers before it is kept.

    Example: `spark3d export runs/fine --to bundle --out bundle/`
    """
    from spark3d.commands.export import export_command

    difference = export_command(run, out, to, overlap)
    typer.echo(f"{to}: {out}, largest difference of a logit {difference:.1e} of the largest logit")


def report(
    folders: Annotated[
        list[str], typer.Argument(help="Run and evaluation folders, as FOLDER or NAME=FOLDER.")
    ],
    out: Annotated[Path, typer.Option(help="HTML file to write.")] = Path("report.html"),
    title: Annotated[str, typer.Option(help="Heading of the page.")] = "spark3d report",
) -> None:
    """One HTML page that opens offline: what ran, curves, reconstructions, scores, overlays.

    Example: `spark3d report runs/pre runs/fine scratch=scores/a pre-trained=scores/b`
    """
    from spark3d.commands.report import report_command

    typer.echo(f"report: {report_command(folders, out, title)}")


def bench_predict(
    out: Annotated[Path, typer.Option(help="JSON of results; an existing one is completed.")],
    measures: Annotated[
        str, typer.Option(help="agree (logits), peak (memory), time, with commas.")
    ] = "agree,peak,time",
    quick: Annotated[bool, typer.Option(help="A tiny volume: only to see it run.")] = False,
    threads: Annotated[int, typer.Option(help="Of torch.")] = 2,
    seconds: Annotated[
        float, typer.Option(help="No further round of timing begins later.")
    ] = 3600.0,
    rounds: Annotated[int, typer.Option(help="Counted, at most.")] = 3,
) -> None:
    """Sliding windows against MONAI's on 14 classes of 512 x 512 x 300: result, memory, time.

    Example: `spark3d bench predict --out predict.json`
    """
    from spark3d.commands.bench_predict import bench_predict_command

    names = [part.strip() for part in measures.split(",") if part.strip()]
    bench_predict_command(out, names, quick, threads, seconds, rounds)
