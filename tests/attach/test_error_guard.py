"""An error of the meter is printed and ends the measurement, not the training."""

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
    """That a training is not followed is no failure. Either is printed once, and nothing is called any more."""
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


def test_a_wish_to_end_the_process_goes_through():
    """It is no error."""
    guard = ErrorGuard()
    for wish in (SystemExit(0), KeyboardInterrupt()):
        with pytest.raises(type(wish)):
            guard.run(fail, wish)
    assert guard.up
