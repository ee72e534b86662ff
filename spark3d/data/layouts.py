"""The layouts in which people keep volumes: Decathlon, BTCV, nnU-Net, pairs, plain folders.

Only names and `dataset.json` are read here, no volume.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spark3d.data.checks import fault
from spark3d.data.dataset_json import (
    declared_labels,
    declared_modality,
    image_and_label,
    inside,
)
from spark3d.data.io import SUFFIXES, Source, stem
from spark3d.data.names import safe_name
from spark3d.data.series import NO_SLICES, sort_series

PREDICTED = "predict.json"
"""Stands beside the label maps that `spark3d predict` has written."""
BODIES = (".raw", ".zraw", ".raw.gz")
"""Voxels of detached headers, which name them."""
LABEL_WORD = r"labels?|segs?|segmentations?|masks?|annotations?|gt|ground[-_ ]?truth"
LABEL_FOLDER = re.compile(rf"({LABEL_WORD})(Tr|Ts|Va|Val|[-_].*)?|instances?", re.I)
"""KiTS has single organs in `instances`."""
LABEL_NAME = re.compile(rf"(^|[-_.])({LABEL_WORD}|dsegs?)([-_.]?\d+)?$", re.I)
"""KiTS' `segmentation` and `kidney_instance-1_annotation-1`, LiTS' `segmentation-0`, `label0001`,
`ct_mask`, the `_dseg` of BIDS, `patient001_frame01_gt` of ACDC, SegTHOR's `GT`."""
SECTIONS = {
    "training": "training",
    "validation": "validation",
    "test": "test",
    "unlabelled": "unlabelled",
    "unlabeled": "unlabelled",
}
BTCV_NAME = re.compile(r"img\d{4}")
BTCV_LABELS = {
    "background": 0,
    "spleen": 1,
    "right_kidney": 2,
    "left_kidney": 3,
    "gallbladder": 4,
    "oesophagus": 5,
    "liver": 6,
    "stomach": 7,
    "aorta": 8,
    "inferior_vena_cava": 9,
    "portal_and_splenic_veins": 10,
    "pancreas": 11,
    "right_adrenal_gland": 12,
    "left_adrenal_gland": 13,
}


@dataclass(frozen=True)
class CaseSource:
    """Where a case comes from.

    Attributes:
        id: name of the case, unique in its folder.
        image: its volume (the first channel where there are several files).
        label: its label map, if any.
        group: cases of one patient share it; the id unless told otherwise.
        section: training, validation, test or unlabelled.
        more_channels: further channels, one file each.
        slices: the files of a DICOM series; `image` is then the folder of the first.
        stated: the source tells the patient, which is `group`; else each case counts as its own.
        patient: keyed hash of a stated patient, which `data/privacy.py` fills in.
    """

    id: str
    image: Path
    label: Path | None = None
    group: str = ""
    section: str = "unlabelled"
    more_channels: tuple[Path, ...] = ()
    slices: tuple[Path, ...] = ()
    stated: bool = False
    patient: str = ""

    def __post_init__(self) -> None:
        if not self.group:
            object.__setattr__(self, "group", self.id)

    @property
    def has_patient(self) -> bool:
        """Whether the patient is known, so that other cases may be told to be of the same one."""
        return self.stated or self.group != self.id

    @property
    def images(self) -> tuple[Path, ...]:
        """All files with intensities, in channel order."""
        return (self.image, *self.more_channels)

    @property
    def sources(self) -> tuple[Source, ...]:
        """What the readers take, per channel."""
        return (self.slices,) if self.slices else self.images


@dataclass(frozen=True)
class FoundCases:
    """What a folder holds.

    Attributes:
        layout: "decathlon", "nnunet", "btcv", "pairs", "plain" or "list".
        cases: in the order of their ids.
        modality: "CT", "MR" or "auto" where the folder does not say.
        labels: name -> value as declared, empty if nothing is.
        fourth_axis: 4D files hold channels (Decathlon tasks with several modalities).
        passed_over: files of a plain folder that are label maps by their name.
        notices: what else was passed over, in lines without names.
        renamed: how many ids were replaced by a keyed hash.
    """

    layout: str
    cases: tuple[CaseSource, ...]
    modality: str = "auto"
    labels: dict[str, int] | None = None
    fourth_axis: bool = False
    passed_over: tuple[Path, ...] = ()
    notices: tuple[str, ...] = ()
    renamed: int = 0


