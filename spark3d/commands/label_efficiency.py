"""`spark3d label-efficiency`: does pre-training help, and with how many labels?

Scratch and pre-trained starts are fine-tuned over label counts and subsets. Everything but the
start (and its learning rate, where each has its own) is the same in a pair: split, subset, draws,
initial weights of what is not pre-trained, and the budget in steps. Finished jobs are skipped, so
the same command goes on where it was stopped.
"""

import hashlib
import json
import logging
import multiprocessing
import os
import re
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from spark3d import build
from spark3d.commands.label_jobs import Job, Study, run_job, run_job_apart
from spark3d.commands.label_starts import Start, base_recipe, read_starts, with_rates
from spark3d.commands.label_tables import write_tables
from spark3d.commands.labelled import (
    label_names,
    plan_finetuning,
    scored_labels,
)
from spark3d.commands.prepare import prepare_command
from spark3d.commands.report import report_command
from spark3d.commands.splitting import SplitCases, check_overlap, split_cases
from spark3d.commands.stores import existing_folder, fixed, is_store
from spark3d.config import (
    FinetuneRecipe,
    changed_keys,
    dump_yaml,
    load_recipe,
    to_tree,
)
from spark3d.data.crops import needs_padding
from spark3d.data.files import write_atomic
from spark3d.data.splits import few_labels
from spark3d.data.store import Store
from spark3d.engine.logging import set_up_logging
from spark3d.engine.progress import step_progress
from spark3d.errors import ConfigError, DataError, EnvironmentProblem, Interrupted

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """How many jobs are done of all of the study, and where its tables are."""

    done: int
    jobs: int
    out: Path


def label_efficiency_command(
    data: Path,
    out: Path,
    encoders: Sequence[str],
    labels: Sequence[int | str],
    subsets: int = 5,
    recipe: str | None = None,
    overrides: tuple[str, ...] = (),
    volumes: Path | None = None,
    scratch: bool = True,
    jobs: int = 1,
    shard: str | None = None,
    tolerance_mm: float | None = None,
    allow_overlap: bool = False,
    rates: Sequence[str] = (),
    console: Console | None = None,
) -> Outcome:
    """Run what is missing of a study (or of a share of it), then write its tables.

    Args:
        data: labelled volumes, prepared into `out/store`, or a prepared store.
        out: folder of the study.
        encoders: `RUN` or `NAME=RUN`; the same name again is a further pre-training seed, and the
            seeds of a name alternate from subset to subset.
        labels: label counts; "all" takes every training case.
        subsets: draws of training cases per count; the cases of a smaller count lie in a larger.
        recipe: of fine-tuning, for all jobs.
        overrides: `section.key=value`, for all jobs.
        volumes: the files a store was prepared from, to score on the original grid; a folder of
            volumes given as `data` is that already.
        scratch: compare with a start from scratch (alone, without encoders); else with the first
            encoder.
        jobs: at once, each in a process of its own, sharing the cores.
        shard: "i/n": only this share of the jobs.
        tolerance_mm: of the surface Dice; that of the recipe if not given.
        allow_overlap: go on although held-out volumes were seen in pre-training.
        rates: `NAME=RATE`, learning rates of single arms, for starts that were tuned apart.
        console: where results are printed.

    Raises:
        ConfigError: options that make no sense, starts that cannot be compared, another study.
        DataError: no labelled case, or leaks between the parts.
        EnvironmentProblem: a job was killed.
        Interrupted: stopped on request.
    """
    set_up_logging()
    console = console or Console()
    share = parse_shard(shard)
    if jobs < 1 or subsets < 1:
        raise ConfigError(f"{jobs} jobs at once, {subsets} subsets: both must be 1 or more")
    starts = with_rates(read_starts(encoders, scratch), rates)
    base = base_recipe(recipe, overrides, starts)
    within = base.score.tolerance_mm if tolerance_mm is None else tolerance_mm
    if not within > 0:
        raise ConfigError(f"--tolerance-mm {within:g} must be above 0; 1 to 3 mm are usual")
    store, volumes = prepared(data, out, volumes, base, share is not None)
    parts = split_cases(base.split, store.cases)
    counts = label_counts(labels, len(parts.train))
    for _, passport in [pair for start in starts for pair in start.encoders]:
        check_overlap(parts, passport, allow_overlap)
    study = open_study(out, store, volumes, base, parts, within, allow_overlap, jobs)
    plan = plan_jobs(starts, counts, subsets, base, parts)
    mine = plan if share is None else plan[share[0] - 1 :: share[1]]
    todo = [job for job in mine if not study.is_done(job)]
    console.print(f"{len(plan)} jobs, {len(mine)} of them here, {len(todo)} to do")
    run_all(study, todo, jobs, console)
    done = write_tables(study, [s.arm for s in starts], plan, console)
    if done:
        report_command([out], out / "report.html", f"Label efficiency: {out.resolve().name}")
    return Outcome(done, len(plan), out)


def prepared(
    data: Path, out: Path, volumes: Path | None, recipe: FinetuneRecipe, shared: bool
) -> tuple[Store, Path | None]:
    """The store of the study, and the files it was prepared from where they are known.

    Raises:
        ConfigError: shares of a study whose volumes are not prepared, or another spacing.
    """
    existing_folder(data, "give a prepared store or a folder of labelled volumes")
    folder, spacing = data, recipe.data.spacing_mm
    if not is_store(data):
        folder, volumes = out / "store", volumes or data
        asked = "auto" if spacing == "auto" else ",".join(str(s) for s in spacing)
        if not shared:
            prepare_command(data, folder, asked)
        elif not (folder / "index.json").is_file():
            raise ConfigError(
                f"shares of a study need prepared volumes: first run spark3d prepare --data {data} "
                f"--out {folder} --spacing {asked}"
            )
    store = Store.open(folder)
    if spacing != "auto" and any(
        abs(a - b) > 1e-5 for a, b in zip(store.spacing_mm, spacing, strict=True)
    ):
        raise ConfigError(
            f"{folder} was prepared at {store.spacing_mm} mm, the recipe asks for {spacing}: give "
            f"data.spacing_mm={list(store.spacing_mm)} or prepare again"
        )
    return store, volumes


