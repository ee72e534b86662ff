"""`spark3d predict`: a model and raw volumes in, label maps on each file's own grid out."""

import logging
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.progress import Progress

from spark3d.build import LoadedSegmenter, load_segmenter
from spark3d.commands.predict_cases import cases_of, check_format, held_out_cases
from spark3d.commands.predict_ledger import Ledger
from spark3d.data.case import PrepareSpec, prepare_case
from spark3d.data.dicom_seg import write_dicom_seg
from spark3d.data.geometry import resample_onto
from spark3d.data.io import write_label
from spark3d.data.nifti_header import Geometry
from spark3d.data.source_files import stamps
from spark3d.data.sources import CaseSource
from spark3d.engine.loop import stop_on_signal
from spark3d.engine.precision import warn_of_slow_bfloat16
from spark3d.engine.progress import PROGRESS_COLUMNS
from spark3d.errors import ConfigError, DataError, EnvironmentProblem, Interrupted
from spark3d.evaluation.flips import mirrored_pairs
from spark3d.evaluation.regrid import labels_onto
from spark3d.evaluation.windows import OnWindow, WindowPlan, predict_labels, predict_logits

log = logging.getLogger(__name__)

Format = Literal["nifti", "dicom-seg"]
Modality = Literal["auto", "CT", "MR"]


@dataclass(frozen=True)
class PredictSettings:
    """What changes the label maps, beside model and volumes; recorded and held on a restart.

    Args:
        overlap: of neighbouring windows, in [0, 1).
        flips: axes (0 is left-right) to mirror, alone and together, in extra passes.
        skip_empty: leave out windows without a voxel above the lower end of the intensity window.
            No training crop is like them, and an instance norm makes anything of nothing.
        amp: autocast to bfloat16.
        max_class_map_gib: above it probabilities are not kept, and labels are moved to the source
            grid instead.
        geometry: which part of a contradictory header to trust, "agree" for none.
        nan_fill: value for NaN voxels; None refuses them.
        format: of the label maps.
        modality: "CT", "MR", or "auto" to tell it from the values, as `spark3d prepare` does.
    """

    overlap: float = 0.5
    flips: tuple[int, ...] = ()
    skip_empty: bool = False
    amp: bool = False
    max_class_map_gib: float = 4.0
    geometry: Geometry = "agree"
    nan_fill: float | None = None
    format: Format = "nifti"
    modality: Modality = "auto"


def predict_command(
    model: Path,
    data: Path,
    out: Path,
    overlap: float | None = None,
    flips: Sequence[int] = (),
    skip_empty: bool | None = None,
    batch: int = 1,
    device: str = "auto",
    amp: bool = False,
    section: str | None = None,
    geometry: Geometry = "agree",
    nan_fill: float | None = None,
    max_class_map_gib: float = 4.0,
    only: Collection[str] | None = None,
    console: Console | None = None,
    format: Format = "nifti",
    held_out: bool = False,
    modality: Modality | None = None,
) -> Path:
    """Segment volumes; finished label maps of an earlier call with the same model are left alone.

    Args:
        model: run folder of a fine-tuning, or its `model.safetensors`.
        data: folder of volumes in any known layout, or one file.
        out: gets `<case>.nii.gz`, or `<case>.dcm`, and `predict.json`.
        overlap: of neighbouring windows; that of the model's recipe if not given.
        skip_empty: as in `PredictSettings`; if not given, where the model can tell air.
        batch: windows per forward pass.
        device: "auto" (the GPU if there is one), "cpu", "cuda", "cuda:1", ...
        section: only the cases of one section of a dataset, such as "validation".
        only: only the cases of these ids, all of which must be there.
        console: where progress is drawn; stderr by default.
        held_out: only the cases that the model's run held out, see `held_out_cases`.
        modality: as in `PredictSettings`; that of the training volumes if not given.

    The other arguments are those of `PredictSettings`.

    Raises:
        ConfigError: settings that make no sense, or `out` holds something else.
        DataError: no volume, or volumes that could not be segmented (after all others were).
        EnvironmentProblem: no such device, no right to write.
        Interrupted: stopped by a signal, between two windows.
    """
    console = console or Console(stderr=True)
    segmenter = load_segmenter(model)
    if overlap is None:
        overlap = float(segmenter.card.recipe.get("window_overlap", 0.5))
    if skip_empty is None:
        skip_empty = segmenter.window.has_air
    if modality is None:
        modality = segmenter.card.modality
    settings = PredictSettings(
        overlap, tuple(flips), skip_empty, amp, max_class_map_gib, geometry, nan_fill, format,
        modality,
    )  # fmt: skip
    plan = window_plan(segmenter, settings, batch)
    place = chosen_device(device)
    warn_of_slow_bfloat16(place, amp, "leave out --amp")
    segmenter.network.to(place)
    kept = held_out_cases(model) if held_out else None
    cases = cases_of(data, section, only if kept is None else kept)
    check_format(cases, format)
    ledger = Ledger.open(out, segmenter, asdict(settings), kept)
    todo = [case for case in cases if not ledger.is_done(case)]
    if len(todo) < len(cases):
        console.print(f"{len(cases) - len(todo)} of {len(cases)} cases are there already")

    failed: dict[str, str] = {}
    with stop_on_signal() as asked, Progress(*PROGRESS_COLUMNS, console=console) as bar:
        whole = bar.add_task("cases", total=len(cases), completed=len(cases) - len(todo))

        def on_window(done: int, of: int) -> None:
            bar.update(part, completed=done, total=of)
            if asked:
                raise Interrupted(
                    f"stopped with {len(ledger.record['cases'])} of {len(cases)} cases done; the "
                    "same command goes on from there"
                )

        for case in todo:
            part = bar.add_task(case.id, total=None)
            begun = time.perf_counter()
            try:
                image = replace(case, label=None)
                read = stamps(image)
                content, how = segment(
                    segmenter, case, ledger.file(case.id), plan, settings, on_window
                )
                ledger.add(image, read, content, how, time.perf_counter() - begun)
            except DataError as error:
                ledger.discard(case.id)
                failed[case.id] = str(error)
                log.warning("left out %s", error)
            bar.remove_task(part)
            bar.advance(whole)
    if failed:
        raise DataError(
            f"{len(failed)} of {len(cases)} volumes could not be segmented: "
            + "; ".join(failed.values())
        )
    return out


