"""What the system refuses: a full or read-only disk, the size of files, descriptors. What was measured before is kept,
the message names what was refused and what to do, the exit code is that of a machine that cannot measure."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import subprocess
import sys

import pytest

from lorameter.records import fileio, store
from lorameter.records.fileio import write_document


def limited(**limits):
    """To be run in the process between fork and exec: `limited(FSIZE=4096)`."""

    def limit():
        for name, most in limits.items():
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (most, most))

    return limit


def test_a_limit_of_file_sizes_keeps_what_fitted(command, only_run, resumed):
    """The records reach the limit in the middle of the run: whole lines only, exit 4, and it is resumed."""
    done = subprocess.run(command(), preexec_fn=limited(FSIZE=8_000), capture_output=True, text=True, check=False)
    assert done.returncode == 4, done.stderr
    assert "had measured is kept" in done.stderr
    assert (
        "File too large. Raise the limit of file sizes (ulimit -f), then resume: lorameter run --resume" in done.stderr
    )
    assert "Traceback" not in done.stderr
    run = only_run()
    assert (run.state, run.damaged_lines) == ("failed", 0)
    assert {record.replicate for record in run.records if record.settled} > {0}
    first = [record for record in run.records if record.replicate == 0]
    whole = resumed()
    assert (whole.state, len(whole.records)) == ("complete", len(run.manifest.order))
    assert [record for record in whole.records if record.replicate == 0] == first


def test_no_more_descriptors_are_a_refusal(command, only_run, resumed):
    """From the middle of a trial on none can be opened: what had been saved is kept, and it is resumed."""
    done = subprocess.run(command(stop="r1-a:turn:files"), capture_output=True, text=True, check=False)
    assert done.returncode == 4, done.stderr
    assert "Too many open files. Raise the limit of open files (ulimit -n), then resume: lorameter run" in done.stderr
    assert "Traceback" not in done.stderr
    kept = [record for record in only_run().records if record.settled]
    assert {record.replicate for record in kept} == {0}
    assert resumed().state == "complete"


def test_a_full_disk_leaves_whole_lines(tmp_path):
    """/dev/full behind the file: the refusal names it, and a file that took a part of a line is as it was."""
    (tmp_path / "trials.jsonl").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left on device: .*trials\.jsonl") as refused:
        fileio.append(tmp_path / "trials.jsonl", "line\n")
    assert refused.value.errno == errno.ENOSPC


def test_a_line_that_does_not_fit_leaves_no_part_of_itself(tmp_path):
    """The system takes what fits and then refuses; the file ends with the line before."""
    code = (
        "import sys; from pathlib import Path; from lorameter.records import fileio\n"
        "path = Path(sys.argv[1])\nfileio.append(path, 'x' * 99 + '\\n')\n"
        "try: fileio.append(path, 'y' * 99 + '\\n')\nexcept OSError as error: print(error.errno)"
    )
    words = [sys.executable, "-c", code, str(tmp_path / "trials.jsonl")]
    done = subprocess.run(words, preexec_fn=limited(FSIZE=150), capture_output=True, text=True, check=True)
    assert int(done.stdout) == errno.EFBIG
    assert (tmp_path / "trials.jsonl").read_text() == "x" * 99 + "\n"


def test_a_document_that_cannot_be_written_leaves_the_one_before(tmp_path):
    """The system refuses the new one in the middle; neither its draft nor half of anything is left."""
    path = tmp_path / "a.json"
    write_document(path, {"a": 1})
    code = (
        "import sys; from pathlib import Path; from lorameter.records.fileio import write_document\n"
        "try: write_document(Path(sys.argv[1]), {'a': 'x' * 999})\nexcept OSError as error: print(error.errno, error)"
    )
    words = [sys.executable, "-c", code, str(path)]
    done = subprocess.run(words, preexec_fn=limited(FSIZE=150), capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"{errno.EFBIG} ")
    assert str(path) in done.stdout
    assert '"a": 1' in path.read_text()
    assert [one.name for one in tmp_path.iterdir()] == ["a.json"]


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_measured(command, runs):
    """A file stands where the runs should."""
    runs.write_text("")
    done = subprocess.run(command(), capture_output=True, text=True, check=False)
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)
    assert "cannot be made" in done.stderr


@pytest.fixture
def small_disk(tmp_path, runs):
    """A disk of 256 KiB where the runs are; a test that cannot mount one is skipped."""
    runs.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(runs)]
    if os.geteuid() or subprocess.run(words, capture_output=True, check=False).returncode:
        pytest.skip("a small disk takes the right to mount one")
    yield runs
    subprocess.run(["umount", "--lazy", str(runs)], check=True)


def test_a_full_disk_keeps_what_fitted(command, small_disk, only_run, resumed):
    """A real one, full but for some pages: exit 4 with the remedy; with space it is resumed."""
    ballast = small_disk / "ballast"
    ballast.write_bytes(b"x" * (256 - 16) * 1024)
    done = subprocess.run(command(), capture_output=True, text=True, check=False)
    assert done.returncode == 4, done.stderr
    assert "No space left on device. Free space there, then resume: lorameter run --resume" in done.stderr
    run = only_run()
    assert run.damaged_lines == 0
    ballast.unlink()
    assert resumed().state == "complete"


def test_a_disk_that_cannot_be_written_from_the_start_is_a_refusal(command, small_disk):
    """Before anything was measured, so there is nothing to resume."""
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    done = subprocess.run(command(), capture_output=True, text=True, check=False)
    assert done.returncode == 4, done.stderr
    assert "could not begin" in done.stderr
    assert done.stderr.endswith("Read-only file system. Choose a folder that can be written.\n")


@pytest.fixture
def own_folder(small_disk, monkeypatch):
    """The small disk as the folder one stands in, where runs are kept by default."""
    monkeypatch.chdir(small_disk)
    monkeypatch.delenv(store.ENV_RUNS, raising=False)
    yield small_disk
    monkeypatch.undo()  # nobody stands in it when it is unmounted


@pytest.mark.usefixtures("own_folder")
def test_the_default_folder_on_a_full_disk_is_a_refusal(command, small_disk):
    """No half of what hides it from git stays."""
    with contextlib.suppress(OSError), (small_disk / "ballast").open("wb", buffering=0) as ballast:
        while ballast.write(b"x" * 4096):
            pass
    done = subprocess.run(in_default_folder(command()), capture_output=True, text=True, check=False)
    assert done.returncode == 4, done.stderr
    assert "No space left on device. Free space there, or give another with --runs-dir" in done.stderr
    assert not (small_disk / ".lorameter" / ".gitignore").exists()


def in_default_folder(words):
    """A command without its --runs-dir."""
    place = words.index("--runs-dir")
    return words[:place] + words[place + 2 :]
