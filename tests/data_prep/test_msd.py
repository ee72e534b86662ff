"""Decathlon tasks as they are published, in miniature: tar, `._*` files, misspelt key, 4D files."""

import json
from pathlib import Path

import numpy as np
import pytest
from monai.apps.datasets import DecathlonDataset
from nifti_files import both, ct_like, put, write_nifti
from rich.console import Console
from scripts import add_to_tar, script, tarred

from data_prep.msd import TRAINING, main, monai_split, nnunet_folds
from spark3d.commands.prepare import prepare_command
from spark3d.data.folders import place
from spark3d.data.io import read_volume
from spark3d.data.splits import named_split
from spark3d.data.store import Store

CONFIG, DATA = 2, 3
SIZE = (12, 10, 8)
KINDS = {
    "Task01_BrainTumour": (["FLAIR", "T1w", "t1gd", "T2w"], "BRATS_{:03d}", "release"),
    "Task04_Hippocampus": (["MRI"], "hippocampus_{:03d}", "relase"),
    "Task05_Prostate": (["T2", "ADC"], "prostate_{:02d}", "release"),
    "Task09_Spleen": (["CT"], "spleen_{}", "release"),
}


def label_like(kind: type = np.uint8) -> np.ndarray:
    """A block of class 1 beside a block of class 2."""
    label = np.zeros(SIZE, kind)
    label[3:6, 3:6, 2:5] = 1
    label[6:8, 3:6, 2:5] = 2
    return label


def task(folder: Path, name: str, training: int = 6, test: int = 2) -> Path:
    """A task with the names and quirks of the published one."""
    modalities, pattern, key = KINDS[name]
    root = folder / name
    for n in range(1, training + test + 1):
        part = "Tr" if n <= training else "Ts"
        volumes = [ct_like(SIZE, seed=10 * n + k) for k in range(len(modalities))]
        voxels = np.stack(volumes, -1) if len(volumes) > 1 else volumes[0]
        write_nifti(root / f"images{part}" / f"{pattern.format(n)}.nii.gz", voxels)
        if part == "Tr":
            kind = np.float32 if n % 2 else np.uint8  # mixed, as published
            write_nifti(root / "labelsTr" / f"{pattern.format(n)}.nii.gz", label_like(kind))
    order = [*range(training, 1, -1), 1]  # not sorted, as published
    names = [f"{pattern.format(n)}.nii.gz" for n in order]
    description = {
        "name": name.split("_")[1], "description": "a miniature", "reference": "nobody",
        "licence": "CC-BY-SA 4.0", key: "1.0 04/05/2018", "tensorImageSize": "3D",
        "modality": {str(k): m for k, m in enumerate(modalities)},
        "labels": {"0": "background", "1": "one", "2": "two"},
        "numTraining": training, "numTest": test,
        "training": [{"image": f"./imagesTr/{n}", "label": f"./labelsTr/{n}"} for n in names],
        "test": [f"./imagesTs/{pattern.format(n)}.nii.gz"
                 for n in range(training + 1, training + test + 1)],
    }  # fmt: skip
    (root / "dataset.json").write_text(json.dumps(description))
    return root


def prepared(data: Path, out: Path) -> Store:
    prepare_command(data, out, workers=0, console=Console(quiet=True))
    return Store.open(out)


