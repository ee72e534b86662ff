"""The `spark3d` command: options in, one call, one line per error; imports little until it runs."""

import errno
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import typer

from spark3d import __version__
from spark3d.cli_bench import bench
from spark3d.cli_evaluation import (
    bench_predict,
    evaluate,
    export,
    label_efficiency,
    report,
)
from spark3d.cli_options import Geometry, Overrides, numbers, required, split_recipe
from spark3d.cli_weights import weights
from spark3d.errors import ConfigError, DataError, EnvironmentProblem, Interrupted

app = typer.Typer(
    help="Pre-train convolutional networks on unlabelled volumes; fine-tune them for segmentation.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)

app.add_typer(bench, name="bench")
app.add_typer(weights, name="weights")


@app.callback(invoke_without_command=True)
def version(
    show: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
) -> None:
    """Self-supervised pre-training of convolutional networks on volumes (SparK in N dimensions)."""
    if show:
        typer.echo(f"spark3d {__version__}")
        raise typer.Exit


@app.command()
def doctor(
    data: Annotated[Path, typer.Argument(help="Any folder that `prepare` takes.")],
    out: Annotated[Path, typer.Option(help="Gets all that was found, as JSON.")] = Path(
        "doctor.json"
    ),
    modality: Annotated[str, typer.Option(help="auto, CT or MR.")] = "auto",
    geometry: Annotated[
        Geometry, typer.Option(help="Which to trust where sform and qform differ; agree: refuse.")
    ] = "agree",
    nan_fill: Annotated[
        float | None, typer.Option(help="Value in place of NaN; without it NaN is refused.")
    ] = None,
    group_pattern: Annotated[
        str | None, typer.Option(help="Regular expression whose first group is the patient's id.")
    ] = None,
    workers: Annotated[int, typer.Option(help="Processes; 0 works in this one.")] = 2,
    names: Annotated[
        Path | None,
        typer.Option(help="Gets the file behind each case id. It can tell patients: keep it safe."),
    ] = None,
    memory_gib: Annotated[
        float | None, typer.Option(help="Memory for all workers; default half of the machine's.")
    ] = None,
) -> None:
    """Check a folder before any work: headers, voxels, labels, outliers, and what it will take.

    Reads every file to its end and writes nothing but the report. Leaves with 3 if something must
    be fixed.

    Example: `spark3d doctor scans/ --out doctor.json`
    """
    from spark3d.commands.doctor import doctor_command

    doctor_command(
        data, out, modality, geometry, nan_fill, group_pattern, workers, names, memory_gib
    )


@app.command()
def prepare(
    data: Annotated[
        Path, typer.Option(help="Decathlon, nnU-Net, BTCV or any other folder; or a case list.")
    ],
    out: Annotated[Path, typer.Option(help="Store to write; an interrupted one is completed.")],
    spacing: Annotated[
        str, typer.Option(help="Target spacing in mm, e.g. 1.5,1.5,2; auto: the median.")
    ] = "auto",
    modality: Annotated[str, typer.Option(help="auto, CT or MR.")] = "auto",
    geometry: Annotated[
        Geometry, typer.Option(help="Which to trust where sform and qform differ; agree: refuse.")
    ] = "agree",
    nan_fill: Annotated[
        float | None, typer.Option(help="Value in place of NaN; without it NaN is refused.")
    ] = None,
    group_pattern: Annotated[
        str | None, typer.Option(help="Regular expression whose first group is the patient's id.")
    ] = None,
    workers: Annotated[int, typer.Option(help="Processes; 0 works in this one.")] = 2,
    max_bad: Annotated[
        int | None,
        typer.Option(
            help="Unusable cases to accept, of all shares with --end-shards; default 1 in 100 "
            "unlabelled, 0 labelled."
        ),
    ] = None,
    shard: Annotated[
        str | None, typer.Option(help="i/n: prepare only this share, e.g. in a job array.")
    ] = None,
    end_shards: Annotated[
        bool, typer.Option(help="End a store that was prepared in shares.")
    ] = False,
    memory_gib: Annotated[
        float | None, typer.Option(help="Memory for all workers; default half of the machine's.")
    ] = None,
    verify: Annotated[
        bool, typer.Option(help="Read all that is there and prepare again what was damaged.")
    ] = False,
) -> None:
    """Check volumes, orient, resample, crop to the body and store them for fast reading.

    Example: `spark3d prepare --data scans/ --out store/ --spacing 1.5,1.5,2`
    """
    from spark3d.commands.prepare import prepare_command

    prepare_command(
        data, out, spacing, modality, geometry, nan_fill, group_pattern, workers, max_bad,
        shard=shard, end_shards=end_shards, memory_gib=memory_gib, verify=verify,
    )  # fmt: skip


@app.command()
def pretrain(
    arguments: Overrides = None,
    data: Annotated[
        Path | None, typer.Option(help="Store, folder of volumes, or images with --dims 2.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; an existing run resumes.")] = None,
    dims: Annotated[int | None, typer.Option(help="2 or 3; default the recipe's, else 3.")] = None,
    exclude: Annotated[
        Path | None,
        typer.Option(help="Never to read: file of case ids, or a split (its held-out cases)."),
    ] = None,
    init: Annotated[
        Path | None, typer.Option(help="Go on from these encoder weights or run; default: random.")
    ] = None,
) -> None:
    """Pre-train an encoder on unlabelled volumes (or images) by masked reconstruction.

    Examples:

    `spark3d pretrain --data scans/ --out runs/pre`

    `spark3d pretrain spark_resnet50_3d optim.steps=20000 --data store/ --out runs/pre`

    `spark3d pretrain spark_resnet50_2d --dims 2 --data photos/ --out runs/pre2d`
    """
    from spark3d.commands.pretrain import pretrain_command

    recipe, overrides = split_recipe(arguments)
    target = pretrain_command(
        required(data, "--data"), required(out, "--out"), recipe, overrides, dims, exclude, init
    )
    typer.echo(f"encoder weights: {target}")


@app.command()
def finetune(
    arguments: Overrides = None,
    data: Annotated[Path | None, typer.Option(help="Labelled volumes, or train/ and val/.")] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; an existing run resumes.")] = None,
    encoder: Annotated[
        Path | None, typer.Option(help="encoder.safetensors or its run; without: from scratch.")
    ] = None,
    task: Annotated[
        Literal["segment", "classify"], typer.Option(help="Segment volumes or classify images.")
    ] = "segment",
    dims: Annotated[
        int | None, typer.Option(help="3, or 2 for axial slices and for images.")
    ] = None,
    protocol: Annotated[
        str | None, typer.Option(help="A frozen protocol in place of a recipe, e.g. btcv-80-20.")
    ] = None,
    smoke: Annotated[
        bool, typer.Option(help="Shorten the protocol to a few steps; marked as no result.")
    ] = False,
    allow_overlap: Annotated[
        bool, typer.Option(help="Go on although held-out cases were seen in training; told.")
    ] = False,
) -> None:
    """Fine-tune a network on labelled volumes, or with `--task classify` on images in classes.

    Examples:

    `spark3d finetune --data labelled/ --encoder runs/pre --out runs/fine`

    `spark3d finetune split.labels=8 optim.steps=600 --data store/ --out runs/scratch8`

    `spark3d finetune --protocol btcv-monai-24-6 --data RawData/ --encoder runs/pre --out runs/btcv`

    `spark3d finetune --dims 2 --task classify --data photos/ --encoder runs/pre2d --out runs/fine`
    """
    recipe, overrides = split_recipe(arguments)
    given = required(data, "--data"), required(out, "--out"), encoder, recipe
    if dims is not None:
        overrides = (*overrides, f"dims={dims}")
    if task == "classify":
        from spark3d.commands.classify import classify_command

        if protocol or smoke:
            raise ConfigError("--protocol and --smoke are about volumes; leave them out")
        target = classify_command(*given, overrides, allow_overlap).model
    else:
        from spark3d.commands.finetune import finetune_command

        target = finetune_command(*given, overrides, allow_overlap, protocol, smoke).model
    typer.echo(f"model: {target}")


@app.command()
def predict(
    model: Annotated[Path, typer.Option(help="Run folder of a fine-tuning, or its model.")],
    data: Annotated[Path, typer.Option(help="Folder of volumes, or one volume.")],
    out: Annotated[Path, typer.Option(help="Gets a label map per case; finished ones are kept.")],
    overlap: Annotated[
        float | None, typer.Option(help="Of neighbouring windows, 0 to below 1; default the run's.")
    ] = None,
    flips: Annotated[
        str, typer.Option(help="Axes to mirror in extra passes, e.g. 0 (left-right) or 0,1.")
    ] = "",
    skip_empty: Annotated[
        bool | None,
        typer.Option(
            help="Leave out windows of nothing but air; default for models of CT windows."
        ),
    ] = None,
    batch: Annotated[int, typer.Option(help="Windows per forward pass.")] = 1,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    amp: Annotated[bool, typer.Option(help="Forward passes in bfloat16.")] = False,
    section: Annotated[
        str | None, typer.Option(help="Only the cases a dataset lists so, e.g. validation.")
    ] = None,
    geometry: Annotated[
        Geometry, typer.Option(help="Which to trust where sform and qform differ; agree: refuse.")
    ] = "agree",
    nan_fill: Annotated[float | None, typer.Option(help="Value in place of NaN.")] = None,
    format: Annotated[
        Literal["nifti", "dicom-seg"], typer.Option(help="dicom-seg: for DICOM series.")
    ] = "nifti",
    held_out: Annotated[
        bool,
        typer.Option(help="Only what the run held out: its test part, else validation."),
    ] = False,
    modality: Annotated[
        Literal["auto", "CT", "MR"] | None,
        typer.Option(help="Of the volumes; default that of training. auto: by their values."),
    ] = None,
) -> None:
    """Segment whole volumes by sliding windows; label maps come back on each file's own grid.

    Example: `spark3d predict --model runs/fine --data scans/ --out predictions/`
    """
    from spark3d.commands.predict import predict_command

    axes = [int(part) for part in numbers(flips, "--flips")]
    predict_command(
        model, data, out, overlap, axes, skip_empty, batch, device, amp, section, geometry,
        nan_fill, format=format, held_out=held_out, modality=modality,
    )  # fmt: skip


app.command()(evaluate)
app.command("label-efficiency")(label_efficiency)
app.command()(export)
app.command()(report)


@app.command()
def check(
    backbone: Annotated[str, typer.Argument(help="E.g. monai/segresnet, timm/resnet50.")],
    dims: Annotated[int, typer.Option(help="Spatial axes: 1, 2 or 3.")] = 3,
    in_channels: Annotated[int, typer.Option(help="Channels of the input.")] = 1,
    ratio: Annotated[float, typer.Option(help="Share of hidden cells.")] = 0.6,
    cell_size: Annotated[str | None, typer.Option(help="Voxels of a cell: 8, or 4,8,8.")] = None,
    options: Annotated[
        list[str] | None, typer.Argument(help="name=value, for the network.")
    ] = None,
) -> None:
    """Prove that a backbone leaks nothing when masked, and that both backends agree on it.

    Example: `spark3d check monai/segresnet init_filters=16 --dims 3`
    """
    from spark3d.commands.check import check_command

    check_command(backbone, dims, in_channels, ratio, cell_size, tuple(options or ()))


bench.command("predict")(bench_predict)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for phantoms, runs and the report.")] = Path(
        "demo"
    ),
    steps: Annotated[
        int | None, typer.Option(help="Of each training; few only show that everything runs.")
    ] = None,
) -> None:
    """The whole way on procedural CT phantoms: no download, no GPU, about ten minutes on two cores.

    Example: `spark3d demo --out demo`
    """
    from spark3d.commands.demo import demo_command

    demo_command(out, steps)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and leave; a user's mistake is one line and an exit code: 2, 3, 4 or 75.

    Args:
        arguments: as on the command line, without the program's name; None takes those given there.
    """
    try:
        app(arguments, prog_name="spark3d")
    except (ConfigError, DataError, EnvironmentProblem, Interrupted) as error:
        fail(str(error), error.exit_code)
    except OSError as error:
        if error.errno not in MACHINE_ERRORS:
            raise
        place = f" ({error.filename})" if error.filename else ""
        fail(f"{error.strerror}{place}; free space or check rights, then repeat the command", 4)


MACHINE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)


def fail(message: str, code: int) -> NoReturn:
    """Say what is wrong in one line and leave."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    sys.stderr.write(f"error: {'; '.join(lines)}\n")
    sys.exit(code)


if __name__ == "__main__":
    main()