def segment(
    segmenter: LoadedSegmenter,
    case: CaseSource,
    file: Path,
    plan: WindowPlan,
    settings: PredictSettings,
    on_window: OnWindow | None = None,
) -> tuple[str, str]:
    """Segment one case and write its label map to `file`.

    The volume is prepared just as a store is: oriented, resampled, cut to the body.

    Returns:
        Hash of its voxels, and what was moved to the source grid.
    """
    spec = PrepareSpec(
        spacing_mm=_three(segmenter.spacing_mm),
        modality=settings.modality,
        geometry=settings.geometry,
        nan_fill=settings.nan_fill,
        fourth_axis=segmenter.card.backbone["in_channels"] > 1,
    )
    prepared = prepare_case(replace(case, label=None), spec)
    record = prepared.record
    if record.channels != segmenter.card.backbone["in_channels"]:
        raise DataError(
            f"{case.id} has {record.channels} channels, the model reads "
            f"{segmenter.card.backbone['in_channels']}; choose the volumes it was trained for"
        )
    intensities = record.physical(prepared.voxels)
    volume = torch.from_numpy(segmenter.window.apply(intensities, record.mean, record.std))
    if any(n < w for n, w in zip(record.size, plan.window, strict=False)):
        log.warning(
            "%s: %s voxels of %s mm are fewer than the window %s along an axis; padded with the "
            "darkest value",
            case.id, "x".join(map(str, record.size)),
            "x".join(f"{s:g}" for s in segmenter.spacing_mm), "x".join(map(str, plan.window)),
        )  # fmt: skip
    around = segmenter.window.outside(record.minimum, record.mean, record.std)
    plan = replace(plan, pad_value=around)
    size, affine = record.source.ras()
    gib = 4 * segmenter.card.out_channels * volume[0].numel() / 2**30
    if gib <= settings.max_class_map_gib:
        logits = predict_logits(segmenter.network, volume, plan, on_window)
        probabilities = torch.softmax(logits, 0, out=logits).numpy()
        labels = labels_onto(probabilities, record.affine, size, affine)
        how = "probabilities"
    else:
        small = predict_labels(segmenter.network, volume, plan, on_window).numpy()
        moved = resample_onto(small, record.affine, size, affine, label=True)
        labels = moved.astype(small.dtype, copy=False)
        how = "labels"
    if settings.format == "nifti":
        write_label(file, labels, record.source)
    else:
        model = segmenter.card.sha256
        write_dicom_seg(file, labels, record.source, case.slices, segmenter.labels, model)
    return record.content_hash, how


def window_plan(segmenter: LoadedSegmenter, settings: PredictSettings, batch: int) -> WindowPlan:
    """Windows as large as the crops of training, mirrored passes with left and right exchanged.

    Raises:
        ConfigError: flips that the labels give no meaning to, or the network no axis.
    """
    axes = sorted(set(settings.flips))
    sets = tuple(s for n in range(1, len(axes) + 1) for s in combinations(axes, n))
    swaps = segmenter.card.swap or (mirrored_pairs(segmenter.labels) if 0 in axes else ())
    if 0 in axes:
        tell_swaps(segmenter.labels, swaps)
    if settings.skip_empty and not segmenter.window.has_air:
        raise ConfigError(
            "skip_empty needs a model with a unit window, where air is 0; this one has mode "
            f"{segmenter.window.mode}"
        )
    return WindowPlan(
        tuple(segmenter.crop),
        settings.overlap,
        batch,
        sets,
        swaps,
        empty_below=0.0 if settings.skip_empty else None,
        amp_dtype=torch.bfloat16 if settings.amp else None,
    )


def tell_swaps(labels: Mapping[int, str], swaps: Sequence[tuple[int, int]]) -> None:
    """Which labels change places in passes mirrored from left to right, or that none does."""
    if swaps:
        told = ", ".join(f"{labels[a]} and {labels[b]}" for a, b in swaps)
        log.info("passes mirrored from left to right exchange %s", told)
    else:
        log.warning(
            "passes mirrored from left to right exchange no labels, as no name tells a side: leave "
            "axis 0 out of --flips if labels come in pairs (data.augment.swap of training names "
            "them)"
        )


def chosen_device(name: str) -> torch.device:
    """The device of a name; "auto" is the GPU where there is one.

    Raises:
        EnvironmentProblem: the machine has no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise EnvironmentProblem(f"no device {name!r} here ({reason}); use --device cpu") from None
    return device


def _three(spacing_mm: Sequence[float]) -> tuple[float, float, float]:
    x, y, z = spacing_mm
    return x, y, z
