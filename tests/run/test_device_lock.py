"""One measurement at a time on a device: the second one waits, is refused, or runs at the same time."""

from __future__ import annotations

import subprocess
import sys

import pytest

from lorameter.run.device_lock import hold_device


class OnDevice:
    """An executor, as far as it is asked."""

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


def test_a_killed_one_holds_nothing(holder):
    """The lock is the kernel's; the file that is left locks nothing."""
    holder.kill()
    holder.wait()
    with hold_device(OnDevice("GPU-1"), "refuse") as waited:
        assert not waited


def test_another_device_is_free_and_sharing_takes_no_lock(holder):
    """The lock is that of a device."""
    with hold_device(OnDevice("GPU-2"), "refuse") as waited, hold_device(OnDevice("GPU-1"), "share") as shared:
        assert not waited
        assert not shared


def test_a_name_leads_to_a_file_in_the_folder_and_to_no_other(tmp_path, monkeypatch):
    """Whatever the driver calls the GPU; a link in its place is not followed."""
    monkeypatch.setenv("LORAMETER_LOCKS", str(tmp_path))
    with hold_device(OnDevice("../../a GPU"), "refuse"):
        assert [path.name for path in tmp_path.iterdir()] == ["lorameter--a-GPU.lock"]
    (tmp_path / "lorameter-cpu.lock").symlink_to(tmp_path / "elsewhere")
    with hold_device(OnDevice("cpu"), "refuse"):
        assert not (tmp_path / "elsewhere").exists()