@pytest.mark.parametrize("name", list(KINDS))
def test_a_tar_becomes_a_store(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    archive = tarred(task(tmp_path / "made", name), tmp_path / f"{name}.tar")
    said = script(main, capsys, archive, "--out", tmp_path / "data")
    assert "unpacked 15 files" in said
    assert "15 files of macOS left out" in said
    assert f"{name}: 6 training and 2 other cases" in said
    assert "release 1.0 04/05/2018" in said
    assert f"6 of the {TRAINING[name.split('_')[1]]} training cases" in said
    assert not list((tmp_path / "data").rglob("._*"))
    channels = len(KINDS[name][0])
    assert ("4D" in said) == (channels > 1)
    if name in ("Task05_Prostate", "Task09_Spleen"):
        store = prepared(tmp_path / "data" / name, tmp_path / "store")
        assert {r.channels for r in store.cases} == {channels}
        assert sum(r.section == "test" for r in store.cases) == 2
        assert {r.labels for r in store.cases if r.has_label} == {(1, 2)}


def test_one_channel_of_a_4d_task(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = task(tmp_path, "Task05_Prostate", 2, 1)
    out = tmp_path / "adc"
    said = script(main, capsys, root, "--channel", "adc", "--out", out)
    assert "wrote 3 volumes of ADC" in said
    written = read_volume(out / "imagesTr" / "prostate_01.nii.gz")
    whole = read_volume(root / "imagesTr" / "prostate_01.nii.gz", channels=True)
    np.testing.assert_array_equal(written.array[0], whole.array[1])
    np.testing.assert_array_equal(written.affine, whole.affine)
    assert (out / "labelsTr" / "prostate_01.nii.gz").is_symlink()
    store = prepared(out, tmp_path / "store")
    assert {r.channels for r in store.cases} == {1}


def test_slope_and_intercept_of_a_4d_file_are_applied(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = task(tmp_path, "Task05_Prostate", 1, 1)
    image = root / "imagesTr" / "prostate_01.nii.gz"
    voxels = np.stack([ct_like(SIZE), ct_like(SIZE, 1)], -1)
    write_nifti(image, voxels, edit=both(put("f", (112, 0.5)), put("f", (116, 3.0))))
    script(main, capsys, root, "--channel", "1", "--out", tmp_path / "out")
    written = read_volume(tmp_path / "out" / "imagesTr" / "prostate_01.nii.gz").array[0]
    np.testing.assert_allclose(written, read_volume(image, channels=True).array[1])


def test_a_folder_of_tasks_and_their_splits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("Task04_Hippocampus", "Task09_Spleen"):
        task(tmp_path / "data", name, training=11)
    said = script(main, capsys, tmp_path / "data", "--splits", tmp_path / "splits")
    assert said.count("next: spark3d prepare") == 2
    file = tmp_path / "splits" / "Task09_Spleen-monai-80-20.json"
    assert f"split.name={file}" in said
    split = named_split(str(file))
    assert (len(split.train), len(split.validation), len(split.test)) == (9, 2, 2)
    held = [
        named_split(str(tmp_path / "splits" / "Task09_Spleen-nnunet-folds.json"), k).validation
        for k in range(5)
    ]
    assert sorted(map(len, held)) == [2, 2, 2, 2, 3]
    assert sorted(i for part in held for i in part) == sorted(f"spleen_{n}" for n in range(1, 12))


@pytest.mark.parametrize("layout", ["nnunet 1", "nnunet 2", "decathlon"])
def test_splits_of_other_data_sets_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], layout: str
) -> None:
    root = task(tmp_path, "Task09_Spleen", 2, 1)
    description = json.loads((root / "dataset.json").read_text())
    if layout == "decathlon":
        description["training"] = []
    else:
        for path in root.glob("images*/*"):
            path.rename(path.with_name(path.name.replace(".nii", "_0000.nii")))
        if layout == "nnunet 2":
            description["channel_names"] = description.pop("modality")
            del description["training"]
    (root / "dataset.json").write_text(json.dumps(description))
    said = script(main, capsys, root, "--splits", tmp_path / "splits", code=DATA)
    kept = 0 if layout == "decathlon" else 2
    assert f"E-NOT-MSD: {root}: found {kept} training cases ({layout.split()[0]} layout)" in said
    assert "data_prep.folds" in said
    assert not (tmp_path / "splits").exists()


@pytest.mark.parametrize("count", [5, 13, 41])
def test_the_split_is_that_of_monai(tmp_path: Path, count: int) -> None:
    """Held to MONAI itself, whose order is that of `dataset.json`."""
    root = tmp_path / "Task09_Spleen"
    for part in ("imagesTr", "labelsTr"):
        (root / part).mkdir(parents=True)
    ids = [f"spleen_{(7 * n) % count}" for n in range(count)]
    entries = [{"image": f"./imagesTr/{i}.nii.gz", "label": f"./labelsTr/{i}.nii.gz"} for i in ids]
    content = {
        "name": "Spleen", "description": "", "reference": "", "licence": "",
        "tensorImageSize": "3D", "modality": {"0": "CT"}, "labels": {"0": "background"},
        "numTraining": count, "numTest": 0, "training": entries, "test": [],
    }  # fmt: skip
    (root / "dataset.json").write_text(json.dumps(content))
    theirs = [
        [
            Path(item["image"]).name.removesuffix(".nii.gz")
            for item in DecathlonDataset(
                str(tmp_path), "Task09_Spleen", section, transform=lambda x: x, cache_num=0
            ).data
        ]
        for section in ("training", "validation")
    ]
    assert list(monai_split(ids)) == theirs


def test_folds_are_those_of_nnunet() -> None:
    """What KFold(5, shuffle=True, random_state=12345) of scikit-learn 1.9.1 gave for 13 ids."""
    numbers = [[0, 7, 9], [3, 6, 10], [8, 11, 12], [1, 4], [2, 5]]
    ids = [f"case_{n:02d}" for n in range(13)]
    assert nnunet_folds(ids[::-1]) == [[ids[n] for n in part] for part in numbers]


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["Task04_Hippocampus", "--channel", "MRI", "--out", "x"], CONFIG, "Hippocampus has MRI"),
        (["Task05_Prostate", "--channel", "T9", "--out", "x"], CONFIG, "has T2, ADC"),
        (["Task05_Prostate", "--channel", "T2"], CONFIG, "needs an unpacked task and --out"),
        (["t.tar"], CONFIG, "give --out"),
        (["empty"], DATA, "E-NOT-MSD"),
        (["nowhere"], DATA, "E-NOT-MSD"),
    ],
)
def test_mistakes(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    code: int,
    told: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("Task04_Hippocampus", "Task05_Prostate"):
        task(tmp_path, name, 1, 1)
    tarred(tmp_path / "Task05_Prostate", tmp_path / "t.tar")
    (tmp_path / "empty").mkdir()
    assert told in script(main, capsys, *words, code=code)
    assert not (tmp_path / "x").exists()


def test_a_truncated_volume_stops_the_writing_of_a_channel_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = task(tmp_path, "Task05_Prostate", 2, 1)
    bad = root / "imagesTr" / "prostate_02.nii.gz"
    bad.write_bytes(bad.read_bytes()[:-50])
    before = sorted(tmp_path.rglob("*"))
    said = script(main, capsys, root, "--channel", "T2", "--out", tmp_path / "out", code=DATA)
    assert "E-TRUNCATED" in said
    assert sorted(tmp_path.rglob("*")) == before


def test_missing_files_are_all_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = task(tmp_path, "Task09_Spleen", 3, 1)
    (root / "labelsTr" / "spleen_1.nii.gz").unlink()
    (root / "imagesTs" / "spleen_4.nii.gz").unlink()
    said = script(main, capsys, root, code=DATA)
    assert "spleen_1.nii.gz" in said
    assert "spleen_4.nii.gz" in said


@pytest.mark.parametrize(
    ("name", "link"), [("../evil", ""), ("/evil", ""), ("Task09_Spleen/imagesTr", "/etc")]
)
def test_a_hostile_tar_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, link: str
) -> None:
    archive = tarred(task(tmp_path, "Task09_Spleen", 1, 1), tmp_path / "t.tar")
    add_to_tar(archive, name, link)
    before = sorted(tmp_path.rglob("*"))
    said = script(main, capsys, archive, "--out", tmp_path / "in" / "out", code=DATA)
    assert "E-ARCHIVE-UNSAFE" in said
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("share", [0.3, 0.9])
@pytest.mark.parametrize("ending", [".tar", ".tar.gz"])
def test_a_truncated_tar_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], ending: str, share: float
) -> None:
    archive = tarred(task(tmp_path, "Task09_Spleen", 1, 1), tmp_path / f"t{ending}")
    content = archive.read_bytes().rstrip(b"\0")
    archive.write_bytes(content[: int(share * len(content))])
    before = sorted(tmp_path.rglob("*"))
    said = script(main, capsys, archive, "--out", tmp_path / "out", code=DATA)
    assert "E-ARCHIVE-DAMAGED" in said
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.realdata
def test_the_real_hippocampus_cases(
    real_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = real_data / "msd_hippocampus"
    said = script(main, capsys, root, "--splits", tmp_path / "splits")
    assert "195 training and 0 other cases" in said
    assert "release 1.0" in said
    assert "195 of the 260 training cases that were published" in said
    split = named_split(str(tmp_path / "splits" / "msd_hippocampus-monai-80-20.json"))
    assert (len(split.train), len(split.validation)) == (156, 39)


@pytest.mark.realdata
def test_real_hippocampus_cases_become_a_store(real_data: Path, tmp_path: Path) -> None:
    """Ten of them, whose labels are stored now as uint8, now as float32."""
    root = real_data / "msd_hippocampus"
    data = json.loads((root / "dataset.json").read_text())
    data["training"] = data["training"][:10]
    for entry in data["training"]:
        for name in entry.values():
            place(root / name, tmp_path / "task" / name)
    (tmp_path / "task" / "dataset.json").write_text(json.dumps(data))
    store = prepared(tmp_path / "task", tmp_path / "store")
    assert len(store) == 10
    assert {r.labels for r in store.cases} == {(1, 2)}
    assert {r.modality for r in store.cases} == {"MR"}
