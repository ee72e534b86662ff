"""`spark3d weights ...`: options in, one call; imports little until it runs."""

from pathlib import Path
from typing import Annotated, Literal

import typer

weights = typer.Typer(
    help="Exchange encoder weights: import, export, 2D to 3D, input channels.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)

Source = Annotated[
    Path, typer.Argument(help="Run folder, folder of a conversion, or encoder.safetensors.")
]
Out = Annotated[Path, typer.Option(help="New folder for encoder.safetensors and its passport.")]


@weights.command("import")
def import_(
    file: Annotated[
        Path, typer.Argument(help="Checkpoint: .safetensors, or what torch saved (tensors only).")
    ],
    backbone: Annotated[
        str, typer.Option("--as", help="The network it is of: timm/NAME, monai/resnet50, ...")
    ],
    out: Out,
    dims: Annotated[
        int | None, typer.Option(help="Spatial axes; default 2 for timm, 3 for others.")
    ] = None,
    in_channels: Annotated[
        int | None, typer.Option(help="Adapt what reads the input; default as in the file.")
    ] = None,
    options: Annotated[
        str, typer.Option(help="Options of the network as YAML, where sizes are not the usual.")
    ] = "{}",
    entry: Annotated[
        str | None, typer.Option(help="Which weights, where the file holds several.")
    ] = None,
) -> None:
    """Bring in official SparK, timm or MONAI weights for `pretrain --init`, `finetune --encoder`.

    A SparK pre-training keeps its decoder too. Files that ask to run code are refused.

    Example: `spark3d weights import resnet50.pth --as timm/resnet50 --out runs/imported`
    """
    from spark3d.commands.weights import import_command

    import_command(file, backbone, out, dims, in_channels, options, entry)


@weights.command("export")
def export(
    source: Source,
    to: Annotated[Literal["timm"], typer.Option(help="For which library.")],
    out: Annotated[Path, typer.Option(help="The .safetensors file to write.")],
) -> None:
    """Write a 2D encoder so that `timm.create_model` loads it strictly, without a classifier.

    Example: `spark3d weights export runs/pre2d --to timm --out resnet50.safetensors`
    """
    from spark3d.commands.weights import export_command

    export_command(source, to, out)


@weights.command("inflate")
def inflate(
    source: Source,
    out: Out,
    depth: Annotated[
        Literal["mean", "centre", "flat"],
        typer.Option(help="Kernels: 1/k in each slice, the middle slice alone, or one slice."),
    ] = "mean",
    in_channels: Annotated[
        int | None, typer.Option(help="Adapt what reads the input too, e.g. 1 for CT.")
    ] = None,
) -> None:
    """Grow a 2D encoder to 3D: a volume that is constant along its first axis keeps the features.

    Example: `spark3d weights inflate runs/imported --in-channels 1 --out runs/imported3d`
    """
    from spark3d.commands.weights import inflate_command

    inflate_command(source, out, depth, in_channels)


@weights.command("channels")
def channels(
    source: Source,
    to: Annotated[int, typer.Option(help="Channels of the input, 1 or more.", min=1)],
    out: Out,
) -> None:
    """Adapt an encoder to other input channels: RGB to 1 is the sum, 1 to n repeats it over n.

    Example: `spark3d weights channels runs/imported --to 1 --out runs/grey`
    """
    from spark3d.commands.weights import channels_command

    channels_command(source, to, out)
