"""Ctrl-C, TERM and HUP: taken where a process waits, deferred where it saves, and never taken twice."""

from __future__ import annotations

import os
import signal

import pytest

from lorameter.run.interrupts import SIGNALS, InterruptHandler, StopRequested


@pytest.fixture(autouse=True)
def heard_before():
    """Whatever a test does, the signals are heard afterwards as before; HUP and TERM would end the tests."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        signal.signal(number, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number=signal.SIGTERM):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", SIGNALS)
def test_where_a_process_waits_a_stop_is_taken_at_once(number):
    """Each of the three, as a KeyboardInterrupt; nothing after it in the block is done."""
    done = []

    def wait():
        with InterruptHandler() as stops, stops.interruptible():
            send(number)
            done.append("it went on")

    with pytest.raises(KeyboardInterrupt, match=number.name):
        wait()
    assert not done


def test_elsewhere_a_stop_is_remembered_and_the_next_block_does_not_begin():
    """What is being saved is saved to its end."""
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


def test_a_stop_that_no_block_took_is_raised_at_the_end():
    """So that what follows in the program does not begin either."""
    with pytest.raises(StopRequested), InterruptHandler():
        send()


def test_once_taken_nothing_interrupts_what_it_sets_off():
    """A second Ctrl-C, and a third signal of another kind, cost nothing of what the first one saves and takes down."""
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
