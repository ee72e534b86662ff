"""Names of patients, planted in headers, paths and ids, reach neither store nor account."""

import errno
import os
import secrets
import stat

import pytest
from datasets import snapshot
from nifti_files import write_nifti

from spark3d.data.prepare import PrepareSpec, prepare
from spark3d.data.privacy import keyed_id, safe_cases
from spark3d.data.sources import CaseSource, find_cases
from spark3d.data.store import Store
from spark3d.errors import ConfigError, EnvironmentProblem

CANARY = "DOE^Jane 1970"
SPEC = PrepareSpec(spacing_mm=(2, 2, 3))


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.delenv("SPARK3D_ID_KEY", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return tmp_path


def plant(raw):
    for offset in (4, 148, 228, 328):
        raw[offset : offset + len(CANARY)] = CANARY.encode()


def test_no_name_reaches_the_store(tmp_path):
    write_nifti(tmp_path / CANARY / "scan.nii.gz", edit=plant)
    bad = tmp_path / CANARY / "scan 2.nii.gz"
    bad.write_bytes(b"")
    report = prepare(find_cases(tmp_path / CANARY), tmp_path / "s", SPEC, max_bad=1)
    again = prepare(find_cases(tmp_path / CANARY), tmp_path / "s", SPEC, max_bad=1)
    assert again.skipped == ["scan"]
    assert [case.startswith("case-") for case in report.failed] == [True]

    nested = prepare(find_cases(tmp_path / CANARY / ".."), tmp_path / "t", SPEC, max_bad=1)
    assert nested.total == 2
    assert all(case.startswith("case-") for case in (*nested.kept, *nested.failed))
    files = {**snapshot(tmp_path / "s"), **snapshot(tmp_path / "t")}
    assert len(files) > 8
    for name, content in files.items():
        for part in ("DOE", "Jane", "scan 2"):
            assert part not in name
            assert part.encode() not in content
    assert Store.open(tmp_path / "t").cases[0].group.startswith("case-")


def test_hashed_ids_need_the_key(tmp_path, monkeypatch):
    case = CaseSource("Jane Doe", tmp_path / "a.nii")
    (one,), renamed = safe_cases([case])
    assert renamed == {"Jane Doe": one.id}
    assert safe_cases([case])[0][0].id == one.id, "the key must be kept"
    key = tmp_path / "config" / "spark3d" / "id.key"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    monkeypatch.setenv("SPARK3D_ID_KEY", "another")
    assert safe_cases([case])[0][0].id != one.id
    assert keyed_id("Jane Doe", b"x") != keyed_id("Jane Doe", b"y")


def test_ids_of_the_strict_pattern_are_kept_and_need_no_key(tmp_path):
    case = CaseSource("LIDC-IDRI-0001_a.1", tmp_path / "a.nii")
    assert safe_cases([case]) == ([case], {})
    assert not (tmp_path / "config").exists()


def id_of_a_patient(tmp_path):
    return safe_cases([CaseSource("Jane Doe", tmp_path / "a.nii")])[0][0].id


def test_two_processes_at_first_use_have_one_key(tmp_path, monkeypatch):
    """The second comes while the first is about to write."""
    make, others = secrets.token_hex, []

    def slow(n):
        monkeypatch.setattr(secrets, "token_hex", make)
        others.append(id_of_a_patient(tmp_path))
        return make(n)

    monkeypatch.setattr(secrets, "token_hex", slow)
    assert [id_of_a_patient(tmp_path)] == others
    assert others != [keyed_id("Jane Doe", b"")]
    assert [p.name for p in (tmp_path / "config" / "spark3d").iterdir()] == ["id.key"]


def test_a_kill_while_the_key_is_made_leaves_no_key(tmp_path, monkeypatch):
    def stopped(_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(secrets, "token_hex", stopped)
        with pytest.raises(KeyboardInterrupt):
            id_of_a_patient(tmp_path)
    assert not (tmp_path / "config" / "spark3d" / "id.key").exists()
    assert id_of_a_patient(tmp_path) != keyed_id("Jane Doe", b"")


@pytest.mark.parametrize("left", [b"", b"0" * 63])
def test_a_key_that_is_not_whole_is_refused(tmp_path, left):
    path = tmp_path / "config" / "spark3d" / "id.key"
    path.parent.mkdir(parents=True)
    path.write_bytes(left)
    with pytest.raises(EnvironmentProblem, match=rf"id\.key has {len(left)} of 64 .*remove"):
        id_of_a_patient(tmp_path)


@pytest.mark.parametrize("given", ["", " "])
def test_an_empty_key_of_the_environment_is_refused(tmp_path, monkeypatch, given):
    monkeypatch.setenv("SPARK3D_ID_KEY", given)
    with pytest.raises(ConfigError, match="SPARK3D_ID_KEY is empty"):
        id_of_a_patient(tmp_path)


def test_a_disk_without_hard_links_keeps_a_key_too(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    assert id_of_a_patient(tmp_path) == id_of_a_patient(tmp_path)
    (file,) = (tmp_path / "config" / "spark3d").iterdir()
    assert len(file.read_bytes()) == 64
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
