"""One measurement at a time on a device: the second one waits, is refused, or runs at the same time."""

from __future__ import annotations

import subprocess
import sys

import pytest

from lorameter.errors import InvalidRunError
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
with hold_device(On(), "wait", tell=lambda line: None):
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


def test_the_second_one_is_refused_if_it_asks_for_that(holder):
    """With the process that is in the way, and what to do."""
    with pytest.raises(
        InvalidRunError, match=rf"process {holder.pid} measures on this device \(GPU-1\).*--if-busy share"
    ):
        hold_device(OnDevice("GPU-1"), "refuse").__enter__()


def test_the_second_one_waits_and_says_for_whom(holder):
    """It begins when the first one has ended; here the test ends the first one as soon as the message arrives."""
    messages = []

    def tell(line):
        messages.append(line)
        holder.stdin.close()

    with hold_device(OnDevice("GPU-1"), "wait", tell=tell) as waited:
        assert waited
        assert holder.wait() == 0
    assert f"process {holder.pid} measures on this device (GPU-1); waiting for its end" in messages[0]


def test_a_killed_one_holds_nothing(holder):
    """The lock is the kernel's; the file that is left locks nothing."""
    holder.kill()
    holder.wait()
    with hold_device(OnDevice("GPU-1"), "refuse") as waited:
        assert not waited


def test_another_device_is_free_and_sharing_asks_nobody(holder):
    """The lock is that of a device."""
    with hold_device(OnDevice("GPU-2"), "refuse") as waited, hold_device(OnDevice("GPU-1"), "share") as shared:
        assert not waited
        assert not shared


def test_where_no_lock_can_be_had_none_is_held(tmp_path, monkeypatch):
    """Without the folder nothing is locked, and measuring works."""
    monkeypatch.setenv("LORAMETER_LOCKS", str(tmp_path / "nowhere"))
    with hold_device(OnDevice(), "refuse"), hold_device(OnDevice(), "refuse") as waited:
        assert not waited


def test_a_name_leads_to_a_file_in_the_folder_and_to_no_other(tmp_path, monkeypatch):
    """Whatever the driver calls the GPU; a link in its place is not followed."""
    monkeypatch.setenv("LORAMETER_LOCKS", str(tmp_path))
    with hold_device(OnDevice("../../a GPU"), "refuse"):
        assert [path.name for path in tmp_path.iterdir()] == ["lorameter--a-GPU.lock"]
    (tmp_path / "lorameter-cpu.lock").symlink_to(tmp_path / "elsewhere")
    with hold_device(OnDevice("cpu"), "refuse"):
        assert not (tmp_path / "elsewhere").exists()
