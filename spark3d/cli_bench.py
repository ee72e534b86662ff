"""`spark3d bench ...`: options in, one call; imports little until it runs."""

from pathlib import Path
from typing import Annotated

import typer

from spark3d.cli_options import numbers

bench = typer.Typer(help="Measure speed and memory on this machine.", no_args_is_help=True)


@bench.command("core")
def bench_core(
    out: Annotated[Path, typer.Option(help="JSON of results; an existing one is completed.")],
    measures: Annotated[
        str,
        typer.Option(help="time, saved (activations), peak (memory), profile (where time goes)."),
    ] = "time,saved,peak",
    curve: Annotated[
        bool, typer.Option(help="Growth over crop size and share of hidden cells: takes long.")
    ] = False,
    figure: Annotated[
        Path | None, typer.Option(help="Draw the curve, .svg or .png; with --curve.")
    ] = None,
    markdown: Annotated[bool, typer.Option(help="Print the tables as Markdown.")] = False,
    quick: Annotated[bool, typer.Option(help="Tiny networks: only to see it run.")] = False,
    threads: Annotated[int, typer.Option(help="Of torch.")] = 2,
    seconds: Annotated[float, typer.Option(help="Of timing per case.")] = 60.0,
    rounds: Annotated[int, typer.Option(help="Counted per case, at most.")] = 9,
    minutes: Annotated[
        float | None, typer.Option(help="No new measurement begins after so many.")
    ] = None,
) -> None:
    """Packed cells against the whole grid times the mask: time, saved activations, peak memory.

    Example: `spark3d bench core --out bench.json`
    """
    from spark3d.commands.bench import bench_core_command

    names = [part.strip() for part in measures.split(",") if part.strip()]
    bench_core_command(
        out, names, quick=quick, curve=curve, threads=threads, seconds=seconds, rounds=rounds,
        minutes=minutes, figure=figure, markdown=markdown,
    )  # fmt: skip


@bench.command("data")
def bench_data(
    out: Annotated[Path, typer.Option(help="JSON of results; an existing one is completed.")],
    data: Annotated[
        Path | None, typer.Option(help="CT to make the volume of; else SPARK3D_DATA or a phantom.")
    ] = None,
    measures: Annotated[
        str, typer.Option(help="write, warm, cold, hash, memory, step (of training), with commas.")
    ] = "write,warm,cold,hash,memory,step",
    quick: Annotated[bool, typer.Option(help="A tiny volume: only to see it run.")] = False,
    chunk: Annotated[int, typer.Option(help="Voxels per axis of a chunk, 64 or 32.")] = 64,
    seconds: Annotated[float, typer.Option(help="Per measurement.")] = 60.0,
    rounds: Annotated[int, typer.Option(help="Counted per measurement, at most.")] = 30,
    scratch: Annotated[
        Path | None, typer.Option(help="Folder on the disk to measure; default beside --out.")
    ] = None,
    markdown: Annotated[bool, typer.Option(help="Print the tables as Markdown.")] = False,
) -> None:
    """The store against NIfTI, MONAI's loading and a memory-mapped array: speed, size, memory.

    Example: `spark3d bench data --out bench_data.json --data ct.nii.gz`
    """
    from spark3d.commands.bench_data import bench_data_command

    names = [part.strip() for part in measures.split(",") if part.strip()]
    bench_data_command(
        out, data, names, quick=quick, chunk=chunk, seconds=seconds, rounds=rounds,
        scratch=scratch, markdown=markdown,
    )  # fmt: skip


@bench.command("images")
def bench_images(
    out: Annotated[Path, typer.Option(help="JSON of results; an existing one is completed.")],
    data: Annotated[
        Path | None, typer.Option(help="Folder of images; else photographs of noise are made.")
    ] = None,
    measures: Annotated[
        str, typer.Option(help="scan (of a folder), load, step (of training), with commas.")
    ] = "scan,load,step",
    workers: Annotated[str, typer.Option(help="Processes that decode, with commas.")] = "0,2",
    batch: Annotated[int, typer.Option(help="Images a step.")] = 64,
    steps: Annotated[int, typer.Option(help="Counted per measurement.")] = 20,
    quick: Annotated[bool, typer.Option(help="A tiny network: only to see it run.")] = False,
) -> None:
    """Pre-training on images: images a second of scan, loader and step, and how long it waits.

    Example: `spark3d bench images --out bench_images.json --data imagenet/train --workers 2,8`
    """
    from spark3d.commands.bench_images import bench_images_command

    names = [part.strip() for part in measures.split(",") if part.strip()]
    counts = [int(number) for number in numbers(workers, "--workers")]
    bench_images_command(out, data, names, counts, batch, steps, quick)
