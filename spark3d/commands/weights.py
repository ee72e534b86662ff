"""`spark3d weights`: encoder weights from other programs, to timm, to 3D, to other channels."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from spark3d.config import read_yaml
from spark3d.errors import ConfigError
from spark3d.weights.convert import Converted, change_channels, import_foreign, inflate_to_3d
from spark3d.weights.exchange import (
    ENCODER,
    encoder_file,
    file_sha256,
    load_encoder,
    save_encoder,
    save_objective,
)
from spark3d.weights.foreign import read_foreign
from spark3d.weights.to_timm import export_timm

BLIND = (
    "what these weights were trained on is not known: spark3d cannot tell whether validation cases "
    "were among it"
)


def import_command(
    file: Path,
    backbone: str,
    out: Path,
    dims: int | None = None,
    in_channels: int | None = None,
    options: str = "{}",
    entry: str | None = None,
) -> Path:
    """Bring a checkpoint of another program into a folder that `--init` and `--encoder` take.

    Args:
        file: `.safetensors`, or anything torch reads as tensors alone.
        backbone: the network it is of, such as `timm/resnet50`.
        out: new folder.
        dims: spatial axes; by default 2 for networks of timm, 3 for others.
        in_channels: adapt the convolutions that read the input to so many.
        options: of the backbone, as YAML.
        entry: of the file, where it holds several sets of weights.

    Returns:
        The encoder weights.
    """
    target = new_weights(out)
    found = read_foreign(file, entry)
    source = f"{file.name} (SHA-256 {file_sha256(file)[:12]})"
    ndim = dims or (2 if backbone.startswith("timm/") else 3)
    given = mapping(options, "--options")
    console = Console(soft_wrap=True, highlight=False)
    where = f" under {found.entry!r}" if found.entry else ""
    also = f"; also there: {', '.join(found.others)} (--entry takes one)" if found.others else ""
    console.print(f"{file.name}: {len(found.state)} tensors{where}{also}", markup=False)
    done = import_foreign(found, source, backbone, ndim, in_channels, given)
    return write(done, target, console, (BLIND,))


def inflate_command(
    weights: Path, out: Path, depth: str = "mean", in_channels: int | None = None
) -> Path:
    """Weights of the 3D twin of a 2D encoder; the new axis is the first."""
    target = new_weights(out)
    state, passport = load_encoder(weights)
    console = Console(soft_wrap=True, highlight=False)
    if in_channels is not None and in_channels != passport.in_channels:
        first = change_channels(state, passport, in_channels)
        tell(first, console)
        state, passport = first.state, first.passport
    return write(inflate_to_3d(state, passport, depth), target, console)


def channels_command(weights: Path, in_channels: int, out: Path) -> Path:
    """The encoder for another number of input channels."""
    target = new_weights(out)
    state, passport = load_encoder(weights)
    console = Console(soft_wrap=True, highlight=False)
    return write(change_channels(state, passport, in_channels), target, console)


def export_command(weights: Path, to: str, out: Path) -> Path:
    """Write the encoder as a file that timm loads strictly."""
    if to != "timm":
        raise ConfigError(f"--to {to} is unknown; choose timm")
    if out.suffix != ".safetensors" or out == encoder_file(weights):
        raise ConfigError(f"--out {out} must be a new .safetensors file, e.g. resnet50.safetensors")
    if out.exists():
        raise ConfigError(f"--out {out} exists; choose a new file")
    state, passport = load_encoder(weights)
    arguments, report, equality = export_timm(state, passport, out)
    console = Console(soft_wrap=True, highlight=False)
    for line in (*report.lines(), f"checked: {equality}", f"wrote {out}; load it by"):
        console.print(line, markup=False)
    rest = {"checkpoint_path": str(out), **arguments}
    name = rest.pop("model_name")
    told = ", ".join(f"{key}={value!r}" for key, value in rest.items())
    console.print(f"timm.create_model({name!r}, {told})", markup=False)
    return out


def new_weights(out: Path) -> Path:
    """Where the encoder weights of a conversion go.

    Raises:
        ConfigError: The folder holds something already.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out {out} exists and is not an empty folder; choose a new one")
    return out / ENCODER


def write(done: Converted, target: Path, console: Console, remarks: tuple[str, ...] = ()) -> Path:
    """Tell what was done, then write it."""
    tell(done, console)
    target.parent.mkdir(parents=True, exist_ok=True)
    passport = done.passport
    if done.objective:
        rest = save_objective(target, done.objective)
        passport = replace(passport, objective_sha256=rest)
        console.print(f"kept for more pre-training: {len(done.objective)} tensors of the objective")
    save_encoder(target, done.state, passport)
    for remark in remarks:
        console.print(remark, markup=False)
    console.print(f"encoder weights: {target}", markup=False)
    return target


def tell(done: Converted, console: Console) -> None:
    """The report of the keys, and what was compared."""
    about = done.passport
    console.print(
        f"{about.backbone} in {about.ndim}D, {about.in_channels} input channels", markup=False
    )
    for line in (*done.report.lines(), f"checked: {done.equality}"):
        console.print(f"  {line}", markup=False)


def mapping(text: str, option: str) -> dict[str, Any]:
    """A mapping given as YAML on the command line.

    Raises:
        ConfigError: It is something else.
    """
    found = read_yaml(text, option)
    if not isinstance(found, dict):
        raise ConfigError(f"{option} {text} must be a mapping, e.g. '{{drop_path_rate: 0.1}}'")
    return found
