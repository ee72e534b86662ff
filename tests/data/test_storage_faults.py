"""Faults of disks, folders and rights: nothing is lost, nothing goes unsaid, and the exit code."""

import ctypes
import errno
import fcntl
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from datasets import decathlon, snapshot
from nifti_files import ct_like, write_nifti

from spark3d.commands.doctor import doctor_command
from spark3d.commands.prepare import prepare_command
from spark3d.data import files, pool
from spark3d.data import prepare as preparing
from spark3d.data.case_list import write_case_list
from spark3d.data.prepare import PrepareSpec, finalize, prepare
from spark3d.data.record import read_head
from spark3d.data.sources import find, find_cases
from spark3d.data.store import Store, StoreWriter, case_path
from spark3d.errors import ConfigError, DataError, EnvironmentProblem

SPEC = PrepareSpec(spacing_mm=(2.5, 2.0, 3.0))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    for n in range(3):
        write_nifti(tmp_path / "data" / f"c{n}.nii.gz", ct_like(seed=n))
    return tmp_path / "data"


def give_up_rights() -> None:
    """Root may open everything; a program started after this may not, even as root."""
    for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP; refused to others


def little_room() -> None:
    """Stands for a full disk: no file grows beyond this."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))


def run(*words: str | Path, before=give_up_rights) -> tuple[int, str]:
    """`spark3d prepare` as a user starts it: exit code and what it said, on one line."""
    done = subprocess.run(
        [sys.executable, "-m", "spark3d.cli", "prepare", "--workers", "0", *map(str, words)],
        capture_output=True, text=True, timeout=120, check=False, preexec_fn=before,
        env={**os.environ, "COLUMNS": "400"},  # no path broken over two lines
    )  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, " ".join((done.stdout + done.stderr).split())


def test_an_unreadable_file_is_named_and_the_others_are_prepared(source, tmp_path):
    (source / "c1.nii.gz").chmod(0)
    code, said = run("--data", source, "--out", tmp_path / "s", "--max-bad", "1")
    assert code == 0, said
    assert "E-UNREADABLE" in said
    assert "c1.nii.gz: found a file that cannot be read (Permission denied)" in said
    assert "3 cases = 2 written + 0 already there + 1 left out" in said


def test_a_folder_that_may_not_be_written_to_is_met_before_any_work(source, tmp_path):
    (tmp_path / "shut").mkdir(mode=0o555)
    for out in (tmp_path / "shut", tmp_path / "shut" / "s"):
        code, said = run("--data", source, "--out", out)
        assert code == 4, said
        assert f"cannot write to {out} (Permission denied): check the folder" in said
        assert "0/3" in said
    assert list((tmp_path / "shut").iterdir()) == []


def test_a_disk_that_gets_full_leaves_the_earlier_case_and_says_so(source, tmp_path):
    words = ("--data", source, "--out", tmp_path / "s", "--spacing", "2.5,2,3")
    assert run(*words)[0] == 0
    before = snapshot(tmp_path / "s")
    write_nifti(source / "c1.nii.gz", ct_like((40, 40, 40)))
    code, said = run(*words, before=little_room)
    assert code == 4, said
    assert "could not write c1.b2nd" in said
    assert "File too large): free some space and repeat the command" in said
    assert snapshot(tmp_path / "s") == before
    store = Store.open(tmp_path / "s")
    store.verify("c1")
    assert "1 written + 2 already there" in run(*words)[1]


def test_linked_folders_are_searched_each_real_one_once(source, tmp_path):
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "a").symlink_to(source)
    (tmp_path / "links" / "b").symlink_to(source)
    assert len(find_cases(tmp_path / "links")) == 3


@pytest.mark.parametrize("inner", ["closed", "imagesTr", "img"])
def test_a_folder_that_may_not_be_read_is_no_empty_one(source, tmp_path, monkeypatch, inner):
    closed, listing = source / inner, Path.iterdir
    closed.mkdir()
    (source / "label").mkdir()

    def refuse(folder):
        if folder == closed:
            raise PermissionError(13, "Permission denied", str(folder))
        return listing(folder)

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(DataError, match=rf"E-UNREADABLE.*{inner}.*permissions"):
        find_cases(source)


@pytest.mark.parametrize("file", ["imagesTr/c.nii.gz", "labelsTr/c.nii.gz", "imagesTr"])
def test_files_that_may_not_be_looked_at_are_not_said_to_be_absent(tmp_path, monkeypatch, file):
    """In a folder that may be listed and not entered."""
    for folder in ("imagesTr", "labelsTr"):
        write_nifti(tmp_path / "DOE JANE" / folder / "c.nii.gz", ct_like())
    closed, stat = tmp_path / "DOE JANE" / file, Path.stat

    def refuse(path, **options):
        if path == closed:
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", refuse)
    with pytest.raises(DataError, match=r"^E-UNREADABLE: [^\n]*permissions") as refused:
        find_cases(tmp_path / "DOE JANE")
    assert "DOE" not in str(refused.value)


def test_links_that_lead_in_a_circle_end_in_one_line(source, tmp_path):
    (source / "again").symlink_to(source)
    assert len(find_cases(source)) == 3
    (source / "self.nii.gz").symlink_to("self.nii.gz")
    code, said = run("--data", source, "--out", tmp_path / "s")
    assert (code, "self.nii.gz" in said) == (3, True)
    (tmp_path / "circle").symlink_to("circle")
    assert run("--data", tmp_path / "circle", "--out", tmp_path / "s")[0] == 3
    (source / "self.nii.gz").unlink()
    assert run("--data", source, "--out", tmp_path / "circle")[0] == 4


def test_any_name_will_do(tmp_path):
    folder = tmp_path / "Prüfung 日本 'a'"
    write_nifti(folder / "fall 1 ü.nii.gz", ct_like())
    prepare_command(folder, tmp_path / "aus gabe ñ", workers=0)
    store = Store.open(tmp_path / "aus gabe ñ")
    assert len(store) == 1
    store.verify(store.cases[0].id)


def test_names_that_are_not_utf8_will_do_too(tmp_path):
    """As an old archive or another system left them: hashed, listed, and found again."""
    folder = tmp_path / "in"
    folder.mkdir()
    image = Path(os.fsdecode(os.fsencode(folder) + b"/M\xfcller \xff.nii.gz"))
    image.write_bytes(write_nifti(tmp_path / "a.nii.gz").read_bytes())
    (case,) = find_cases(folder)
    assert case.id.startswith("case-")
    doctor_command(folder, tmp_path / "d.json", workers=0, names=tmp_path / "names.json")
    assert json.loads((tmp_path / "names.json").read_text("utf-8")) == {case.id: str(image)}
    write_case_list(tmp_path / "l.json", find(folder))
    assert [c.image for c in find_cases(tmp_path / "l.json")] == [image]
    prepare_command(folder, tmp_path / "s", workers=0)
    assert [record.id for record in Store.open(tmp_path / "s").cases] == [case.id]


def test_writers_of_shares_work_side_by_side_and_exclude_one_of_the_whole(tmp_path):
    settings = {"spacing_mm": [1, 1, 1]}
    others = [StoreWriter(tmp_path / "s", settings, shard) for shard in (None, 0)]
    with StoreWriter(tmp_path / "s", settings, 0), StoreWriter(tmp_path / "s", settings, 1):
        for other in others:
            with pytest.raises(EnvironmentProblem, match="another process is writing"):
                other.__enter__()
        with pytest.raises(DataError, match="E-SHARDS"):
            finalize(tmp_path / "s")
    for other in others:
        with other:
            pass
    with (
        StoreWriter(tmp_path / "s", settings),
        pytest.raises(EnvironmentProblem, match="another process"),
    ):
        StoreWriter(tmp_path / "s", settings, 1).__enter__()


def test_shares_that_start_together_on_a_new_store_describe_it_once(tmp_path, monkeypatch):
    """The others come while the first has written its description beside the place for it."""
    settings = [{"spacing_mm": [1, 1, 1]}, {"spacing_mm": [1, 1, 1]}, {"spacing_mm": [2, 2, 2]}]
    shares = [StoreWriter(tmp_path / "s", one, shard) for shard, one in enumerate(settings)]
    put, refused = files.put_in_place, []

    def start(share):
        try:
            with share:
                pass
        except ConfigError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=start, args=(share,)) for share in shares[1:]]

    def slowly(staged):
        monkeypatch.setattr(files, "put_in_place", put)
        for thread in threads:
            thread.start()
        time.sleep(0.3)
        put(staged)

    monkeypatch.setattr(files, "put_in_place", slowly)
    with shares[0]:
        for thread in threads:
            thread.join(10)
    assert len(refused) == 1
    assert "prepared with other settings (spacing_mm)" in refused[0]
    assert read_head(tmp_path / "s")["settings"] == settings[0]


@pytest.mark.parametrize("shard", [None, 0])
def test_what_a_kill_right_at_the_start_left_is_no_foreign_file(tmp_path, shard):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / ".store.json.123.tmp").write_text("half")
    with StoreWriter(tmp_path / "s", {"spacing_mm": [1, 1, 1]}, shard):
        pass
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / ".notes.tmp").write_text("the user's own")
    with pytest.raises(ConfigError, match="not empty and not a store"):
        StoreWriter(tmp_path / "t", {}, shard).__enter__()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_disk_without_locks_is_warned_of(source, tmp_path, monkeypatch, caplog, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    report = prepare(find_cases(source)[:1], tmp_path / "s", SPEC, shard=(0, 1))
    assert report.written == ["c0"]
    assert f"({os.strerror(number)}): start no second process on it" in caplog.text
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # Ctrl-C stays ours
    pool._start_worker(os.getppid(), tmp_path / "lock")  # the watch sees another parent: us


def test_a_second_writer_leaves_with_exit_code_4(source, tmp_path):
    words = ("--data", source, "--out", tmp_path / "s", "--spacing", "2.5,2,3")
    prepare(find_cases(source)[:1], tmp_path / "s", PrepareSpec((2.5, 2.0, 3.0)))
    with (tmp_path / "s" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, said = run(*words)
    assert code == 4
    assert "another process is writing to" in said


def test_workers_that_outlive_a_killed_writer_are_waited_for(tmp_path):
    writer = StoreWriter(tmp_path / "s", {"spacing_mm": [1, 1, 1]})
    with writer:
        pass
    held = writer.workers_lock.open("a+")
    fcntl.flock(held, fcntl.LOCK_SH)
    threading.Timer(0.3, held.close).start()
    begin = time.monotonic()
    with writer:
        assert time.monotonic() - begin > 0.25
    with writer.workers_lock.open("a+") as held:
        fcntl.flock(held, fcntl.LOCK_SH)
        with pytest.raises(EnvironmentProblem, match="of a killed run still write"):
            writer._wait_for_orphans(0.2)


def test_a_worker_shares_the_lock_while_it_lives(tmp_path, monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # Ctrl-C stays ours
    pool._start_worker(os.getppid(), tmp_path / "lock")  # the watch sees another parent: us
    with (tmp_path / "lock").open("a+") as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.parametrize("suffix", [".b2nd", ".seg.b2nd", ".npz"])
def test_rot_is_named_by_the_reader_and_mended_by_verify(tmp_path, suffix):
    cases = find_cases(decathlon(tmp_path / "data"))
    prepare(cases, tmp_path / "s", SPEC)
    whole = snapshot(tmp_path / "s")
    path = case_path(tmp_path / "s", "pt_1", suffix)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"E-STORE-DAMAGED: case pt_1: .* --verify"):
        Store.open(tmp_path / "s").verify("pt_1")

    seen = []
    report = prepare(
        cases, tmp_path / "s", SPEC, verify=True, progress=lambda *args: seen.append(args[0])
    )
    assert (report.written, len(report.skipped)) == (["pt_1"], 5)
    assert seen == [1, 2, 3, 4, 5, 6]
    assert snapshot(tmp_path / "s") == whole
    assert prepare(cases, tmp_path / "s", SPEC, verify=True).written == []


def test_an_altered_description_is_not_said_to_heal_by_itself(source, tmp_path):
    prepare(find_cases(source), tmp_path / "s", SPEC)
    path = tmp_path / "s" / "store.json"
    path.write_bytes(path.read_bytes().replace(b"2.5", b"1.5"))
    for act in (Store.open, lambda out: prepare(find_cases(source), out, SPEC)):
        with pytest.raises(DataError, match=r"store.json.*prepare into a new folder"):
            act(tmp_path / "s")


def test_a_share_that_is_done_again_must_end_before_finalize(source, tmp_path, monkeypatch):
    cases = find_cases(source)
    for share in range(2):
        prepare(cases, tmp_path / "s", SPEC, shard=(share, 2))
    assert finalize(tmp_path / "s") == 3
    write_nifti(source / "c0.nii.gz", ct_like(seed=50))
    write_nifti(source / "c1.nii.gz", ct_like(seed=51))
    write_nifti(source / "c2.nii.gz", ct_like(seed=52))

    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(preparing, "run_jobs", stopped)
    share = preparing._share_of("c0", 2)
    with pytest.raises(KeyboardInterrupt):
        prepare(cases, tmp_path / "s", SPEC, shard=(share, 2))
    with pytest.raises(DataError, match=rf"E-SHARDS.*\[{share}\] of 2"):
        finalize(tmp_path / "s")
