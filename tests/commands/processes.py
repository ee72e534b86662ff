"""Commands in processes of their own, forked from a server that has imported them once."""

import multiprocessing
import os
import socket
import time
from collections.abc import Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

from spark3d.engine.logging import read_metrics

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["spark3d.commands.pretrain", "spark3d.commands.finetune"])
SECONDS = 300


def command(arguments: Sequence[str], log: str, environment: Mapping[str, str]) -> None:
    """What the process does: `spark3d ARGUMENTS`, with all it says in a file."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(environment)
    multiprocessing.set_start_method("fork", force=True)  # of data workers, as in a shell
    from spark3d.cli import main

    main(list(arguments))


def start(arguments: Sequence[str | Path], log: Path, **environment: str) -> BaseProcess:
    """Start `spark3d ARGUMENTS`; its exit code is that of the command line."""
    words = [str(word) for word in arguments]
    process = CONTEXT.Process(target=command, args=(words, str(log), environment))
    process.start()
    return process


def wait_for_step(process: BaseProcess, run: Path, step: int, log: Path) -> None:
    """Return as soon as the metrics of a run hold this step."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        if any(line["step"] >= step for line in read_metrics(run / "metrics.jsonl")):
            return
        assert process.is_alive(), f"ended before step {step}: {log.read_text()}"
        time.sleep(0.005)
    raise AssertionError(f"no step {step} within {SECONDS} s: {log.read_text()}")


def end(process: BaseProcess) -> int | None:
    """Wait for the end of a process; its exit code, negative for a signal."""
    process.join(SECONDS)
    assert not process.is_alive(), "still running"
    return process.exitcode


def curve(run: Path) -> list[tuple[int, float, float, float]]:
    """Step, loss, gradient norm and learning rate of every training line."""
    lines = [line for line in read_metrics(run / "metrics.jsonl") if line["kind"] == "train"]
    return [(line["step"], line["loss"], line["grad_norm"], line["lr"]) for line in lines]


def start_ranks(arguments: Sequence[str | Path], log: Path, world: int = 2) -> list[BaseProcess]:
    """Processes that find in their environment what torchrun puts there; logs get their rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "test",
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "GROUP_WORLD_SIZE": "1",
        "GROUP_RANK": "0",
    }
    return [
        start(
            arguments,
            log.with_name(f"{log.name}{rank}"),
            **shared,
            RANK=str(rank),
            LOCAL_RANK=str(rank),
        )
        for rank in range(world)
    ]


def ranks(arguments: Sequence[str | Path], log: Path, world: int = 2) -> list[int | None]:
    """Exit codes of `start_ranks`."""
    return [end(process) for process in start_ranks(arguments, log, world)]
