"""Time and memory that somebody else's program may take, and that nothing is left of the bounds behind it."""

from __future__ import annotations

import resource
import signal
import threading

import pytest

from harness.machine.bounds import OverTimeError, memory_limit, time_limit


def test_who_computes_for_too_long_is_ended():
    """Also where every error is caught on the way; what stood before stands again."""
    before = signal.getsignal(signal.SIGPROF)

    def compute():
        while True:
            try:
                sum(range(1000))
            except Exception:
                continue

    with pytest.raises(OverTimeError), time_limit(0.05):
        compute()
    assert signal.getsignal(signal.SIGPROF) == before
    assert signal.getitimer(signal.ITIMER_PROF) == (0.0, 0.0)


def test_who_asks_for_too_much_gets_an_error():
    """And may ask for it afterwards."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(MemoryError), memory_limit(64 << 20):
        bytearray(512 << 20)
    assert resource.getrlimit(resource.RLIMIT_AS) == before
    assert len(bytearray(512 << 20)) == 512 << 20


def test_a_narrower_bound_stays(monkeypatch):
    """What the machine's keeper has set is not widened."""
    set_to = []
    monkeypatch.setattr(resource, "getrlimit", lambda which: (1 << 20, 1 << 30))
    monkeypatch.setattr(resource, "setrlimit", lambda which, limits: set_to.append(limits))
    with memory_limit(64 << 20):
        pass
    assert set_to == [(1 << 20, 1 << 30), (1 << 20, 1 << 30)]


def test_another_thread_has_no_limit_of_time():
    """Signals are told to the main one alone."""
    met = []
    thread = threading.Thread(target=lambda: met.append(time_limit(0.001).__enter__()))
    thread.start()
    thread.join()
    assert met == [None]
