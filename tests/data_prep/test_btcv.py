"""The BTCV archive as Synapse gives it, in miniature: empty files under the real names."""

import zipfile
from pathlib import Path

import pytest
from scripts import script, zipped

from data_prep.btcv import main

CONFIG, DATA = 2, 3
NUMBERS = (*range(1, 11), *range(21, 41))


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """All 50 cases under the names of the archive, without content."""
    root = tmp_path / "RawData"
    for n in NUMBERS:
        for part in ("img", "label"):
            path = root / "Training" / part / f"{part}{n:04d}.nii.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"")
    (root / "Testing" / "img").mkdir(parents=True)
    for n in range(61, 81):
        (root / "Testing" / "img" / f"img{n:04d}.nii.gz").write_bytes(b"")
    (root / "Training" / ".DS_Store").write_bytes(b"x")
    return root


def test_the_archive(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "data" / "btcv"
    said = script(main, capsys, zipped(tree, tmp_path / "RawData.zip"), "--out", out)
    assert "unpacked 80 files" in said
    assert "left out" in said
    assert f"{out}: 30 labelled and 20 unlabelled cases" in said
    assert "can be used: btcv-80-20, btcv-monai-24-6, btcv-synapse-18-12" in said
    assert f"spark3d prepare --data {out}" in said
    assert sorted(p.name for p in out.rglob("*.gz")) == sorted(p.name for p in tree.rglob("*.gz"))
    assert not [*out.rglob("._*"), *out.rglob(".DS_Store"), *out.rglob("__MACOSX")]


@pytest.mark.parametrize("inner", [".", "RawData"])
def test_the_unpacked_tree_is_read_where_it_lies(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], inner: str
) -> None:
    before = sorted(tmp_path.rglob("*"))
    said = script(main, capsys, tmp_path / inner)
    assert "30 labelled and 20 unlabelled cases, in place" in said
    assert sorted(tmp_path.rglob("*")) == before


def test_all_missing_labels_are_told_at_once(
    tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for n in (3, 27):
        (tree / "Training" / "label" / f"label{n:04d}.nii.gz").unlink()
    said = script(main, capsys, tree, code=DATA)
    assert "E-MISSING-FILE" in said
    assert "label0003.nii.gz" in said
    assert "label0027.nii.gz" in said


def test_missing_cases_are_refused_unless_partial(
    tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for part in ("img", "label"):
        (tree / "Training" / part / f"{part}0001.nii.gz").unlink()
    said = script(main, capsys, tree, code=DATA)
    assert "E-BTCV-INCOMPLETE" in said
    assert "29 of 30 labelled cases, without img0001" in said
    said = script(main, capsys, tree, "--partial")
    assert "29 labelled" in said
    assert "splits that can be used: none" in said


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["RawData.zip"], CONFIG, "give --out"),
        (["RawData", "--out", "x"], CONFIG, "is read where it lies"),
        (["RawData", "--no-such"], CONFIG, "see python -m data_prep.btcv --help"),
        ([], CONFIG, "required: source"),
        (["nowhere"], DATA, "E-NO-FOLDER"),
        (["nowhere.zip", "--out", "x"], DATA, "E-NO-FOLDER"),
        (["other"], DATA, "E-NOT-BTCV"),
    ],
)
def test_mistakes(
    tree: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    code: int,
    told: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    zipped(tree, tmp_path / "RawData.zip")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.nii.gz").write_bytes(b"")
    assert told in script(main, capsys, *words, code=code)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("attack", ["../../evil.nii.gz", "/evil.nii.gz", "RawData/../../evil"])
def test_a_hostile_archive_writes_nothing(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], attack: str
) -> None:
    archive = zipped(tree, tmp_path / "RawData.zip")
    with zipfile.ZipFile(archive, "a") as box:
        box.writestr(attack, b"evil")
    before = sorted(tmp_path.rglob("*"))
    assert "E-ARCHIVE-UNSAFE" in script(
        main, capsys, archive, "--out", tmp_path / "a" / "b", code=DATA
    )
    assert sorted(tmp_path.rglob("*")) == before


def test_a_truncated_archive_leaves_nothing(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = zipped(tree, tmp_path / "RawData.zip")
    archive.write_bytes(archive.read_bytes()[:-100])
    before = sorted(tmp_path.rglob("*"))
    said = script(main, capsys, archive, "--out", tmp_path / "out", code=DATA)
    assert "E-ARCHIVE-DAMAGED" in said
    assert "download it again" in said
    assert sorted(tmp_path.rglob("*")) == before
