"""A run on a disk that may only be read, as an archive or the artifact of a job is: it is read as any other."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest

from lorameter.cli import main


@pytest.fixture
def disk(tmp_path):
    """A small disk, and a function that lets it only be read; a test that cannot mount one is skipped."""
    folder = tmp_path / "disk"
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(folder)]
    if os.geteuid() or subprocess.run(words, capture_output=True, check=False).returncode:
        pytest.skip("a disk that may only be read takes the right to mount one")
    yield folder, lambda: subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("status", ["complete", "running"])
@pytest.mark.parametrize("words", [["report"], ["compare", "--force"]], ids=lambda words: words[0])
def test_a_run_that_may_only_be_read_is_read(status, words, disk, write_run, capsys, monkeypatch):
    """By its path, from the folder that it lies in; also one whose process was killed, of which a lock is asked."""
    folder, only_read = disk
    path = folder / "mine"
    shutil.copytree(write_run("mine", {"plain": [1.0] * 5, "nf4": [1.1] * 5}, status=status), path)
    (path / "trials.jsonl.lock").touch()
    only_read()
    monkeypatch.chdir(folder)
    monkeypatch.delenv("LORAMETER_RUNS", raising=False)
    code = main([*words, str(path), *([str(path)] if words[0] == "compare" else [])])
    said = capsys.readouterr()
    assert code in (0, 3, 4), said.err
    assert "nf4" in said.out
    assert "Read-only" not in said.err
    assert main(["list", "runs", "--runs-dir", str(folder)]) == 0
    assert ("complete" if status == "complete" else "killed") in capsys.readouterr().out
