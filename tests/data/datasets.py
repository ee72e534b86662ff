"""Miniature data sets on disk, in the layouts that people download."""

import json
from pathlib import Path

import numpy as np
from nifti_files import ct_like, write_nifti

SIZE = (20, 18, 12)


def label_like(size: tuple[int, ...] = SIZE) -> np.ndarray:
    """Two classes: a block inside the body, and a small one beside it."""
    label = np.zeros(size, np.uint8)
    label[5:10, 5:10, 3:8] = 1
    label[12:14, 6:9, 4:7] = 2
    return label


def decathlon(root: Path, labelled: int = 3, unlabelled: int = 2) -> Path:
    """A Decathlon task with the quirks of published ones, and one labelled validation case."""
    entries = []
    for n in range(labelled + 1):
        name = f"pt_{n}.nii.gz"
        write_nifti(root / "imagesTr" / name, ct_like(seed=n))
        write_nifti(root / "labelsTr" / name, label_like())
        entries.append({"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"})
    extra = []
    for n in range(unlabelled):
        name = f"un_{n}.nii.gz"
        write_nifti(root / "imagesUn" / name, ct_like(seed=100 + n))
        extra.append(f"./imagesUn/{name}")
    (root / "imagesTr" / "._pt_0.nii.gz").write_bytes(b"resource fork")
    description = {
        "name": "Mini", "relase": "1.0", "modality": {"0": "CT"},
        "labels": {"0": "background", "1": "liver", "2": "spleen"},
        "numTraining": 80, "numTest": 0,
        "training": [*entries[:-1], {"image": "./imagesTr/._pt_0.nii.gz", "label": "./x"}],
        "validation": entries[-1:], "unlabelled": extra, "test": [],
    }  # fmt: skip
    (root / "dataset.json").write_text(json.dumps(description))
    return root


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file of a folder by its relative path, but for locks."""
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and not p.name.startswith(".lock")
    }
