"""Tests of SIGINT, SIGTERM and SIGHUP: they interrupt a waiting process, are deferred while it saves, and act only
once."""

from __future__ import annotations

import os
import signal

import pytest

from lorameter.run.interrupts import SIGNALS, InterruptHandler, StopRequested


@pytest.fixture(autouse=True)
def heard_before():
    """Restore the signal handlers after each test; SIGHUP and SIGTERM would otherwise end the tests."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        signal.signal(number, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number=signal.SIGTERM):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_stop_interrupts_an_interruptible_block_at_once(number):
    """Each signal raises KeyboardInterrupt inside an interruptible block, whose rest is not executed."""
    done = []

    def wait():
        with InterruptHandler() as stops, stops.interruptible():
            send(number)
            done.append("it went on")

    with pytest.raises(KeyboardInterrupt, match=number.name):
        wait()
    assert not done


def test_a_stop_outside_a_block_prevents_the_next_block():
    """A signal outside of an interruptible block lets the saving complete and prevents the next block."""
    saved = []

    def save():
        with InterruptHandler() as stops:
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
    with pytest.raises(StopRequested), InterruptHandler():
        send()


def test_further_signals_do_not_interrupt_the_cleanup():
    """Further signals do not interrupt the saving and cleanup after the first one."""
    done = []
    with InterruptHandler() as stops:
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
