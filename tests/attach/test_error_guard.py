"""What an error of the meter's own is told as, and what it does."""

import pytest

from lorameter.attach.observer import ErrorGuard, NotFollowedError


def fail(error):
    raise error


@pytest.mark.parametrize(
    ("error", "said", "never"),
    [
        (NotFollowedError("another process of it is"), "this training is not followed: another process", "has failed"),
        (OSError("no room left"), "the measurement failed and has stopped; the training", "is not followed"),
    ],
)
def test_an_error_is_told_as_what_it_is(capfd, error, said, never):
    """A training that is not followed on purpose is no failure; either is told once, and nothing is called any more."""
    shield, told = ErrorGuard(), []
    shield.on_error = told.append
    for _ in range(2):
        assert shield.run(fail, error) is None
    assert shield.run(len, "never called") is None
    text = capfd.readouterr().err
    assert text.count(said) == 1
    assert never not in text
    assert told == [error]
    assert not shield.up


def test_a_wish_to_end_the_process_goes_through():
    """It is nobody's error."""
    shield = ErrorGuard()
    for wish in (SystemExit(0), KeyboardInterrupt()):
        with pytest.raises(type(wish)):
            shield.run(fail, wish)
    assert shield.up