def decathlon(root: Path, data: dict[str, Any]) -> FoundCases:
    """A Medical Segmentation Decathlon task, described by its `dataset.json`.

    `numTraining` and `numTest` are ignored: they are wrong in published files.
    """
    cases = []
    for key, section in SECTIONS.items():
        for entry in data.get(key) or []:
            image, label = (entry, None) if isinstance(entry, str) else image_and_label(entry, root)
            if Path(image).name.startswith("._"):
                continue
            path = inside(root, image)
            cases.append(
                CaseSource(
                    id=stem(path),
                    image=path,
                    label=None if label is None else inside(root, label),
                    section=section,
                )
            )
    modality = data.get("modality") or {}
    return FoundCases(
        "decathlon",
        tuple(cases),
        declared_modality(modality.values()) if isinstance(modality, dict) else "auto",
        declared_labels(data.get("labels"), root),
        fourth_axis=len(modality) > 1,
    )


def is_nnunet(root: Path, data: dict[str, Any]) -> bool:
    """Whether a `dataset.json` is nnU-Net's: version 2 by its keys, version 1 by its files.

    Version 1 has the keys of the Decathlon and lists `case.nii.gz` for `case_0000.nii.gz`.
    """
    if "channel_names" in data:
        return True
    first = next((e for e in data.get("training") or [] if isinstance(e, dict)), {})
    listed = root / str(first.get("image", ""))
    return not listed.exists() and _existing(listed.parent, f"{stem(listed)}_0000") is not None


def nnunet(root: Path, data: dict[str, Any]) -> FoundCases:
    """A raw nnU-Net dataset: `imagesTr`, `labelsTr`, `imagesTs`, one file per channel.

    Raises:
        DataError: cases without one of the declared channels (all are named), an ignore label.
    """
    names = data.get("channel_names", data.get("modality"))
    names = names if isinstance(names, dict) else {}
    cases: list[CaseSource] = []
    for part, labels, section in (
        ("imagesTr", "labelsTr", "training"),
        ("imagesTs", "labelsTs", "test"),
    ):
        found = _channels(root / part)
        _check_channels(root, found, len(names))
        for case_id, files in found.items():
            label = _existing(root / labels, case_id)
            if label is None and section == "training" and (root / labels).is_dir():
                label = root / labels / f"{case_id}.nii.gz"  # reported with all that are absent
            cases.append(
                CaseSource(case_id, files[0], label, "", section if label or section == "test" else
                           "unlabelled", tuple(files[1:]))
            )  # fmt: skip
    declared = declared_labels(data.get("labels"), root)
    if "ignore" in (declared or {}):
        raise fault(
            "E-LABEL-IGNORE", root / "dataset.json", "a label called 'ignore'", "classes to learn",
            "training on partly labelled volumes is not supported; leave these cases out",
        )  # fmt: skip
    return FoundCases("nnunet", tuple(cases), declared_modality(names.values()), declared)


def _channels(folder: Path) -> dict[str, list[Path]]:
    """Case id -> its files in channel order; `CASE_0001.nii.gz` is channel 1."""
    volumes = _volumes(folder)
    numbered = all(re.search(r"_\d{4}$", stem(path)) for path in volumes)
    found: dict[str, list[Path]] = {}
    for path in volumes:
        name = stem(path)
        found.setdefault(name[:-5] if numbered else name, []).append(path)
    return found


def _check_channels(root: Path, found: dict[str, list[Path]], declared: int) -> None:
    """Refuse cases without the channels 0000 to the last declared one, or with others."""
    count = declared or max(map(len, found.values()), default=0)
    wanted = [f"{k:04d}" for k in range(count)]
    wrong = [
        case_id
        for case_id, files in found.items()
        if [stem(path)[-4:] for path in files] != wanted and (count > 1 or len(files) > 1)
    ]
    if wrong:
        names = ", ".join(safe_name(case_id, "*") for case_id in wrong[:8])
        raise fault(
            "E-CHANNELS", root, f"cases without exactly the channels {', '.join(wanted)}: "
            f"{names}{f' and {len(wrong) - 8} more' if wrong[8:] else ''}",
            f"{count} files per case", "complete these cases, or correct channel_names",
        )  # fmt: skip


