"""Tests of signals that wait for the end of a block, and of the description of how a process ended."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from lorameter.machine.processes import delay_signals


@pytest.fixture
def met():
    """The signals that a handler of SIGUSR1 received."""
    received = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: received.append(number))
    yield received
    signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize("threads", [0, 1])
def test_a_signal_waits_for_the_end_of_the_block(met, threads):
    """The signal waits whatever the number of threads, and also where the block fails."""
    over = threading.Event()
    others = [threading.Thread(target=over.wait) for _ in range(threads)]
    for other in others:
        other.start()

    def fail():
        with delay_signals([signal.SIGUSR1]):
            os.kill(os.getpid(), signal.SIGUSR1)
            over.wait(0.05)
            raise ZeroDivisionError(f"so far {met}")

    try:
        with pytest.raises(ZeroDivisionError, match=r"so far \[\]"):
            fail()
    finally:
        over.set()
        for other in others:
            other.join()
    assert met == [signal.SIGUSR1]


def test_a_signal_that_is_ignored_stays_ignored(met):
    """An ignored signal stays ignored, as SIGHUP under nohup, so that child processes inherit it unchanged."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    with delay_signals([signal.SIGUSR1]):
        assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN
        os.kill(os.getpid(), signal.SIGUSR1)
    assert met == []


@pytest.mark.parametrize("code", [0, 3])
def test_a_process_exits_with_its_code_and_flushed_output(code):
    """Exit handlers run, output is flushed, and threads are not joined."""
    program = (
        "import atexit, threading, time\n"
        "from lorameter.machine.processes import leave\n"
        "threading.Thread(target=time.sleep, args=(60,)).start()\n"
        "atexit.register(print, 'at the end')\n"
        "print('before', end=' ')\n"
        f"leave({code})\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=30)
    assert (done.returncode, done.stdout, done.stderr) == (code, "before at the end\n", "")
