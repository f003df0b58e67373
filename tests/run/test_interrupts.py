"""Tests of SIGINT, SIGTERM and SIGHUP: they interrupt a waiting process, are deferred while it saves, and act only
once.

Tests of the lock of a device: a second measurement waits, is refused, or runs concurrently.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from lorameter.machine.processes import STOP_SIGNALS
from lorameter.run.interrupts import StopRequested, handle_interrupts
from lorameter.run.workers import hold_devices


@pytest.fixture(autouse=True)
def heard_before():
    """Restore the signal handlers after each test; SIGHUP and SIGTERM would otherwise end the tests."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    for number in STOP_SIGNALS:
        signal.signal(number, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number=signal.SIGTERM):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_stop_interrupts_an_interruptible_block_at_once(number):
    """Each signal raises KeyboardInterrupt inside an interruptible block, whose rest is not executed."""
    done = []

    def wait():
        with handle_interrupts() as stops, stops.interruptible():
            send(number)
            done.append("it went on")

    with pytest.raises(KeyboardInterrupt, match=number.name):
        wait()
    assert not done


def test_a_stop_outside_a_block_prevents_the_next_block():
    """A signal outside of an interruptible block lets the saving complete and prevents the next block."""
    saved = []

    def save():
        with handle_interrupts() as stops:
            for part in range(3):
                send()
                saved.append(part)
            with stops.interruptible():
                saved.append("measured")

    with pytest.raises(StopRequested):
        save()
    assert saved == [0, 1, 2]


def test_a_pending_stop_is_raised_at_the_end():
    """A pending stop is raised at the end, so that no later code runs."""
    with pytest.raises(StopRequested), handle_interrupts():
        send()


def test_further_signals_do_not_interrupt_the_cleanup():
    """Further signals do not interrupt the saving and cleanup after the first one."""
    done = []
    with handle_interrupts() as stops:
        try:
            with stops.interruptible():
                send(signal.SIGINT)
        except StopRequested:
            send(signal.SIGINT)
            send(signal.SIGHUP)
            done.append("saved")
        with stops.interruptible():
            done.append("shown")
    assert done == ["saved", "shown"]


class OnDevice:
    """An executor with only a device id."""

    def __init__(self, device="cpu"):
        self.device = device

    def device_id(self):
        return self.device


HOLDER = """
import sys
from lorameter.run.workers import hold_devices
class On:
    def device_id(self): return sys.argv[1]
with hold_devices([On()], "wait"):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_lock_is_of_one_device_and_ends_with_its_process(tmp_path, monkeypatch):
    """Another device is free, and sharing takes no lock; the kernel removes the lock of a killed process, whose file
    locks nothing."""
    monkeypatch.setenv("LORAMETER_LOCKS", str(tmp_path))
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", HOLDER, "GPU-1"], **streams) as holder:
        assert holder.stdout.readline() == "held\n"
        with (
            hold_devices([OnDevice("GPU-2")], "refuse") as waited,
            hold_devices([OnDevice("GPU-1")], "share") as shared,
        ):
            assert not waited
            assert not shared
        holder.kill()
    with hold_devices([OnDevice("GPU-1")], "refuse") as waited:
        assert not waited


def test_a_lock_file_is_in_the_folder_for_any_device_name(tmp_path, monkeypatch):
    """The file is in the folder for any GPU name, and a link in its place is not followed."""
    monkeypatch.setenv("LORAMETER_LOCKS", str(tmp_path))
    with hold_devices([OnDevice("../../a GPU")], "refuse"):
        assert [path.name for path in tmp_path.iterdir()] == ["lorameter--a-GPU.lock"]
    (tmp_path / "lorameter-cpu.lock").symlink_to(tmp_path / "elsewhere")
    with hold_devices([OnDevice("cpu")], "refuse"):
        assert not (tmp_path / "elsewhere").exists()
