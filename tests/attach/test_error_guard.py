"""Tests that an error of the meter is printed and ends the measurement, not the training."""

import pytest

from lorameter.attach.observer import ErrorGuard, NotFollowedError


def fail(error):
    raise error


@pytest.mark.parametrize(
    ("error", "expected", "never"),
    [
        (NotFollowedError("another process of it is"), "this training is not followed: another process", "has failed"),
        (OSError("no room left"), "the measurement failed and has stopped; the training", "is not followed"),
    ],
)
def test_an_error_is_printed_once(capfd, error, expected, never):
    """A failure and a training that cannot be observed are each printed once, and nothing is called afterwards."""
    guard, errors = ErrorGuard(), []
    guard.on_error = errors.append
    for _ in range(2):
        assert guard.run(fail, error) is None
    assert guard.run(len, "never called") is None
    text = capfd.readouterr().err
    assert text.count(expected) == 1
    assert never not in text
    assert errors == [error]
    assert not guard.up


def test_exit_and_interrupt_are_raised_through_the_guard():
    """SystemExit and KeyboardInterrupt are raised and are not errors of the meter."""
    guard = ErrorGuard()
    for wish in (SystemExit(0), KeyboardInterrupt()):
        with pytest.raises(type(wish)):
            guard.run(fail, wish)
    assert guard.up