def label_counts(labels: Sequence[int | str], most: int) -> list[int]:
    """The counts as numbers, ascending, each once.

    Raises:
        ConfigError: none, or one that the split does not have.
    """
    counts = sorted({most if count == "all" else int(count) for count in labels})
    wrong = [count for count in counts if not 1 <= count <= most]
    if wrong or not counts:
        raise ConfigError(
            f"--labels {','.join(map(str, wrong or labels))}: the split has {most} training cases; "
            f"choose counts from 1 to {most}, or all"
        )
    return counts


def open_study(
    out: Path,
    store: Store,
    volumes: Path | None,
    base: FinetuneRecipe,
    parts: SplitCases,
    tolerance_mm: float,
    allow_overlap: bool,
    jobs: int,
) -> Study:
    """Fix what is still `auto` from all training images, and keep the recipe in `out`.

    Raises:
        ConfigError: `out` holds another study.
        DataError: no case to validate on.
    """
    if not parts.train or not parts.validation:
        raise DataError(
            f"{store.folder}: {len(parts.train)} training and {len(parts.validation)} validation "
            "cases with labels; both are needed"
        )
    model = base.model
    unit = build.backbone(model.backbone, base.dims, model.in_channels, model.options).stride
    resolved, _ = plan_finetuning(base, store, parts.train, unit, 1)
    names = label_names(store, [r for r in store.cases if r.has_label])
    scored = scored_labels(resolved, parts.scored, names)
    file = out / "recipe.yaml"
    if file.is_file():
        if different := changed_keys(load_recipe(FinetuneRecipe, file), resolved):
            raise ConfigError(
                f"--out {out} is another study: {', '.join(different[:6])} differ from its "
                "recipe.yaml; choose a new folder, or give the same values to go on"
            )
    elif out.is_dir() and (others := [f.name for f in out.iterdir() if f.name != "store"]):
        raise ConfigError(f"--out {out} holds something else ({others[0]}); choose a new folder")
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(file, dump_yaml(resolved).encode())
    kept = {k: v for k, v in to_tree(resolved).items() if k not in ("compute", "log")}
    threads = None if jobs == 1 else max(1, (os.cpu_count() or 1) // jobs)
    has_air = build.window(fixed(resolved.data.window)).has_air
    crop = build.sizes(fixed(resolved.data.crop), resolved.dims, "data.crop")
    small = any(needs_padding(r.size[: resolved.dims], crop) for r in parts.validation)
    return Study(
        out, store.folder, volumes, file,
        hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest(),
        tuple(r.id for r in parts.validation),
        {r.id: store.voxel_hash(r.id) for r in (*parts.train, *parts.validation)},
        scored,
        tolerance_mm, resolved.window_overlap,
        has_air, small and not has_air, allow_overlap, threads,
    )  # fmt: skip


def plan_jobs(
    starts: Sequence[Start],
    counts: Sequence[int],
    subsets: int,
    recipe: FinetuneRecipe,
    parts: SplitCases,
) -> list[Job]:
    """All jobs, pair by pair, so that whatever is done first can be compared."""
    ids = [r.id for r in parts.train]
    plan = []
    for subset in range(subsets):
        for count in counts:
            train = few_labels(ids, count, subset)
            seed = recipe.seed + subset
            for start in starts:
                file, passport = (
                    start.encoders[subset % len(start.encoders)] if start.encoders else (None, None)
                )
                sha = passport.sha256 if passport else None
                plan.append(Job(start.arm, file, sha, count, subset, seed, train, subset, start.lr))
    return plan


def run_all(study: Study, todo: Sequence[Job], jobs: int, console: Console) -> None:
    """Run the jobs: one after the other here, or several at once in processes of their own."""
    if jobs == 1:
        for number, job in enumerate(todo, start=1):
            console.rule(f"job {number} of {len(todo)}: {job.key}", align="left")
            run_job(study, job)
        return
    context = multiprocessing.get_context("spawn")
    with (
        step_progress("jobs", len(todo)) as bar,
        ProcessPoolExecutor(jobs, context, max_tasks_per_child=1) as pool,
    ):
        running: dict[Future[None], Job] = {
            pool.submit(run_job_apart, study, job): job for job in todo
        }
        try:
            for future in as_completed(running):
                job = running[future]
                future.result()
                bar.advance(job.key)
        except BrokenProcessPool:
            raise EnvironmentProblem(
                f"a job was killed, most likely for lack of memory: use fewer than --jobs {jobs}; "
                f"see log.txt in {study.out / 'jobs'}; the same command goes on"
            ) from None
        except KeyboardInterrupt:
            raise Interrupted("stopped; the same command goes on") from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def parse_shard(text: str | None) -> tuple[int, int] | None:
    """The share of a job array, "i/n" with i from 1.

    Raises:
        ConfigError: not of that form.
    """
    if text is None:
        return None
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise ConfigError(f"--shard {text} must read i/n with i from 1 to n, e.g. 2/8")
    return int(found[1]), int(found[2])
