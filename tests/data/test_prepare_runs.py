"""Preparing that is killed, full, refused or short of memory: nothing is lost, and it is said."""

import math
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace

import pytest
from datasets import decathlon, label_like, snapshot
from hypothesis import given
from hypothesis import strategies as st
from nifti_files import DEFAULT, ct_like, write_nifti

from spark3d.data import job, pool
from spark3d.data.job import Job
from spark3d.data.pool import run_jobs
from spark3d.data.prepare import PrepareSpec, prepare
from spark3d.data.record import case_path
from spark3d.data.sources import CaseSource, find_cases
from spark3d.errors import DataError, EnvironmentProblem

SPEC = PrepareSpec(spacing_mm=(2.5, 2.0, 3.0))


@pytest.fixture
def source(tmp_path):
    return decathlon(tmp_path / "data")


KILLED = """
import sys
from pathlib import Path
from spark3d.data.prepare import PrepareSpec, prepare
from spark3d.data.sources import find_cases
if __name__ == "__main__":
    spec = PrepareSpec(spacing_mm=(2.5, 2.0, 3.0))
    prepare(find_cases(sys.argv[1]), sys.argv[2], spec, workers=int(sys.argv[3]))
"""


def kill_while_preparing(source, store, after, workers):
    """Start preparing in another process and kill it once `after` records are there."""
    child = subprocess.Popen([sys.executable, "-c", KILLED, source, store, str(workers)])
    deadline = time.monotonic() + 60
    while child.poll() is None and time.monotonic() < deadline:
        if len(list(store.rglob("cases/*/*.json"))) >= after:
            child.kill()
            break
    child.wait()


