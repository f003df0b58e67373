"""Time and memory that somebody else's program may take, and that nothing is left of the bounds behind it."""

from __future__ import annotations

import resource
import signal

import pytest

from lorameter.machine.rlimits import OverTimeError, memory_limit, time_limit


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