def _existing(folder: Path, case_id: str) -> Path | None:
    paths = (folder / f"{case_id}{suffix}" for suffix in SUFFIXES)
    return next((path for path in paths if path.exists()), None)


def img_and_label(parts: Mapping[Path, str]) -> FoundCases:
    """Folders with `img` and perhaps `label`: BTCV if all images are called as in its archive.

    Of others nothing is known but the pairs: neither modality nor labels.

    Args:
        parts: folder -> section of its cases.
    """
    cases = tuple(case for folder, section in parts.items() for case in _pairs(folder, section))
    if all(BTCV_NAME.fullmatch(case.id) for case in cases):
        return FoundCases("btcv", cases, "CT", BTCV_LABELS)
    return FoundCases("pairs", cases)


def _pairs(folder: Path, section: str) -> list[CaseSource]:
    """`img/img0001.nii.gz` with `label/label0001.nii.gz`, `img/a.nii` with `label/a.nii`."""
    cases = []
    labels = folder / "label"
    for path in _volumes(folder / "img"):
        label = None
        if labels.is_dir():
            expected = labels / path.name.replace("img", "label", 1)
            label = _existing(labels, stem(expected)) or _existing(labels, stem(path))
            label = label or expected  # reported with all that are absent
        cases.append(CaseSource(stem(path), path, label, section=section))
    return cases


def plain(root: Path, progress: Callable[[int, int], None] | None = None) -> FoundCases:
    """Any folder, searched recursively: volume files, and DICOM series, whose headers are read.

    Files named as label maps, and those that `spark3d predict` has written, are listed as passed
    over.
    """
    cases, passed_over = [], []
    files = _files(root, deep=True)
    predicted = {path.parent for path in files if path.name == PREDICTED}
    for path in (path for path in files if path.name.endswith(SUFFIXES)):
        inner = path.relative_to(root)
        in_folder = any(LABEL_FOLDER.fullmatch(part) for part in inner.parts[:-1])
        if in_folder or path.parent in predicted or LABEL_NAME.search(stem(path)):
            passed_over.append(path)
        else:
            cases.append(CaseSource("__".join((*inner.parts[:-1], stem(path))), path))
    rest = [path for path in files if not path.name.endswith((*SUFFIXES, *BODIES))]
    done = iter(range(1, len(rest) + 1))
    step = (lambda: progress(next(done), len(rest))) if progress else None
    series, counts, others = sort_series(rest, step)
    for one in series:
        folder = one.files[0].parent
        known = bool(one.patient)
        cases.append(CaseSource(one.key, folder, group=one.patient, slices=one.files, stated=known))
    notices = [f"passed over {count} {what}" for what, count in sorted(counts.items())]
    if others:
        notices.append(f"passed over {len(others)} files that are no volumes ({_kinds(others)})")
    return FoundCases("plain", tuple(cases), passed_over=tuple(passed_over), notices=tuple(notices))


def _kinds(files: list[Path]) -> str:
    """How many of which suffix; a suffix that is not well known may be part of a name."""
    suffixes = (path.suffix.lower() for path in files)
    counts = Counter(suffix if suffix in NO_SLICES else "other" for suffix in suffixes)
    return ", ".join(f"{count} {suffix}" for suffix, count in counts.most_common())


def _volumes(folder: Path) -> list[Path]:
    """Volume files that lie in a folder."""
    return [path for path in _files(folder) if path.name.endswith(SUFFIXES)]


def _files(folder: Path, deep: bool = False) -> list[Path]:
    """Files of a folder, without hidden ones (such as `._*` in archives from macOS).

    Raises:
        OSError: a folder that may not be read.
    """
    if not folder.is_dir():
        return []
    found = _walk(folder, set()) if deep else folder.iterdir()
    return sorted(path for path in found if not path.name.startswith(".") and not path.is_dir())


def _walk(folder: Path, seen: set[Path]) -> Iterator[Path]:
    """All files under a folder; linked folders too, each real one once, so that circles end."""
    seen.add(folder.resolve())
    for path in sorted(folder.iterdir()):
        if not path.is_dir():
            yield path
        elif not path.name.startswith(".") and path.resolve() not in seen:
            yield from _walk(path, seen)
