"""Packed cells on a GPU: what must hold there, and what it is measured to bring.

    python benchmarks/gpu.py --out gpu.json                    # everything
    python benchmarks/gpu.py --out gpu.json --minutes 9        # in pieces: the same command goes on
    python benchmarks/gpu.py --out quick.json --quick          # tiny networks, only to see it run
    python benchmarks/gpu.py --out quick.json --quick --device cpu

Parts, each for every network and precision (`--parts`, `--networks`, `--precisions`):

accuracy     stages, loss and gradients of a step against the reference backend in float64
determinism  two runs of two steps, bit by bit
waiting      no host synchronisation in a step, tables of a new mask included
speed        encoder up to each stage and whole steps: emulations, both decoders, packed cells
memory       saved activations and peak of a step
strategies   every convolution by every strategy, to choose from for this kind of device

Results are in the JSON as soon as they are known, and as tables in a file of the same name ending
in .md. A part that does not fit the memory is noted as failed. Ends with 1 if a check fails.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from spark3d.benchmarks.device import PRECISIONS, Setup
from spark3d.benchmarks.device_checks import accuracy, determinism, waiting
from spark3d.benchmarks.device_speed import memory, speed, strategies
from spark3d.benchmarks.device_tables import markdown
from spark3d.commands.bench_results import save
from spark3d.errors import DataError

CHECKS: dict[str, Callable[[Setup], Any]] = {
    "waiting": waiting,
    "accuracy": accuracy,
    "determinism": determinism,
}
MEASURES: dict[str, Callable[[Setup], Any]] = {
    "memory": memory,
    "strategies": lambda setup: {"convolutions": strategies(setup)},
    "speed": speed,
}
PARTS = CHECKS | MEASURES


def main(words: Sequence[str] | None = None) -> int:
    """Run what the file of results does not hold yet."""
    options = parse(words)
    try:
        document = load(options.out, machine(options))
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 3
    began = time.perf_counter()
    for part in options.parts:
        for setup in setups(options, part):
            found = document["results"].setdefault(f"{setup.network} {setup.precision}", {})
            if part in found:
                continue
            if time.perf_counter() - began > 60 * options.minutes:
                print("out of time: the same command goes on", file=sys.stderr)
                return finish(document, options.out)
            found[part] = attempt(PARTS[part], setup)
            save(options.out, document)
            print(f"{setup.network} {setup.precision} {part}", flush=True)
    return finish(document, options.out)


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    """The options; lists are given with commas."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON of results, completed")
    parser.add_argument("--device", default="cuda", help="as torch names it")
    parser.add_argument("--quick", action="store_true", help="tiny networks, to see it run")
    parser.add_argument("--parts", type=listed(PARTS), default=tuple(PARTS))
    parser.add_argument("--networks", type=listed(("resnet50", "convnext_tiny")),
                        default=("resnet50", "convnext_tiny"))  # fmt: skip
    parser.add_argument("--precisions", type=listed(PRECISIONS), default=tuple(PRECISIONS))
    parser.add_argument("--crop", type=int, default=96, help="voxels per axis, of 32 each")
    parser.add_argument("--batch", type=int, default=16, help="crops; checks take two at most")
    parser.add_argument("--seconds", type=float, default=10.0, help="of timing per comparison")
    parser.add_argument("--minutes", type=float, default=1e9, help="nothing begins after so many")
    options = parser.parse_args(words)
    if options.crop < 64 or options.crop % 32 or options.batch < 1:
        parser.error(f"--crop {options.crop} --batch {options.batch}: cells are 32 voxels wide, "
                     "take 64, 96, 128, ... and at least one crop")  # fmt: skip
    if torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
        parser.error(
            f"--device {options.device}: torch finds no CUDA device; --device cpu runs too"
        )
    return options


def listed(known: Iterable[str]) -> Callable[[str], tuple[str, ...]]:
    """A parser of names out of `known` with commas between them."""

    def names(text: str) -> tuple[str, ...]:
        given = tuple(part.strip() for part in text.split(",") if part.strip())
        if not given or set(given) - set(known):
            raise argparse.ArgumentTypeError(f"{text!r}: choose from {', '.join(known)}")
        return given

    return names


def setups(options: argparse.Namespace, part: str) -> list[Setup]:
    """What a part runs on; double precision is for what must hold, not for speed."""
    crop, batch, rounds = (
        (64, 1, (1, 1)) if options.quick else (options.crop, options.batch, (2, 9))
    )
    tiny = {"resnet50": "quick_resnet", "convnext_tiny": "quick_convnext"}
    precisions = [p for p in options.precisions if part in CHECKS or p != "float64"]
    return [
        Setup(
            tiny[name] if options.quick else name,
            options.device,
            precision,
            crop,
            min(batch, 2) if part in CHECKS else batch,
            0.0 if options.quick else options.seconds,
            rounds,
        )
        for name in options.networks
        for precision in precisions
    ]


def attempt(part: Callable[[Setup], Any], setup: Setup) -> dict[str, Any]:
    """Run a part; too little memory is a result."""
    try:
        return part(setup)
    except torch.OutOfMemoryError:
        if setup.cuda:
            torch.cuda.empty_cache()
        return {"failed": "out of memory: take a smaller --batch or --crop"}


def machine(options: argparse.Namespace) -> dict[str, str]:
    """What the figures depend on."""
    device = torch.device(options.device)
    named = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    size = "quick" if options.quick else f"{options.crop}^3 x {options.batch}"
    return {"device": named, "torch": torch.__version__, "crops": size}


def load(path: Path, here: dict[str, str]) -> dict[str, Any]:
    """The results so far, or an empty document.

    Raises:
        DataError: something else stands there, or results of another machine or size.
    """
    if not path.is_file():
        return {"machine": here, "results": {}}
    try:
        document = json.loads(path.read_text())
        before = dict(document["machine"])
        document["results"].keys()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} holds no results of benchmarks/gpu.py: choose another") from error
    if before != here:
        raise DataError(f"{path} was measured on {before}, not {here}: choose another file")
    return document


def finish(document: dict[str, Any], out: Path) -> int:
    """Write and print the tables; 1 if something that must hold does not."""
    text = markdown(document)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".md").write_text(text)
    print(text)
    parts = [said for found in document["results"].values() for said in found.values()]
    return int(any(said.get("holds") is False for said in parts))


if __name__ == "__main__":
    sys.exit(main())