@pytest.mark.parametrize(
    "kills", [(3,), pytest.param(tuple(range(10)) * 2, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_killed_run_ends_like_an_uninterrupted_one(tmp_path, kills, workers):
    source = decathlon(tmp_path / "data", labelled=8)
    prepare(find_cases(source), tmp_path / "whole", SPEC)
    for after in kills:
        kill_while_preparing(source, tmp_path / "s", after, workers)
    time.sleep(1.5 if workers else 0)  # workers notice the death of their parent
    report = prepare(find_cases(source), tmp_path / "s", SPEC)
    assert report.total == 11
    assert snapshot(tmp_path / "s") == snapshot(tmp_path / "whole")
    assert prepare(find_cases(source), tmp_path / "s", SPEC).written == []


FULL = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))
from spark3d.data.prepare import PrepareSpec, prepare
from spark3d.data.sources import find_cases
from spark3d.errors import EnvironmentProblem
try:
    prepare(find_cases(sys.argv[1]), sys.argv[2], PrepareSpec(spacing_mm=(2.5, 2.0, 3.0)))
except EnvironmentProblem as error:
    print(error)
    sys.exit(4)
"""


def test_a_full_disk_is_said_and_loses_nothing(source, tmp_path):
    prepare(find_cases(source), tmp_path / "s", SPEC)
    before = snapshot(tmp_path / "s")
    big = ct_like((40, 40, 40))
    write_nifti(source / "imagesUn" / "un_1.nii.gz", big)
    call = [sys.executable, "-c", FULL, source, tmp_path / "s"]
    done = subprocess.run(call, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 4, done.stderr
    assert "free some space" in done.stdout
    assert snapshot(tmp_path / "s") == before, "the earlier case is whole, no temporary is left"
    assert prepare(find_cases(source), tmp_path / "s", SPEC).written == ["un_1"]


def test_a_killed_worker_is_named_with_its_cases(source, tmp_path):
    class DeadPool:
        def submit(self, _, one):
            future: Future[None] = Future()
            future.set_exception(BrokenProcessPool("gone"))
            return future

    jobs = [Job(case, SPEC, tmp_path) for case in find_cases(source)]
    with pytest.raises(EnvironmentProblem, match=r"killed.*pt_0.*--workers"):
        list(pool._schedule(DeadPool(), job.run_job, jobs, 2, 1e12))


@pytest.mark.parametrize(("budget", "most"), [(1.0, 1), (1e12, 6)])
def test_no_more_cases_run_at_once_than_fit_the_memory(source, tmp_path, budget, most):
    running, seen = [], []

    def slow(one):
        running.append(one)
        time.sleep(0.02)
        seen.append(len(running))
        running.remove(one)

    jobs = [Job(case, SPEC, tmp_path) for case in find_cases(source)]
    with ThreadPoolExecutor(6) as threads:
        assert len(list(pool._schedule(threads, slow, jobs, 3, budget))) == 6
    assert max(seen) <= most
    assert most == 1 or max(seen) > 1


@given(spacing=st.tuples(*[st.floats(0.2, 20)] * 3))
def test_memory_is_counted_on_the_finer_of_the_two_grids(tmp_path_factory, spacing):
    """Source files are 20 x 18 x 12 voxels of 2 x 1.5 x 3 mm; their axes may be in any order."""
    path = tmp_path_factory.getbasetemp() / "extent.nii"
    if not path.exists():
        write_nifti(path, ct_like().transpose(2, 0, 1), DEFAULT[:, [2, 0, 1, 3]])
    one = Job(CaseSource("a", path), PrepareSpec(spacing_mm=spacing), path.parent)
    voxels = 20 * 18 * 12
    expected = max(voxels, voxels * 9 / math.prod(spacing))
    assert pool.memory_of(one) == pytest.approx(expected * 4 * pool.COPIES, rel=1e-5)
    assert pool.memory_of(replace(one, spec=PrepareSpec())) == voxels * 4 * pool.COPIES


def test_a_case_too_large_for_the_memory_is_left_out_by_name(source, tmp_path, monkeypatch):
    def greedy(*_):
        raise MemoryError

    monkeypatch.setattr(job, "prepare_case", greedy)
    reason = job.run_job(Job(find_cases(source)[0], SPEC, tmp_path / "s"))
    assert reason is not None
    assert reason.startswith("E-MEMORY: pt_0: found ")


@pytest.mark.parametrize("part", ["images", "labels"])
def test_a_file_that_changes_while_it_is_read_is_not_taken_for_the_new_one(
    source, tmp_path, monkeypatch, part
):
    """It is left out by name; the same command prepares what is there then."""
    changing, read = source / f"{part}Tr" / "pt_0.nii.gz", job.prepare_case
    new = ct_like(seed=77) if part == "images" else label_like()[::-1]

    def slow(case, spec):
        prepared = read(case, spec)
        if case.id == "pt_0":
            write_nifti(changing, new)
        return prepared

    with monkeypatch.context() as patch:
        patch.setattr(job, "prepare_case", slow)
        report = prepare(find_cases(source), tmp_path / "s", SPEC, max_bad=1)
    assert list(report.failed) == ["pt_0"]
    assert report.failed["pt_0"].startswith("E-CHANGED: pt_0: found a file that changed")
    assert prepare(find_cases(source), tmp_path / "s", SPEC).written == ["pt_0"]
    prepare(find_cases(source), tmp_path / "new", SPEC)
    for suffix in (".b2nd", ".seg.b2nd"):
        one, two = (case_path(tmp_path / s, "pt_0", suffix).read_bytes() for s in ("s", "new"))
        assert one == two


@pytest.mark.parametrize("before", ["stamps", "prepare_case", "fingerprint"])
def test_a_file_that_goes_meanwhile_is_told_by_name(source, tmp_path, monkeypatch, before):
    one, work = find_cases(source)[0], getattr(job, before)

    def late(*args):
        one.image.unlink()
        return work(*args)

    monkeypatch.setattr(job, before, late)
    reason = job.run_job(Job(one, SPEC, tmp_path / "s"))
    assert reason is not None
    assert reason.startswith("E-UNREADABLE: ")
    assert "pt_0" in reason


def test_a_place_that_cannot_be_written_to_is_a_problem_of_the_environment(source, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(EnvironmentProblem, match="check the folder"):
        prepare(find_cases(source), tmp_path / "file" / "s", SPEC)


def test_jobs_run_here_without_workers(source, tmp_path):
    jobs = [Job(find_cases(source)[0], SPEC, tmp_path / "s")]
    assert [reason for _, reason in run_jobs(jobs, 0)] == [None]


def test_nothing_is_left_of_a_new_store_without_a_case(source, tmp_path):
    """Nor does it hinder the next attempt, with other settings; finished cases are kept."""
    whole = {path: path.read_bytes() for path in source.glob("images*/[pu]*.gz")}
    for path in whole:
        path.write_bytes(b"")
    (tmp_path / "mine").mkdir()
    for out in (tmp_path / "s", tmp_path / "mine"):
        with pytest.raises(DataError, match="E-TOO-MANY-BAD"):
            prepare(find_cases(source), out, SPEC)
    assert not (tmp_path / "s").exists()
    assert list((tmp_path / "mine").iterdir()) == [], "the user's own folder stays"
    with pytest.raises(DataError, match=r"E-NO-CASES: .* found 6 unusable cases and no other"):
        prepare(find_cases(source), tmp_path / "s", SPEC, max_bad=6)
    assert not (tmp_path / "s").exists()
    for path in list(whole)[:2]:
        path.write_bytes(whole[path])
    other = PrepareSpec(spacing_mm=(3, 3, 3))
    with pytest.raises(DataError, match="E-TOO-MANY-BAD"):
        prepare(find_cases(source), tmp_path / "s", other)
    assert len(list(tmp_path.glob("s/cases/*/*.json"))) == 2
