"""`spark3d prepare` as a function: what it makes, says and refuses."""

import io
import json

import numpy as np
import pytest
from rich.console import Console

from spark3d.commands.prepare import parse_shard, parse_spacing, prepare_command
from spark3d.data.io import write_volume
from spark3d.data.store import Store
from spark3d.errors import ConfigError, DataError


@pytest.fixture
def task(tmp_path):
    rng = np.random.default_rng(0)
    entries = []
    for n in range(3):
        array = np.full((18, 16, 14), -1000, np.int16)
        array[3:-3, 3:-3, 3:-3] = rng.normal(40, 20, (12, 10, 8))
        label = np.zeros(array.shape, np.uint8)
        label[6:10, 6:10, 6:9] = 1
        for part, voxels in (("imagesTr", array), ("labelsTr", label)):
            (tmp_path / "d" / part).mkdir(parents=True, exist_ok=True)
            write_volume(tmp_path / "d" / part / f"c{n}.nii.gz", voxels, np.diag([2, 2, 3.0, 1]))
        entries.append({"image": f"imagesTr/c{n}.nii.gz", "label": f"labelsTr/c{n}.nii.gz"})
    description = {"labels": {"0": "background", "1": "liver"}, "training": entries}
    (tmp_path / "d" / "dataset.json").write_text(json.dumps(description))
    return tmp_path / "d"


def run(*args, **options):
    text = io.StringIO()
    report = prepare_command(*args, workers=0, console=Console(file=text, width=120), **options)
    return report, text.getvalue()


def test_it_prepares_and_says_what_it_did(task, tmp_path):
    report, text = run(task, tmp_path / "s")
    assert report.total == 3
    for said in (
        "3 cases (decathlon layout",
        "3 written + 0 already there + 0 left out",
        "2 x 2 x 3",
    ):
        assert said in text
    assert Store.open(tmp_path / "s").label_names == {1: "liver"}
    _, again = run(task, tmp_path / "s")
    assert "0 written + 3 already there" in again


def test_shares_and_their_end(task, tmp_path):
    for part in ("1/2", "2/2"):
        run(task, tmp_path / "s", shard=part)
    _, text = run(task, tmp_path / "s", end_shards=True)
    assert "3 cases" in text
    assert len(Store.open(tmp_path / "s")) == 3


def test_bad_cases_of_all_shares_count_at_their_end(task, tmp_path):
    for n in (0, 1):
        (task / "imagesTr" / f"c{n}.nii.gz").write_bytes(b"<html>")
    for part in ("1/2", "2/2"):
        run(task, tmp_path / "s", shard=part, max_bad=2, spacing="2")
    for max_bad in (None, 1):
        with pytest.raises(DataError, match=r"E-TOO-MANY-BAD.*`spark3d prepare --end-shards --max"):
            run(task, tmp_path / "s", end_shards=True, max_bad=max_bad)
    _, text = run(task, tmp_path / "s", end_shards=True, max_bad=2)
    assert "1 cases" in text


def test_unusable_cases_are_listed(task, tmp_path):
    (task / "imagesTr" / "c1.nii.gz").write_bytes(b"<html>")
    with pytest.raises(DataError, match="E-TOO-MANY-BAD"):
        run(task, tmp_path / "s")
    _, text = run(task, tmp_path / "s", max_bad=1)
    assert "2 already there + 1 left out" in text
    assert "left out: E-NOT-GZIP" in text.replace("\n", " ")


@pytest.mark.parametrize(
    ("text", "value"),
    [("auto", None), ("1.5", (1.5,) * 3), ("1,2,3", (1, 2, 3)), ("4x4x3", (4, 4, 3))],
)
def test_spacings_are_read(text, value):
    assert parse_spacing(text) == value


@pytest.mark.parametrize("text", ["", "a", "1,2", "0", "-1", "nan", "1,2,3,4", "1000"])
def test_other_spacings_are_refused(text):
    with pytest.raises(ConfigError, match="--spacing"):
        parse_spacing(text)


@pytest.mark.parametrize("text", ["0/2", "3/2", "a/2", "1", "1/", "-1/2"])
def test_other_shares_are_refused(text):
    assert parse_shard("2/8") == (1, 8)
    with pytest.raises(ConfigError, match="--shard"):
        parse_shard(text)


@pytest.mark.parametrize(("key", "value"), [("modality", "PET"), ("chunk", 48)])
def test_other_values_are_refused(task, tmp_path, key, value):
    with pytest.raises(ConfigError, match=f"--{key}"):
        run(task, tmp_path / "s", **{key: value})
    assert not (tmp_path / "s").exists()
