"""Tests of the lock of a device: a second measurement waits, is refused, or runs concurrently."""

from __future__ import annotations

import subprocess
import sys

import pytest

from lorameter.run.device_lock import hold_device


class OnDevice:
    """An executor with only a device id."""

    def __init__(self, device="cpu"):
        self.device = device

    def device_id(self):
        return self.device


HOLDER = """
import sys
from lorameter.run.device_lock import hold_device
class On:
    def device_id(self): return sys.argv[1]
with hold_device(On(), "wait"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path, monkeypatch):
    """A process that holds the device until its stdin is closed or it is killed."""
    monkeypatch.setenv("LORAMETER_LOCKS", str(tmp_path))
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", HOLDER, "GPU-1"], **streams) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_killed_process_holds_no_lock(holder):
    """The kernel holds the lock; the remaining file locks nothing."""
    holder.kill()
    holder.wait()
    with hold_device(OnDevice("GPU-1"), "refuse") as waited:
        assert not waited


def test_another_device_is_free_and_sharing_takes_no_lock(holder):
    """Each device has its own lock."""
    with hold_device(OnDevice("GPU-2"), "refuse") as waited, hold_device(OnDevice("GPU-1"), "share") as shared:
        assert not waited
        assert not shared


def test_a_lock_file_is_in_the_folder_for_any_device_name(tmp_path, monkeypatch):
    """The file is in the folder for any GPU name, and a link in its place is not followed."""
    monkeypatch.setenv("LORAMETER_LOCKS", str(tmp_path))
    with hold_device(OnDevice("../../a GPU"), "refuse"):
        assert [path.name for path in tmp_path.iterdir()] == ["lorameter--a-GPU.lock"]
    (tmp_path / "lorameter-cpu.lock").symlink_to(tmp_path / "elsewhere")
    with hold_device(OnDevice("cpu"), "refuse"):
        assert not (tmp_path / "elsewhere").exists()
