"""Tests of a run on a read-only disk, such as an archive or the artifact of a job."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest

from lorameter.cli import main


@pytest.fixture
def disk(tmp_path):
    """A small disk and a function that remounts it read-only; the test is skipped where no disk can be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(folder)]
    if os.geteuid() or subprocess.run(words, capture_output=True, check=False).returncode:
        pytest.skip("mounting a disk needs root")
    yield folder, lambda: subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_run_on_a_read_only_disk_is_read(disk, write_run, capsys, monkeypatch):
    """A run is read by path and from its own folder, also when its process was killed and the reader tries the lock."""
    folder, only_read = disk
    path = folder / "mine"
    shutil.copytree(write_run("mine", {"plain": [1.0] * 5, "nf4": [1.1] * 5}, status="running"), path)
    (path / "trials.jsonl.lock").touch()
    only_read()
    monkeypatch.chdir(folder)
    monkeypatch.delenv("LORAMETER_RUNS", raising=False)
    assert main(["report", str(path)]) == 4
    assert "nf4" in capsys.readouterr().out
    assert main(["list", "runs", "--runs-dir", str(folder)]) == 0
    assert "killed" in capsys.readouterr().out
