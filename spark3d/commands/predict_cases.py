"""Which volumes `spark3d predict` segments."""

from collections.abc import Collection, Sequence
from pathlib import Path

from spark3d.commands.runs import read_run_record
from spark3d.data.dicom_seg import check_dicom_seg
from spark3d.data.io import stem
from spark3d.data.names import shown
from spark3d.data.privacy import safe_cases
from spark3d.data.sources import CaseSource, find
from spark3d.errors import ConfigError, DataError


def held_out_cases(model: Path) -> tuple[str, ...]:
    """Ids of the cases that the run of a model held out, as far as they have labels.

    They are those of its test part, or, where the split has none, those of validation.

    Args:
        model: run folder of a fine-tuning, or its `model.safetensors`.

    Raises:
        ConfigError: no record of the run beside the model, or none that was held out.
    """
    run = model if model.is_dir() else model.parent
    if not (run / "run.json").is_file():
        raise ConfigError(
            f"--held-out needs the run's record, and {run} has no run.json; give the run folder "
            "for --model, or choose cases with --section"
        )
    inputs = read_run_record(run)["inputs"]
    ids = tuple(inputs.get("test") or inputs.get("validation", ()))
    if not ids:
        raise ConfigError(
            f"the run in {run} held no labelled case out; give volumes that it has not seen"
        )
    return ids


def cases_of(
    data: Path, section: str | None, only: Collection[str] | None = None
) -> list[CaseSource]:
    """The volumes to segment, under names that may stand in files.

    Args:
        data: folder of volumes in any known layout, or one file.
        section: only the cases of this section of a dataset.
        only: only the cases of these ids.

    Raises:
        DataError: none, or no volume of an id in `only`.
    """
    one = data.is_file()
    cases = [CaseSource(id=stem(data), image=data)] if one else list(find(data).cases)
    if section is not None:
        known = sorted({c.section for c in cases})
        cases = [c for c in cases if c.section == section]
        if not cases:
            raise DataError(f"{shown(data)} has no section {section!r}; it has {', '.join(known)}")
    safe = safe_cases(cases)[0]
    if only is None:
        return safe
    if absent := sorted(set(only) - {c.id for c in safe}):
        raise DataError(
            f"{shown(data)} has no volume of {len(absent)} cases to segment "
            f"({', '.join(absent[:5])}); give the folder that was prepared"
        )
    return [c for c in safe if c.id in only]


def check_format(cases: Sequence[CaseSource], format: str) -> None:
    """Refuse a format that the volumes cannot be written in, before any is segmented.

    Raises:
        ConfigError: DICOM-SEG for volumes that are no DICOM series.
        EnvironmentProblem: the package that writes it is not installed.
    """
    if format == "nifti":
        return
    check_dicom_seg()
    if others := [case.id for case in cases if not case.slices]:
        raise ConfigError(
            f"--format {format} is for DICOM series, which {len(others)} of {len(cases)} volumes "
            f"are not ({', '.join(others[:5])}): leave it out"
        )
